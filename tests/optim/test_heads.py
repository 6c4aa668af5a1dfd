"""Groups of heads, each with matrices of its own, compared with slices and with plain Muon."""

from functools import partial

import jax
import numpy as np
import pytest

from nanogpt.optim.heads import Apart, apart, together
from nanogpt.optim.muon import scale_by_muon

LAYERS, WIDTH = 3, 24
DECAYS = (0.85, 0.9, 0.95)


def some_gradients(seed):
    """Return gradients of attentions and MLPs, in which some columns are larger than others."""
    random = np.random.default_rng(seed)
    shapes = {"qkv": (LAYERS, 3, WIDTH, WIDTH), "out": (LAYERS, WIDTH, WIDTH), "up": (2, WIDTH, 40)}
    return {
        name: np.float32(random.standard_normal(shape) * np.geomspace(0.3, 3, shape[-1]))
        for name, shape in shapes.items()
    }


def matrices_of(qkv, groups):
    """Return the queries and keys of each group of heads by name, and the values, each [layers].

    The outputs of a group are next to each other.
    """
    part = WIDTH // groups
    found = {"values": qkv[:, 2]}
    for number, name in enumerate(("queries", "keys")):
        for group in range(groups):
            found[f"{name} {group}"] = qkv[:, number, :, group * part : (group + 1) * part]
    return found


def updates_of(muon, gradients):
    """Return the updates of successive steps."""
    state, update, updates = jax.jit(muon.init)(gradients[0]), jax.jit(muon.update), []
    for gradient, decay in zip(gradients, DECAYS, strict=True):
        moved, state = update(gradient, state, momentum=decay)
        updates.append(moved)
    return updates


@pytest.mark.parametrize("groups", [2, 3, 12])
def test_queries_and_keys_of_each_group_are_matrices_and_values_stay_whole(groups):
    updates = {"attention": some_gradients(0), "mlp": {"up": np.ones((2, 4, 8))}}
    found = jax.jit(partial(apart, groups=groups))(updates)
    heads, values = found["attention"].pop("qkv")
    assert heads.shape == (LAYERS, 2, groups, WIDTH, WIDTH // groups)
    assert values.shape == (LAYERS, 1, WIDTH, WIDTH)
    expected = matrices_of(updates["attention"].pop("qkv"), groups)
    np.testing.assert_array_equal(values[:, 0], expected["values"])
    for number, name in enumerate(("queries", "keys")):
        for group in range(groups):
            np.testing.assert_array_equal(heads[:, number, group], expected[f"{name} {group}"])
    jax.tree.map(np.testing.assert_array_equal, found, updates)  # all others as they are


@pytest.mark.parametrize("groups", [1, 2, 3, 24])
def test_together_undoes_apart(groups):
    updates = {"attention": some_gradients(0)}
    split = jax.jit(partial(apart, groups=groups))(updates)
    assert isinstance(split["attention"]["qkv"], Apart) == (groups > 1)
    back = jax.jit(together)(split)
    assert jax.tree.structure(back) == jax.tree.structure(updates)
    jax.tree.map(np.testing.assert_array_equal, back, updates)


def test_muon_by_groups_is_plain_muon_of_each_groups_matrix_by_itself():
    gradients = [some_gradients(seed) for seed in range(3)]
    found = updates_of(scale_by_muon(0.9, head_groups=6), gradients)
    alone = updates_of(scale_by_muon(0.9), [matrices_of(g["qkv"], 6) for g in gradients])
    whole = updates_of(scale_by_muon(0.9), gradients)
    for moved, expected, as_ever in zip(found, alone, whole, strict=True):
        for name, its in matrices_of(moved["qkv"], 6).items():
            np.testing.assert_allclose(its, expected[name], atol=2e-4, err_msg=name)
        assert abs(moved["qkv"][:, :2] - as_ever["qkv"][:, :2]).max() > 0.1
        for name in ("out", "up"):
            np.testing.assert_allclose(moved[name], as_ever[name], atol=2e-4, err_msg=name)


def test_each_groups_singular_values_come_near_one_though_in_a_whole_matrix_they_would_not():
    # The gradient of one head of six is a thousandth of the others'.
    gradients = {"qkv": some_gradients(0)["qkv"]}
    gradients["qkv"][:, 0, :, :4] *= 1e-3
    sizes = {}
    for groups in (1, 6):
        muon = scale_by_muon(None, groups)
        step = jax.jit(lambda g, muon=muon: muon.update(g, muon.init(g), momentum=0.9))
        updates, _ = step(gradients)
        small = np.asarray(updates["qkv"][:, 0, :, :4], "f8")
        sizes[groups] = np.linalg.svd(small, compute_uv=False)
    assert sizes[6].min() > 0.84 and sizes[6].max() < 1.15
    assert sizes[1].min() < 0.7


def test_the_state_has_a_mean_square_for_each_neuron_of_each_group_and_one_momentum():
    gradients = some_gradients(0)
    momentum, squares = jax.eval_shape(scale_by_muon(0.9, 3).init, gradients)
    assert jax.tree.map(np.shape, momentum) == jax.tree.map(np.shape, gradients)
    # Matrices [24, 8] have more inputs than outputs.
    assert squares["qkv"].heads.shape == (LAYERS, 2, 3, WIDTH, 1)
    assert squares["qkv"].values.shape == (LAYERS, 1, 1, WIDTH)


def test_without_groups_the_state_is_what_it_was_before_there_were_any():
    muon, gradients = scale_by_muon(0.9), some_gradients(0)
    before = jax.eval_shape(muon.init, gradients)
    _, after = jax.eval_shape(partial(muon.update, momentum=0.9), gradients, before)
    for state in (before, after):
        names = [
            (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
            for path, leaf in jax.tree.leaves_with_path(state)
        ]
        assert names == [
            (".momentum['out']", (3, 24, 24), "float32"),
            (".momentum['qkv']", (3, 3, 24, 24), "float32"),
            (".momentum['up']", (2, 24, 40), "float32"),
            (".neuron_mean_square['out']", (3, 1, 24), "float32"),
            (".neuron_mean_square['qkv']", (3, 3, 1, 24), "float32"),
            (".neuron_mean_square['up']", (2, 1, 40), "float32"),
        ]
