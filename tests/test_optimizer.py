"""Which rule moves which parameter, and how far: held against the papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.muon import MuonState
from nanogpt.optimizer import group, learning_rate_factor, make_optimizer
from nanogpt.step import init_params

# One matrix, and one parameter for each of Adam's groups.
SHAPES = {"up": (2, 8, 12), "embed": (6, 8), "head": (8, 6), "skips": (2,)}
RATES = {"up": 0.05, "embed": 0.3, "head": 0.007, "skips": 0.02}


def some(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, "f4") for name, shape in SHAPES.items()}


def optimizer_with(**changed):
    settings = dict(
        schedule=lambda step: 1.0,
        learning_rate=RATES["up"],
        embedding_learning_rate=RATES["embed"],
        head_learning_rate=RATES["head"],
        scalar_learning_rate=RATES["skips"],
        momentum=0.95,
        momentum_warmup_steps=4,
        adam_betas=(0.8, 0.95),
        weight_decay=0.0,
    )
    return make_optimizer(**(settings | changed))


def updates_of(optimizer, gradients, params):
    """The updates of one step after another, and the last state."""
    state, update, updates = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        moved, state = update(gradient, state, params)
        updates.append(moved)
    return updates, state


# Groups


def test_every_parameter_is_in_its_group(tiny):
    params = jax.eval_shape(lambda: init_params(tiny, jax.random.key(0)))
    groups = {
        jax.tree_util.keystr(path, simple=True, separator="."): group(path, parameter)
        for path, parameter in jax.tree_util.tree_leaves_with_path(params)
    }
    assert groups == {
        "embed": "embedding",
        "value_embed": "embedding",
        "bigram_embed": "embedding",
        "head": "head",
        "blocks.attention.qkv": "muon",
        "blocks.attention.out": "muon",
        "blocks.mlp.up": "muon",
        "blocks.mlp.down": "muon",
        "blocks.attention.value_mix": "scalar",
        "blocks.shortcut": "scalar",
        "skips": "scalar",
    }


# The schedule


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1.0), (59, 1.0), (60, 1.0), (61, 0.98), (80, 0.6), (99, 0.22), (100, 0.2), (140, 0.2)],
)
def test_rates_are_constant_then_go_linearly_to_the_final_factor(step, factor):
    # The last 40 % of 100 steps go down by 0.8 in all, 0.02 a step.
    assert float(learning_rate_factor(100, 0.4, 0.2, step)) == pytest.approx(factor)
    assert float(learning_rate_factor(100, 0.4, 0.2, jnp.int32(step))) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 1.0), (9, 1.0), (10, 0.1)])
def test_without_a_cooldown_no_step_is_taken_at_less_than_the_full_rate(step, factor):
    assert float(learning_rate_factor(10, 0.0, 0.1, step)) == pytest.approx(factor)


def test_every_group_follows_the_schedule():
    params, gradients = some(0), some(1)
    (full,), _ = updates_of(optimizer_with(), [gradients], params)
    cut = optimizer_with(schedule=lambda step: jnp.array([0.5, 0.125])[step])
    (half, eighth), _ = updates_of(cut, [gradients] * 2, params)
    for name in SHAPES:
        np.testing.assert_allclose(half[name], 0.5 * full[name], rtol=1e-6, err_msg=name)
        # A gradient that stays moves its parameter by as much again, whatever the rule.
        np.testing.assert_allclose(eighth[name], 0.125 * full[name], rtol=1e-3, atol=1e-6)


# Adam


@pytest.mark.parametrize("name", ["embed", "head", "skips"])
def test_the_first_step_of_adam_moves_by_the_rate_of_the_group_against_the_gradient(name):
    gradients = some(1)
    # However small the gradient: at initialisation those of the embeddings are tiny.
    gradients = {key: 1e-6 * (g + np.sign(g)) for key, g in gradients.items()}
    (moved,), _ = updates_of(optimizer_with(), [gradients], some(0))
    np.testing.assert_allclose(moved[name], -RATES[name] * np.sign(gradients[name]), rtol=1e-3)


def test_later_steps_of_adam_are_those_of_kingma_and_ba():
    gradients = [some(seed) for seed in range(1, 6)]
    updates, _ = updates_of(optimizer_with(), gradients, some(0))
    for name in ("embed", "head", "skips"):
        m, v = 0.0, 0.0
        for t, (gradient, moved) in enumerate(zip(gradients, updates, strict=True), start=1):
            g = gradient[name].astype("f8")
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            expected = -RATES[name] * (m / (1 - 0.8**t)) / np.sqrt(v / (1 - 0.95**t))
            np.testing.assert_allclose(moved[name], expected, rtol=1e-4, atol=1e-7)


# Muon


def test_matrices_move_by_muons_rate_along_orthogonal_directions():
    gradients = some(1)
    (moved,), _ = updates_of(optimizer_with(), [gradients], some(0))
    # The singular vectors of the gradient, against it; singular values near the rate times
    # sqrt(outputs / inputs).
    u, _, vt = np.linalg.svd(gradients["up"].astype("f8"), full_matrices=False)
    along = np.einsum("lik,lio,lko->lk", u, moved["up"], vt)
    np.testing.assert_allclose(-along / RATES["up"] / (12 / 8) ** 0.5, 0.9, atol=0.25)
    rest = moved["up"] - u * along[:, None, :] @ vt
    np.testing.assert_allclose(rest, 0, atol=1e-4 * RATES["up"])


def test_momentum_warms_up_from_085():
    gradients = [some(seed) for seed in range(1, 8)]
    decays = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.95]
    _, state = updates_of(optimizer_with(), gradients, some(0))
    mean = 0.0
    for gradient, decay in zip(gradients, decays, strict=True):
        mean = decay * mean + (1 - decay) * gradient["up"].astype("f8")
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MuonState))
    (muon,) = (node for node in nodes if isinstance(node, MuonState))
    np.testing.assert_allclose(muon.momentum["up"], mean, rtol=1e-4, atol=1e-6)


# Weight decay


def test_weight_decay_is_decoupled_and_of_matrices_only():
    params = some(0)
    still = jax.tree.map(np.zeros_like, params)
    halved = {"schedule": lambda step: 0.5}
    for gradients in (some(1), still):
        (without,), _ = updates_of(optimizer_with(**halved), [gradients], params)
        (decayed,), _ = updates_of(optimizer_with(**halved, weight_decay=0.1), [gradients], params)
        # Whatever the gradient, a step shrinks the matrices by the rate times the weight decay.
        np.testing.assert_allclose(
            decayed["up"] - without["up"], -0.5 * RATES["up"] * 0.1 * params["up"], atol=1e-6
        )
        for name in ("embed", "head", "skips"):
            np.testing.assert_array_equal(decayed[name], without[name])
