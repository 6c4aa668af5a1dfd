"""Sharded parameters, shared heads and MLPs: the losses are still those of one device."""

import re
from dataclasses import replace
from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from nanogpt.adam import AdamGroups
from nanogpt.config import ConfigError, GPTConfig, Kernels, mesh_axes
from nanogpt.devices.mesh import BATCH, ROWS, make_mesh
from nanogpt.devices.sharding import ROUNDED, check_shared, shardings, specs
from nanogpt.optim.groups import make_optimizer
from nanogpt.training.step import (
    TrainState,
    graph_of,
    make_eval_step,
    make_init,
    make_train_step,
    param_shapes,
)
from tests.training.test_step import (
    RATES,
    T,
    collectives,
    copied,
    placed,
    some_rows,
    train_plainly,
)

# Pairs of heads for four devices, and every trick with heads and values. Skips are not gated: at
# first the gradients of such gates are rounding errors, which Adam turns into full-size steps.
CONFIG = GPTConfig(
    vocab_size=100,
    num_layers=3,
    num_heads=8,
    width=32,
    mlp_width=64,
    mlp_only=(1,),
    windows=(8, 24),
    value_embeddings=2,
    bigram_buckets=64,
    key_offset=(0,),
    paired_heads=(2,),
    backout=1,
)
# What came later, the last two for data parallelism only.
LATE = {"backout": None, "attention_source": 0, "exclusive": (0,), "bigram_width": 16}
NEW = replace(CONFIG, **LATE, skips=((0, 2),), value_layers=(0, 2), dynamic=True)
WEIGHTS = (1.0, 0.5)
TABLES = ("embed", "value_embed", "bigram_embed")


def optimizer_on(mesh, shard_params, head_groups):
    return make_optimizer(
        learning_rate=0.05,
        weight_decay=1.0,
        adam=AdamGroups.alike(tables=0.15, head=0.008, others=0.04, betas=(0.8, 0.95)),
        head_groups=head_groups,
        mesh=mesh,
        shard_params=shard_params,
    )


def weighted(rates):
    return rates._replace(target_weights=WEIGHTS)


@cache
def compiled(data, model=1, shard_params=False, micro_batches=1, config=CONFIG, head_groups=1):
    """Return a step, its initial state, and its mesh."""
    mesh = make_mesh(data, model)
    optimizer = optimizer_on(mesh, shard_params, head_groups)
    state = make_init(config, optimizer, mesh, shard_params)(jax.random.key(0))
    graph = graph_of(config, Kernels(tensor_parallel=model > 1))
    train_step = make_train_step(graph, optimizer, mesh, "float32", shard_params=shard_params)
    batch = placed(mesh, BATCH, some_rows(1).reshape(micro_batches, -1, T + 1))
    return train_step.lower(state, batch, weighted(RATES[0])).compile(), state, mesh


def train(data, model=1, shard_params=False, micro_batches=1, **more):
    """Return the metrics of every step, and the last state."""
    step, state, mesh = compiled(data, model, shard_params, micro_batches, **more)
    state, metrics = copied(state), []
    for rows, rates in zip(some_rows(), RATES, strict=True):
        batch = placed(mesh, BATCH, rows.reshape(micro_batches, -1, T + 1))
        state, found = step(state, batch, weighted(rates))
        metrics.append((float(found["loss"]), float(found["grad_norm"])))
    return np.array(metrics), state


@cache
def alone():
    """Return the evaluation on one device."""
    return make_eval_step(graph_of(CONFIG), make_mesh(1), "float32")


# The same losses


@pytest.mark.parametrize(
    ("data", "model", "shard_params", "micro_batches"),
    [
        (4, 1, True, 2),
        (2, 4, False, 2),
        (4, 2, True, 1),
    ],
)
def test_losses_and_gradients_are_those_of_one_device(data, model, shard_params, micro_batches):
    plain = train_plainly(WEIGHTS, CONFIG)
    metrics, state = train(data, model, shard_params, micro_batches)
    np.testing.assert_allclose(metrics, plain, rtol=1e-5)
    assert np.ptp(metrics[:, 0]) > 0.1

    # So is the loss on other rows, some of which end early.
    rows = some_rows(1, seed=5)[0]
    rows[2, 9:] = -1
    mesh, graph = make_mesh(data, model), graph_of(CONFIG, Kernels(tensor_parallel=model > 1))
    V = CONFIG.padded_vocab_size  # some ids cannot follow some others
    mask = np.random.default_rng(6).integers(0, 256, (V, V // 8), np.uint8)
    found = make_eval_step(graph, mesh, "float32", shard_params)(
        state.params, placed(mesh, ROWS, rows), mask
    )
    whole = jax.tree.map(np.asarray, state.params)
    expected = alone()(whole, placed(make_mesh(1), ROWS, rows), mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_tables_and_within_documents_late_and_exclusive_attentions_are_shared_like_others():
    config = replace(CONFIG, value_embeddings=0, document_separator=3, **LATE)
    metrics, _ = train(2, 4, config=config)
    np.testing.assert_allclose(metrics, train_plainly(WEIGHTS, config), rtol=1e-5)


def test_dynamic_connections_and_groups_of_heads_do_not_depend_on_shards():
    sharded, _ = train(4, 1, True, config=NEW, head_groups=4)
    plain, _ = train(1, config=NEW, head_groups=4)
    np.testing.assert_allclose(sharded[:2], plain[:2], rtol=1e-5)
    # Then Adam has made full-size steps of gradients that are rounding errors, those of gates.
    np.testing.assert_allclose(sharded, plain, rtol=2e-3)


def test_the_gradient_of_each_parameter_is_that_of_one_device():
    # With random parameters, since many initial ones are zero.
    config = replace(CONFIG, skips=((0, 2),), value_gate=False)
    mesh, rows = make_mesh(2, 4), some_rows(1)[0]
    shapes = param_shapes(config)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda p: random.normal(0, 0.3, p.shape).astype("f4"), shapes)

    def loss(params):
        model = nnx.merge(graph_of(config), params)
        return model.loss(rows[:, :-1], rows[:, 1:], WEIGHTS)[0].sum()

    expected = jax.jit(jax.grad(loss))(params)
    in_its_place = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda gradients, state, params, **_: (optax.tree.sub(gradients, params), state),
    )
    state = TrainState(jnp.int32(0), params, optax.EmptyState(), *jnp.zeros(2))
    state = jax.device_put(state, shardings(state, mesh, shard_params=True))
    graph = graph_of(config, Kernels(tensor_parallel=True))
    step = make_train_step(graph, in_its_place, mesh, "float32", shard_params=True)
    state, _ = step(state, placed(mesh, BATCH, rows[None]), weighted(RATES[0]))
    for (path, found), want in zip(
        jax.tree.leaves_with_path(state.params), jax.tree.leaves(expected), strict=True
    ):
        name, size = jax.tree_util.keystr(path), np.abs(want).max()
        assert size > 1e-3, name
        np.testing.assert_allclose(found, want, atol=1e-4 * size + 1e-6, err_msg=name)


# Which device holds what


def test_each_device_holds_its_part_of_parameters_and_of_the_optimizers_state():
    _, state = train(4, 2, True)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    shares = {
        jax.tree_util.keystr(path): leaf.nbytes / leaf.addressable_shards[0].data.nbytes
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    for name in ("qkv", "out", "up", "down", "value_embed"):
        of_name = {
            share
            for path, share in shares.items()
            if f"['{name}']" in path and "neuron" not in path
        }
        assert of_name == {8}, name
    for name in (
        "['embed']",
        "['head']",
        "['bigram_embed']",
    ):  # Adam's moments are sharded like these
        assert {s for path, s in shares.items() if name in path and "inner" not in path} == {4}
    each = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert each < whole / 3.5


def test_without_shard_params_what_heads_and_mlps_share_and_what_is_large_in_adam_is_in_parts():
    _, state, _ = compiled(2, 4, False, 2)
    parts = {
        path[-1].key
        for path, leaf in jax.tree.leaves_with_path(state.params)
        if not leaf.sharding.is_fully_replicated
    }
    assert parts == {"qkv", "out", "gate", "up", "down", "value_gate", *TABLES, "head"}


def test_layouts_name_every_large_parameter():
    shapes = param_shapes(CONFIG)
    for path, spec in jax.tree.leaves_with_path(
        specs(shapes, make_mesh(2), shard_params=True), is_leaf=lambda x: isinstance(x, P)
    ):
        leaf = shapes
        for key in path:
            leaf = leaf[key.key]
        divided = any(axes and "data" in axes for axes in spec)
        assert divided == (leaf.size > 1000), path


# Communication


def test_tables_that_are_sent_in_bfloat16_are_rounded_to_it_wherever_they_are_used():
    shapes = param_shapes(NEW)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda p: random.normal(0, 0.3, p.shape).astype("f4"), shapes)
    step = make_eval_step(graph_of(NEW), mesh := make_mesh(1), "bfloat16")

    def loss(*rounded):
        changed = {name: params[name].astype(jnp.bfloat16).astype("f4") for name in rounded}
        return float(step(params | changed, placed(mesh, ROWS, some_rows(1)[0])))

    assert ROUNDED and loss(*ROUNDED) == loss()
    assert loss("embed") != loss()


def test_parameters_in_parts_are_gathered_and_their_gradients_scattered_once_per_step():
    program, state, _ = compiled(4, 1, True, 2)
    inside, outside = collectives(program)
    assert inside == []
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params) if leaf.size > 1000]
    whole = sum(size for operation, size in outside if operation == "all-gather")
    assert whole == sum(sizes)  # and none for Muon, which exchanges shards
    scattered = sum(size for operation, size in outside if operation == "reduce-scatter")
    assert scattered == sum(sizes) // 4
    reduced = sum(size for operation, size in outside if operation == "all-reduce")
    assert reduced < sum(sizes) / 20  # of replicated parameters, and for Muon


def test_devices_that_share_heads_and_mlps_sum_twice_per_layer_in_either_direction():
    program, _, _ = compiled(2, 4, False, 2)
    inside, _ = collectives(program)
    stream = prod((2, T, CONFIG.width))
    sums = [size for operation, size in inside if operation == "all-reduce"]
    # Two attentions and three MLPs, forward and backward, and the features that are scored.
    assert sum(sums) == stream * (2 * (2 + 3) + 1)
    assert {operation for operation, _ in inside} == {"all-reduce"}


# Refused shardings


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        (None, {}),
        ("model=2", {"model": 2}),
        ("data=4", {"data": 4, "model": 1}),
        ("data=4,model=2", {"data": 4, "model": 2}),
    ],
)
def test_a_mesh_is_named_by_its_axes(text, axes):
    assert mesh_axes(text) == axes


@pytest.mark.parametrize("text", ["", "8", "data=0", "model=2,data=4", "data=4,model=x", "a=2"])
def test_a_mesh_of_other_words_is_refused(text):
    with pytest.raises(
        ConfigError, match=re.escape(f"such as data=4,model=2 or model=2, not {text!r}")
    ):
        mesh_axes(text)


def test_a_mesh_takes_the_devices_it_names_or_all():
    assert dict(make_mesh().shape) == {"data": 8, "model": 1}
    assert dict(make_mesh(model=2).shape) == {"data": 4, "model": 2}
    assert dict(make_mesh(2, 2).shape) == {"data": 2, "model": 2}
    with pytest.raises(ConfigError, match="data=4,model=4 needs 16 devices, but JAX finds 8"):
        make_mesh(4, 4)


@pytest.mark.parametrize(
    ("changed", "T", "told"),
    [
        ({"num_heads": 4, "paired_heads": ()}, 16, "num_heads: 4"),
        ({"num_heads": 8}, 16, "Pairs of heads .num_heads / 2.: 4"),
        ({"num_heads": 16, "width": 64, "mlp_width": 60}, 16, "mlp_width: 60"),
        ({"num_heads": 16, "width": 64}, 12, "Tokens per row: 12"),
    ],
)
def test_what_devices_cannot_share_is_named(changed, T, told):
    with pytest.raises(ConfigError, match=f"{told} cannot be split over 8 devices"):
        check_shared(replace(CONFIG, **changed), [64, T], 8)


@pytest.mark.parametrize("changed", [{"value_layers": (0, 2)}, {"dynamic": True}])
def test_heads_that_read_whole_value_embeddings_are_not_split(changed):
    check_shared(replace(CONFIG, **changed), [64], 1)
    with pytest.raises(ConfigError, match="cannot be split over 2 devices along model"):
        check_shared(replace(CONFIG, **changed), [64], 2)


def test_what_cannot_be_divided_is_named():
    shapes = param_shapes(CONFIG)
    with pytest.raises(ConfigError, match=r"128 rows or columns of embed .* data=3: .* shard_par"):
        shardings({"embed": shapes["embed"]}, make_mesh(3), shard_params=True)
    whole = shardings(shapes, make_mesh(3), shard_params=False)
    assert all(each.is_fully_replicated for each in jax.tree.leaves(whole))
