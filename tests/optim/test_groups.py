"""Which rule moves which parameter, and how far: held against the papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.optim.groups import cautious_decay, group, make_optimizer
from nanogpt.optim.muon import MuonState
from nanogpt.training.step import init_params

# One matrix, and parameters for each of Adam's groups.
SHAPES = {"up": (2, 8, 12), "embed": (6, 8), "head": (8, 6), "skips": (2,), "gate": (2, 3, 4)}
RATES = {"up": 0.05, "embed": 0.3, "head": 0.007, "skips": 0.02, "gate": 0.02}
BY_ADAM = ("embed", "head", "skips", "gate")


def some(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, "f4") for name, shape in SHAPES.items()}


def optimizer_with(**changed):
    settings = dict(
        learning_rate=RATES["up"],
        embedding_learning_rate=RATES["embed"],
        head_learning_rate=RATES["head"],
        scalar_learning_rate=RATES["skips"],
        adam_betas=(0.8, 0.95),
        weight_decay=0.0,
    )
    return make_optimizer(**(settings | changed))


def init(optimizer, params):
    return optimizer.init(jax.tree.map(jnp.asarray, params))


def updates_of(optimizer, gradients, params, rates=None, momenta=None):
    """The updates of one step after another, and the last state."""
    state, update, updates = init(optimizer, params), jax.jit(optimizer.update), []
    rates, momenta = rates or [1.0] * len(gradients), momenta or [0.9] * len(gradients)
    for gradient, rate, momentum in zip(gradients, rates, momenta, strict=True):
        moved, state = update(
            gradient, state, params, rate=jnp.float32(rate), momentum=jnp.float32(momentum)
        )
        updates.append(moved)
    assert update._cache_size() == 1  # one program for all rates and momenta
    return updates, state


def adam_of_kingma_and_ba(gradients, rate):
    """What each gradient moves a parameter by, with the betas 0.8 and 0.95."""
    m, v, moved = 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        moved.append(-rate * (m / (1 - 0.8**t)) / np.sqrt(v / (1 - 0.95**t)))
    return moved


# Groups


def test_every_parameter_of_the_model_is_in_its_group(tiny):
    params = jax.eval_shape(lambda: init_params(tiny, jax.random.key(0)))
    names = {"muon": set(), "embedding": set(), "head": set(), "scalar": set()}
    for path, parameter in jax.tree_util.tree_leaves_with_path(params):
        names[group(path, parameter)].add(path[-1].key)
        if group(path, parameter) == "scalar":
            assert parameter.size < 500, path
    assert names["muon"] == {"qkv", "out", "up", "down"}
    assert names["embedding"] == {"embed", "value_embed", "bigram_embed"}
    assert names["head"] == {"head"}


@pytest.mark.parametrize("name", ["gate", "value_gate"])
def test_gates_are_scalars_though_they_are_stacked_like_matrices(name):
    path = (jax.tree_util.DictKey("blocks"), jax.tree_util.DictKey(name))
    assert group(path, jnp.zeros((4, 12, 2))) == "scalar"


# The rate


def test_every_group_follows_the_rate():
    params, gradients = some(0), some(1)
    (full,), _ = updates_of(optimizer_with(), [gradients], params)
    (half, eighth), _ = updates_of(optimizer_with(), [gradients] * 2, params, [0.5, 0.125])
    for name in SHAPES:
        np.testing.assert_allclose(half[name], 0.5 * full[name], rtol=1e-6, err_msg=name)
        # A gradient that stays moves its parameter by as much again, whatever the rule.
        np.testing.assert_allclose(eighth[name], 0.125 * full[name], rtol=1e-3, atol=1e-6)


# Adam


@pytest.mark.parametrize("name", BY_ADAM)
def test_the_first_step_of_adam_moves_by_the_rate_of_the_group_against_the_gradient(name):
    gradients = some(1)
    # However small the gradient: at initialisation those of the embeddings are tiny.
    gradients = {key: 1e-6 * (g + np.sign(g)) for key, g in gradients.items()}
    (moved,), _ = updates_of(optimizer_with(), [gradients], some(0))
    np.testing.assert_allclose(moved[name], -RATES[name] * np.sign(gradients[name]), rtol=1e-3)


def test_later_steps_of_adam_are_those_of_kingma_and_ba():
    gradients = [some(seed) for seed in range(1, 6)]
    updates, _ = updates_of(optimizer_with(), gradients, some(0))
    for name in BY_ADAM:
        expected = adam_of_kingma_and_ba([g[name].astype("f8") for g in gradients], RATES[name])
        found = [moved[name] for moved in updates]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_the_state_keeps_its_structure_shapes_and_dtypes():
    # Checkpoints, donation, and leaving out a bad batch rely on that.
    params, optimizer = some(0), optimizer_with()
    _, after = updates_of(optimizer, [some(1)], params)
    before, after = (
        jax.tree.map(lambda x: (x.shape, x.dtype), state)
        for state in (init(optimizer, params), after)
    )
    assert before == after


# Muon


def test_matrices_move_by_muons_rate_along_orthogonal_directions():
    gradients = some(1)
    (moved,), _ = updates_of(optimizer_with(), [gradients], some(0))
    # On the first step each output moves by as much as the others: by the rate times
    # sqrt(outputs / inputs) times sqrt(inputs / outputs).
    np.testing.assert_allclose(np.linalg.norm(moved["up"], axis=1) / RATES["up"], 1, rtol=0.15)
    # And, but for those sizes, along the singular vectors of the gradient, against it.
    u, _, vt = np.linalg.svd(gradients["up"].astype("f8"), full_matrices=False)
    orthogonal = -u @ vt
    orthogonal /= np.linalg.norm(orthogonal, axis=1, keepdims=True)
    assert np.sum(moved["up"] / RATES["up"] * orthogonal, axis=1).min() > 0.95


def test_the_momentum_is_that_of_each_step():
    gradients = [some(seed) for seed in range(1, 5)]
    decays = [0.85, 0.875, 0.95, 0.9]
    _, state = updates_of(optimizer_with(), gradients, some(0), momenta=decays)
    mean = 0.0
    for gradient, decay in zip(gradients, decays, strict=True):
        mean = decay * mean + (1 - decay) * gradient["up"].astype("f8")
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MuonState))
    (muon,) = (node for node in nodes if isinstance(node, MuonState))
    np.testing.assert_allclose(muon.momentum["up"], mean, rtol=1e-4, atol=1e-6)


# Weight decay


def test_cautious_decay_shrinks_only_weights_that_the_update_brings_nearer_to_zero():
    updates = {"w": jnp.array([0.2, -0.2, 0.2, -0.2, 0.0, 0.2], "f4")}
    weights = {"w": jnp.array([3.0, -3.0, -3.0, 3.0, 3.0, 0.0], "f4")}
    rule = cautious_decay(0.1)
    found, _ = rule.update(updates, rule.init(weights), weights, rate=0.5)
    # 0.1 * 0.5 * 3 = 0.15 more where both have one sign.
    np.testing.assert_allclose(found["w"], [0.35, -0.35, 0.2, -0.2, 0, 0.2], rtol=1e-6)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_weight_decay_goes_with_the_square_of_the_rate_and_is_of_matrices_only(rate):
    params, gradients = some(0), [some(1)]
    (without,), _ = updates_of(optimizer_with(), gradients, params, [rate])
    (decayed,), _ = updates_of(optimizer_with(weight_decay=3.0), gradients, params, [rate])
    w, u = params["up"].astype("f8"), -np.asarray(without["up"], "f8")
    expected = -((rate * RATES["up"]) ** 2) * 3.0 * np.where(u * w > 0, w, 0)
    np.testing.assert_allclose(decayed["up"] - without["up"], expected, atol=1e-7)
    for name in BY_ADAM:
        np.testing.assert_array_equal(decayed[name], without[name])


def test_without_a_gradient_nothing_moves():
    still = jax.tree.map(np.zeros_like, some(0))
    (moved,), _ = updates_of(optimizer_with(weight_decay=3.0), [still], some(0))
    for name in SHAPES:
        np.testing.assert_array_equal(moved[name], 0, err_msg=name)
