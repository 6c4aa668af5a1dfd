"""Sharded parameters, shared heads and MLPs: the losses are still those of one device."""

import re
from dataclasses import replace
from functools import cache, partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from nanogpt.config import ConfigError, GPTConfig, Kernels, mesh_axes
from nanogpt.devices.mesh import BATCH, ROWS, make_mesh
from nanogpt.devices.sharding import ROUNDED, check_shared, shardings, specs
from nanogpt.optim.muon import scale_by_muon
from nanogpt.training.step import (
    TrainState,
    graph_of,
    make_eval_step,
    make_train_step,
    param_shapes,
)
from tests.training.test_step import (
    RATES,
    T,
    collectives,
    first_state,
    placed,
    some_optimizer,
    some_rows,
    state_on,
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
UNGATED = replace(CONFIG, skips=((0, 2),), value_gate=False)
# What came later, without tables and within documents, or for data parallelism only.
LATE = replace(CONFIG, backout=None, attention_source=0, bigram_width=16)
FOR_DATA = {"skips": ((0, 2),), "value_layers": (0, 2), "dynamic": True, "exclusive": (0,)}
WITHIN, NEW = replace(LATE, value_embeddings=0, document_separator=3), replace(LATE, **FOR_DATA)
WEIGHTS = (1.0, 0.5)
TABLES = ("embed", "value_embed", "bigram_embed")


def weighted(rates):
    return rates._replace(target_weights=WEIGHTS)


def parts_of(tree):
    """Return the shape of a device's part of each array."""
    return [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree)]


def random_params(config):
    """Return parameters of which none is zero, as many initial ones are."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda p: random.normal(0, 0.3, p.shape).astype("f4"), param_shapes(config))


def graph_on(mesh, config):
    return graph_of(config, Kernels(tensor_parallel=mesh.shape["model"] > 1))


@cache
def compiled(data, model=1, shard_params=False, micro_batches=1, config=CONFIG):
    """Return a step, its initial state, and its mesh."""
    mesh = make_mesh(data, model)
    optimizer = some_optimizer(mesh=mesh, shard_params=shard_params)
    state = state_on(mesh, first_state(config), shard_params)
    graph = graph_on(mesh, config)
    train_step = make_train_step(graph, optimizer, mesh, "float32", shard_params=shard_params)
    batch = placed(mesh, BATCH, some_rows(1).reshape(micro_batches, -1, T + 1))
    return train_step.lower(state, batch, weighted(RATES[0])).compile(), state, mesh


# The same losses


@pytest.mark.parametrize(
    ("data", "model", "shard_params", "micro_batches"), [(4, 1, True, 2), (2, 4, False, 2)]
)
def test_losses_and_gradients_are_those_of_one_device(data, model, shard_params, micro_batches):
    step, state, mesh = compiled(data, model, shard_params, micro_batches)
    before, metrics = parts_of(state), []
    state = state_on(mesh, state, shard_params)
    for rows, rates in zip(some_rows(), RATES, strict=True):
        batch = placed(mesh, BATCH, rows.reshape(micro_batches, -1, T + 1))
        state, found = step(state, batch, weighted(rates))
        metrics.append((float(found["loss"]), float(found["grad_norm"])))
    np.testing.assert_allclose(metrics, train_plainly(WEIGHTS, CONFIG), rtol=1e-5)
    assert np.ptp(metrics, axis=0)[0] > 0.1
    assert parts_of(state) == before


def test_the_loss_of_rows_that_end_early_is_that_of_one_device():
    params, rows = random_params(CONFIG), some_rows(1, seed=5)[0]
    rows[2, 9:] = -1
    V = CONFIG.padded_vocab_size  # some ids cannot follow some others
    mask = np.random.default_rng(6).integers(0, 256, (V, V // 8), np.uint8)

    def loss(mesh, shard_params):
        step = make_eval_step(graph_on(mesh, CONFIG), mesh, "float32", shard_params)
        return step(state_on(mesh, params, shard_params), placed(mesh, ROWS, rows), mask)

    np.testing.assert_allclose(loss(make_mesh(4, 2), True), loss(make_mesh(1), False), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "data", "model", "shard_params"),
    [(UNGATED, 4, 2, True), (WITHIN, 2, 4, False), (NEW, 4, 1, True)],
    ids=["skips without gates", "late attentions within documents", "dynamic connections"],
)
def test_the_gradient_of_each_parameter_is_that_of_one_device(config, data, model, shard_params):
    params, mesh, rows = random_params(config), make_mesh(data, model), some_rows(1)[0]

    def loss(params):
        model = nnx.merge(graph_of(config), params)
        return model.loss(rows[:, :-1], rows[:, 1:], WEIGHTS)[0].sum()

    expected = jax.jit(jax.grad(loss))(params)
    in_its_place = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda gradients, state, params, **_: (optax.tree.sub(gradients, params), state),
    )
    state = TrainState(np.int32(0), params, optax.EmptyState(), *np.zeros(2, "f4"))
    step = make_train_step(
        graph_on(mesh, config), in_its_place, mesh, "float32", shard_params=shard_params
    )
    state, _ = step(
        state_on(mesh, state, shard_params), placed(mesh, BATCH, rows[None]), weighted(RATES[0])
    )
    for (path, found), want in zip(
        jax.tree.leaves_with_path(state.params), jax.tree.leaves(expected), strict=True
    ):
        name, size = jax.tree_util.keystr(path), np.abs(want).max()
        assert size > 1e-3, name
        np.testing.assert_allclose(found, want, atol=1e-4 * size + 1e-6, err_msg=name)


def test_muon_by_groups_of_heads_does_not_depend_on_shards():
    random = np.random.default_rng(0).standard_normal
    whole = {"attention": {"qkv": random((2, 3, 32, 32), "f4"), "out": random((2, 32, 32), "f4")}}

    def updates(gradients, **how):
        muon = scale_by_muon(head_groups=4, **how)
        return jax.jit(lambda g: muon.update(g, muon.init(g), momentum=0.9)[0])(gradients)

    parts = state_on(mesh := make_mesh(4, 2), whole, shard_params=True)
    shared, plain = updates(parts, mesh=mesh, shard_params=True), updates(whole)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), shared, plain)


# Which device holds what


def test_each_device_holds_its_part_of_parameters_and_of_the_optimizers_state():
    state = state_on(make_mesh(4, 2), first_state(CONFIG), shard_params=True)
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
    params = random_params(NEW)
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
