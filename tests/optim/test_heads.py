"""Groups of heads, each with matrices of its own, compared with slices and with plain Muon."""

import jax
import jax.numpy as jnp
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
        name: jnp.float32(random.standard_normal(shape) * np.geomspace(0.3, 3, shape[-1]))
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


def steps_of(muon, gradients):
    """Return the updates of successive steps, and the last state."""
    state, update, updates = muon.init(gradients[0]), jax.jit(muon.update), []
    for gradient, decay in zip(gradients, DECAYS, strict=True):
        moved, state = update(gradient, state, momentum=decay)
        updates.append(moved)
    return updates, state


@pytest.mark.parametrize("groups", [2, 3, 12])
def test_queries_and_keys_of_each_group_are_matrices_and_values_stay_whole(groups):
    updates = {"attention": some_gradients(0), "mlp": {"up": jnp.ones((2, 4, 8))}}
    found = apart(updates, groups)
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
    split = apart(updates, groups)
    assert isinstance(split["attention"]["qkv"], Apart) == (groups > 1)
    back = together(split)
    assert jax.tree.structure(back) == jax.tree.structure(updates)
    jax.tree.map(np.testing.assert_array_equal, back, updates)


@pytest.mark.parametrize("neuron_decay", [0.9, None])
@pytest.mark.parametrize("groups", [2, 6])
def test_muon_by_groups_is_plain_muon_of_each_groups_matrix_by_itself(groups, neuron_decay):
    gradients = [some_gradients(seed) for seed in range(3)]
    found, _ = steps_of(scale_by_muon(neuron_decay, groups), gradients)
    for name in matrices_of(gradients[0]["qkv"], groups):
        alone = [{"up": matrices_of(g["qkv"], groups)[name]} for g in gradients]
        expected, _ = steps_of(scale_by_muon(neuron_decay), alone)
        for moved, expects in zip(found, expected, strict=True):
            its = matrices_of(moved["qkv"], groups)[name]
            np.testing.assert_allclose(its, expects["up"], atol=2e-4, err_msg=name)
    whole, _ = steps_of(scale_by_muon(neuron_decay), gradients)
    for moved, as_ever in zip(found, whole, strict=True):
        assert abs(moved["qkv"][:, :2] - as_ever["qkv"][:, :2]).max() > 0.1
        for name in ("out", "up"):
            np.testing.assert_allclose(moved[name], as_ever[name], atol=2e-4, err_msg=name)


def test_each_groups_singular_values_come_near_one_though_in_a_whole_matrix_they_would_not():
    # The gradient of one head of six is a thousandth of the others'.
    gradient = some_gradients(0)["qkv"].at[:, 0, :, :4].multiply(1e-3)
    sizes = {}
    for groups in (1, 6):
        muon = scale_by_muon(None, groups)
        updates, _ = muon.update({"qkv": gradient}, muon.init({"qkv": gradient}), momentum=0.9)
        small = np.asarray(updates["qkv"][:, 0, :, :4], "f8")
        sizes[groups] = np.linalg.svd(small, compute_uv=False)
    assert sizes[6].min() > 0.84 and sizes[6].max() < 1.15
    assert sizes[1].min() < 0.7


def test_the_state_has_a_mean_square_for_each_neuron_of_each_group_and_one_momentum():
    gradients = some_gradients(0)
    momentum, squares = scale_by_muon(0.9, 3).init(gradients)
    assert jax.tree.map(np.shape, momentum) == jax.tree.map(np.shape, gradients)
    # Matrices [24, 8] have more inputs than outputs.
    assert squares["qkv"].heads.shape == (LAYERS, 2, 3, WIDTH, 1)
    assert squares["qkv"].values.shape == (LAYERS, 1, 1, WIDTH)


def test_without_groups_the_state_is_what_it_was_before_there_were_any():
    gradients = some_gradients(0)
    for state in (
        scale_by_muon(0.9).init(gradients),
        steps_of(scale_by_muon(0.9), [gradients] * 3)[1],
    ):
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
