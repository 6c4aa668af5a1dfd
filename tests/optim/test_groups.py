"""Which rule updates which parameter, and by how much: compared with the papers' formulas."""

import re
from collections import defaultdict
from dataclasses import fields, replace
from functools import cache

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from nanogpt.adam import Adam, AdamGroups
from nanogpt.optim.groups import cautious_decay, group, make_optimizer
from nanogpt.optim.muon import MuonState
from nanogpt.training.step import param_shapes
from tests.conftest import like_the_speedrun, with_every_trick

# One matrix, and parameters for each of Adam's groups.
SHAPES = {
    "up": (2, 8, 12),
    "embed": (6, 8),
    "value_embed": (3, 6, 8),
    "head": (8, 6),
    "skips": (2,),
    "residual_shares": (3, 2),
    "output_shares": (3, 2),
    "embedding_shares": (3,),
    "gate": (2, 3, 4),
    "skip_gate": (1, 3, 1),
    "last_layer.down": (3, 5),
    "before_head.bias": (5,),
    "late_gates.up": (8, 3),
    "early_gates.bias": (4,),
}
RATES = {
    "up": 0.05,
    "embed": 0.3,
    "value_embed": 0.2,
    "head": 0.007,
    "skips": 0.02,
    "residual_shares": 0.06,
    "output_shares": 0.05,
    "embedding_shares": 0.03,
    "gate": 0.04,
    "skip_gate": 0.01,
    "last_layer.down": 0.008,
    "before_head.bias": 0.09,
    "late_gates.up": 0.011,
    "early_gates.bias": 0.013,
}
BY_ADAM = tuple(RATES)[1:]
BETAS = 0.8, 0.95
GROUPS = AdamGroups(
    embedding=Adam(RATES["embed"], BETAS),
    tables=Adam(RATES["value_embed"], BETAS),
    head=Adam(RATES["head"], BETAS),
    scalars=Adam(RATES["skips"], BETAS),
    stream=Adam(RATES["residual_shares"], BETAS),
    additions=Adam(RATES["output_shares"], BETAS),
    shortcuts=Adam(RATES["embedding_shares"], BETAS),
    gates=Adam(RATES["gate"], BETAS),
    skip_gate=Adam(RATES["skip_gate"], BETAS),
    connections=Adam(RATES["last_layer.down"], BETAS),
    connection_biases=Adam(RATES["before_head.bias"], BETAS),
    dynamic_gates=Adam(RATES["late_gates.up"], BETAS),
    dynamic_gate_biases=Adam(RATES["early_gates.bias"], BETAS),
)


def some(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, "f4") for name, shape in SHAPES.items()}


def optimizer_with(**changed):
    settings = dict(
        learning_rate=RATES["up"],
        weight_decay=0.0,
        adam=GROUPS,
    )
    return make_optimizer(**(settings | changed))


@cache
def programs_with(**changed):
    """Return an optimizer's compiled functions, the same for all tests with its settings."""
    optimizer = optimizer_with(**changed)
    return jax.jit(optimizer.init), jax.jit(optimizer.update)


def nested(by_name):
    """Return parameters as the model has them, where "last_layer.down" is one of "last_layer"."""
    return unflatten_dict(by_name, sep=".")


def updates_of(gradients, params, rates=None, momenta=None, **changed):
    """Return the updates of successive steps, and the states before and after them."""
    init, update = programs_with(**changed)
    before = state = init(nested(params))
    updates, programs = [], update._cache_size()
    rates, momenta = rates or [1.0] * len(gradients), momenta or [0.9] * len(gradients)
    for gradient, rate, momentum in zip(gradients, rates, momenta, strict=True):
        now = {"rate": np.float32(rate), "momentum": np.float32(momentum)}
        moved, state = update(nested(gradient), state, nested(params), **now)
        updates.append({name: np.asarray(u) for name, u in flatten_dict(moved, sep=".").items()})
    assert update._cache_size() <= programs + 1  # one program for all rates and momenta
    return updates, before, state


def adam_of_kingma_and_ba(gradients, rate):
    """Return a parameter's updates for these gradients, with betas 0.8 and 0.95."""
    m, v, moved = 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        moved.append(-rate * (m / (1 - 0.8**t)) / np.sqrt(v / (1 - 0.95**t)))
    return moved


# Groups


CONNECTIONS = ("dynamic.last_layer", "dynamic.before_head")
GATES = ("dynamic.early_gates", "dynamic.late_gates")
OF_BOTH = {
    "muon": {"attention.qkv", "attention.out", "mlp.up", "mlp.down"},
    "embedding": {"embed"},
    "head": {"head"},
    "tables": {"value_embed", "bigram_embed"},
    "gates": {"value_gate"},
    "smear_gate": {"smear.gate"},
    "stream": {"residual_shares"},
    "scalars": {"attention.own_share", "attention.out_share", "smear.share", "skips"},
}


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (
            with_every_trick,
            {
                "scalars": {"backout"},
                "gates": {"attention.gate"},
                "skip_gate": {"skip_gate"},
                "shortcuts": {"embedding_shares"},
                "additions": {"bigram_shares"},
            },
        ),
        (
            like_the_speedrun,
            {
                "additions": {"output_shares"},
                "connections": {f"{x}.{y}" for x in CONNECTIONS for y in ("up", "down")},
                "connection_biases": {f"{x}.bias" for x in CONNECTIONS},
                "dynamic_gates": {f"{x}.{y}" for x in GATES for y in ("up", "down")},
                "dynamic_gate_biases": {*(f"{x}.bias" for x in GATES), "dynamic.gate_scale"},
            },
        ),
    ],
)
def test_every_parameter_of_the_model_is_in_its_group(make, more):
    params = param_shapes(make())
    names = defaultdict(set)
    for path, parameter in jax.tree_util.tree_leaves_with_path(params):
        names[group(path, parameter)].add(".".join(key.key for key in path))
    groups = OF_BOTH.keys() | more.keys()
    assert names == {name: OF_BOTH.get(name, set()) | more.get(name, set()) for name in groups}
    assert names.keys() - {"muon"} <= {each.name for each in fields(AdamGroups)}


def test_few_rates_may_serve_all_groups():
    groups = AdamGroups.alike(tables=0.6, head=0.008, others=0.04, betas=(0.9, 0.95))
    rates = {name: how.learning_rate for name, how in vars(groups).items()}
    special = {"embedding": 0.6, "tables": 0.6, "head": 0.008}
    assert rates == dict.fromkeys(rates, 0.04) | special
    assert all((how.betas, how.weight_decay) == ((0.9, 0.95), 0) for how in vars(groups).values())
    assert rates.keys() > {"stream", "additions", "connections", "connection_biases"}


# The rate


def test_every_group_follows_the_rate():
    params, gradients = some(0), some(1)
    (full,), *_ = updates_of([gradients], params)
    (half, eighth), *_ = updates_of([gradients] * 2, params, [0.5, 0.125])
    for name in SHAPES:
        np.testing.assert_allclose(half[name], 0.5 * full[name], rtol=1e-6, err_msg=name)
        # With a constant gradient each rule repeats the same update.
        np.testing.assert_allclose(eighth[name], 0.125 * full[name], rtol=1e-3, atol=1e-6)


# Adam


def test_the_first_step_of_adam_moves_by_the_rate_of_the_group_against_the_gradient():
    gradients = some(1)
    # For any size of the gradient: that of a rare token is 1e-9 of a batch's loss.
    gradients = {key: 1e-6 * (g + np.sign(g)) for key, g in gradients.items()}
    (moved,), *_ = updates_of([gradients], some(0))
    for name in BY_ADAM:
        expected = -RATES[name] * np.sign(gradients[name])
        np.testing.assert_allclose(moved[name], expected, rtol=1e-3, err_msg=name)


def test_later_steps_of_adam_are_those_of_kingma_and_ba():
    gradients = [some(seed) for seed in range(1, 6)]
    updates, *_ = updates_of(gradients, some(0))
    for name in BY_ADAM:
        expected = adam_of_kingma_and_ba([g[name].astype("f8") for g in gradients], RATES[name])
        found = [moved[name] for moved in updates]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_the_state_keeps_its_structure_shapes_and_dtypes():
    # Checkpoints, donation, and skipping a bad batch rely on this.
    _, *states = updates_of([some(1)], some(0))
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states)
    assert before == after


# Muon


def test_matrices_move_by_muons_rate_along_orthogonal_directions():
    gradients = some(1)
    (moved,), *_ = updates_of([gradients], some(0))
    # In the first step each output changes by the same amount: the rate times
    # sqrt(outputs / inputs) times sqrt(inputs / outputs).
    np.testing.assert_allclose(np.linalg.norm(moved["up"], axis=1) / RATES["up"], 1, rtol=0.15)
    # And, except for those sizes, along the gradient's singular vectors, in the opposite direction.
    u, _, vt = np.linalg.svd(gradients["up"].astype("f8"), full_matrices=False)
    orthogonal = -u @ vt
    orthogonal /= np.linalg.norm(orthogonal, axis=1, keepdims=True)
    assert np.sum(moved["up"] / RATES["up"] * orthogonal, axis=1).min() > 0.95


def test_the_momentum_is_that_of_each_step():
    gradients = [some(seed) for seed in range(1, 5)]
    decays = [0.85, 0.875, 0.95, 0.9]
    _, _, state = updates_of(gradients, some(0), momenta=decays)
    mean = 0.0
    for gradient, decay in zip(gradients, decays, strict=True):
        mean = decay * mean + (1 - decay) * gradient["up"].astype("f8")
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MuonState))
    (muon,) = (node for node in nodes if isinstance(node, MuonState))
    np.testing.assert_allclose(muon.momentum["up"], mean, rtol=1e-4, atol=1e-6)


# Weight decay


def test_cautious_decay_shrinks_only_weights_that_the_update_brings_nearer_to_zero():
    updates = {"w": np.array([0.2, -0.2, 0.2, -0.2, 0.0, 0.2], "f4")}
    weights = {"w": np.array([3.0, -3.0, -3.0, 3.0, 3.0, 0.0], "f4")}
    rule = cautious_decay(0.1)
    found, _ = jax.jit(rule.update)(updates, rule.init(weights), weights, rate=0.5)
    # 0.1 * 0.5 * 3 = 0.15 more if both have the same sign.
    np.testing.assert_allclose(found["w"], [0.35, -0.35, 0.2, -0.2, 0, 0.2], rtol=1e-6)


DECAYING = {
    "weight_decay": 3.0,
    "adam": replace(GROUPS, tables=Adam(RATES["value_embed"], BETAS, 2.0)),
}


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_weight_decay_goes_with_the_square_of_the_rate_and_is_that_of_matrices_and_of_each_group(
    rate,
):
    params, gradients = some(0), [some(1)]
    (without,), *_ = updates_of(gradients, params, [rate])
    (decayed,), *_ = updates_of(gradients, params, [rate], **DECAYING)
    # For a matrix [8, 12] also with the factor of its shape, as in modded-nanogpt (2025-11-29).
    for name, strength in {"up": (12 / 8) ** 0.5 * 3.0, "value_embed": 2.0}.items():
        w, u = params[name].astype("f8"), -without[name].astype("f8")
        expected = -strength * (rate * RATES[name]) ** 2 * np.where(u * w > 0, w, 0)
        np.testing.assert_allclose(decayed[name] - without[name], expected, atol=1e-7)
    for name in SHAPES.keys() - {"up", "value_embed"}:
        np.testing.assert_array_equal(decayed[name], without[name])


# Groups that runs of earlier versions do not have


def names_of_adams_groups(state):
    """Return the names of the groups in a state, by which a checkpoint's arrays are found."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    found = (re.search(r"adam\.inner_state\..*inner_states\.(\w+)", name) for name in names)
    return {each[1] for each in found if each}


def test_later_groups_with_the_settings_of_the_scalars_are_trained_and_kept_with_them():
    gradients, params = [some(seed) for seed in range(1, 4)], some(0)
    alike = AdamGroups.alike(tables=0.2, head=0.1, others=0.04, betas=BETAS)
    together, state, _ = updates_of(gradients, params, adam=alike)
    before = {"embedding", "head", "tables", "gates", "smear_gate", "skip_gate", "shortcuts"}
    assert names_of_adams_groups(state) == {*before, "scalars"}

    later = {"stream", "additions", "connections", "connection_biases"}
    later |= {"dynamic_gates", "dynamic_gate_biases"}
    others = {name: Adam(0.04, BETAS, 1e-30) for name in later}
    apart, state, _ = updates_of(gradients, params, adam=replace(alike, **others))
    assert names_of_adams_groups(state) == {*before, "scalars", *later}
    for moved, expected in zip(together, apart, strict=True):
        for name in BY_ADAM:
            np.testing.assert_allclose(moved[name], expected[name], rtol=1e-6, err_msg=name)
    one_apart = optimizer_with(adam=replace(alike, stream=Adam(0.05, BETAS)))
    state = jax.eval_shape(one_apart.init, nested(params))
    assert names_of_adams_groups(state) == {*before, "scalars", "stream"}


# Groups of heads


def test_heads_apart_move_apart_only_among_queries_and_keys():
    random = np.random.default_rng(0)
    gradients, params = (
        {name: random.standard_normal((2, 3, 8, 8), "f4") for name in ("qkv", "up")} for _ in "gp"
    )
    (apart,), *_ = updates_of([gradients], params, head_groups=2)
    (whole,), *_ = updates_of([gradients], params)
    differs = abs(apart["qkv"] - whole["qkv"]).max(axis=(0, 2, 3)) > 0.1 * RATES["up"]
    assert differs.tolist() == [True, True, False]
    np.testing.assert_array_equal(apart["up"], whole["up"])
    groups = apart["qkv"][:, :2].reshape(2, 2, 8, 2, 4)
    sizes = np.linalg.norm(groups, axis=(-3, -1)) / RATES["up"]
    np.testing.assert_allclose(sizes, 4**0.5, rtol=0.1)  # each has four singular values near one


# Adam in every second step


def test_adam_acts_at_every_second_step_on_the_mean_of_both_gradients():
    gradients = [some(seed) for seed in range(1, 7)]
    updates, *_ = updates_of(gradients, some(0), adam_every=2)
    each_step, *_ = updates_of(gradients, some(0))
    for name in BY_ADAM:
        both = [
            (a[name] + b[name].astype("f8")) / 2
            for a, b in zip(gradients[::2], gradients[1::2], strict=True)
        ]
        expected = adam_of_kingma_and_ba(both, RATES[name])
        assert not any(moved[name].any() for moved in updates[::2])
        found = [moved[name] for moved in updates[1::2]]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    for moved, as_ever in zip(updates, each_step, strict=True):
        np.testing.assert_array_equal(moved["up"], as_ever["up"])  # Muon's


# Shapes


def test_matrices_out_of_the_mlps_move_by_their_factor_and_wide_ones_by_the_root_of_their_shape():
    shapes = {"up": (1, 8, 32), "down": (1, 32, 8), "out": (1, 8, 8)}
    rng = np.random.default_rng(0)
    gradients, params = ({n: rng.standard_normal(s, "f4") for n, s in shapes.items()} for _ in "gp")
    (moved,), *_ = updates_of([gradients], params, mlp_out_factor=4.0, neuron_decay=None)
    # Orthogonal directions have singular values of about one, times the rate and the factor.
    for name, factor in {"up": 2.0, "down": 4.0, "out": 1.0}.items():
        sizes = np.linalg.svd(np.asarray(moved[name][0], "f8"), compute_uv=False)
        np.testing.assert_allclose(sizes / (RATES["up"] * factor), 1, atol=0.2, err_msg=name)


def test_without_a_gradient_nothing_moves():
    still = jax.tree.map(np.zeros_like, some(0))
    (moved,), *_ = updates_of([still], some(0), **DECAYING)
    for name in SHAPES:
        np.testing.assert_array_equal(moved[name], 0, err_msg=name)
