"""The speedrun preset makes the same steps as the record it follows, up to float32 rounding.

record_2026_05_27.json has the results of modded-nanogpt's train_gpt.py, as its logs of 2026-05-27
(MuddGatedAndDC, this_pr_v3) print it, at the size below, in float64 on a CPU, from the parameters
and tokens generated here. Its kernels were replaced by plain PyTorch, and it was changed as
docs/recipe.md describes: a window counts a query's own key, nothing reads the previous document,
token pairs are hashed by our functions, and the heads of a pair are neighbors.
"""

import json
import zlib
from dataclasses import replace
from functools import cache, partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding

from nanogpt.data.batches import RowOrder, Rows, train_batch
from nanogpt.data.shards import write_shard
from nanogpt.data.validation import ValidationRows
from nanogpt.devices.mesh import REPLICATED, make_mesh
from nanogpt.model.connections import DynamicGates
from nanogpt.schedule import Rates
from nanogpt.training.plan import optimizer_of
from nanogpt.training.step import (
    TrainState,
    graph_of,
    init_params,
    make_eval_step,
    make_train_step,
    param_shapes,
)
from train_gpt import PRESETS

RECORD = json.loads((Path(__file__).parent / "record_2026_05_27.json").read_text())
SPEEDRUN = PRESETS["speedrun"]


def a_sixteenth(windows):
    return windows and tuple(window // 16 for window in windows)


# The preset, 8 times narrower; its stages have 2, 2, 2 and 6 of the 12 steps. (The record splits
# embedding and head after Adam's first step in the third stage, which here is its only one.)
STAGES = tuple(
    replace(
        stage,
        share=share,
        length=length,
        max_document_length=stage.max_document_length and stage.max_document_length // 32,
        split_head=share == 6,
        windows=a_sixteenth(stage.windows),
        validation_windows=a_sixteenth(stage.validation_windows),
    )
    for stage, share, length in zip(
        SPEEDRUN.stages, (2, 2, 2, 6), (1 / 3, 2 / 3, 1, 1), strict=True
    )
)
TINY = replace(
    SPEEDRUN,
    num_steps=12,
    hold_fraction=0.5,
    cooldown_fraction=2 / 3,  # the record's cooldown begins with a whole step
    momentum_warmup_steps=4,
    momentum_cooldown_steps=3,
    total_batch_size=8 * 192,
    sequence_length=192,
    max_document_length=64,
    stages=STAGES,
    model=replace(
        SPEEDRUN.model,
        vocab_size=120,
        num_heads=4,
        width=96,
        mlp_width=384,
        bigram_buckets=640,
        bigram_width=96,
        composed_window=7,
        document_separator=100,
    ),
)

# The distribution of the initial parameters: half its width and its mean.
SPREAD = {
    "embed": (0.05, 0.0),
    "value_embed": (0.3, 0.0),
    "bigram_embed": (0.1, 0.0),
    "smear.gate": (0.3, 0.0),
    "smear.share": (0.1, 0.2),
    "attention.qkv": (0.18, 0.0),
    "attention.out": (0.07, 0.0),
    "attention.own_share": (0.1, 0.5),
    "attention.out_share": (0.1, 1.0),
    "value_gate": (0.3, 0.0),
    "mlp.up": (0.09, 0.0),
    "mlp.down": (0.04, 0.0),
    "residual_shares": (0.05, 1.05),
    "output_shares": (0.1, 1.0),
    "skips": (0.1, -1.5),
    "dynamic.last_layer.up": (0.1, 0.0),
    "dynamic.last_layer.down": (0.3, 0.0),
    "dynamic.before_head.up": (0.1, 0.0),
    "dynamic.before_head.down": (0.3, 0.0),
    "dynamic.early_gates.up": (0.1, 0.0),
    "dynamic.early_gates.down": (0.6, 0.0),
    "dynamic.late_gates.up": (0.1, 0.0),
    "dynamic.late_gates.down": (0.6, 0.0),
}


def numbers(name, shape):
    key = np.array([zlib.crc32(name.encode()), 1], np.uint64)
    uniform = (np.random.Philox(key=key).random_raw(prod(shape)) >> np.uint64(11)) * 2.0**-53
    scale, centre = SPREAD[name]
    return (centre + scale * (2 * uniform - 1)).astype("f4").reshape(shape)


def first_params():
    """Generate the record's parameters in our form: q and k are rotated in halves."""
    flat = partial(traverse_util.flatten_dict, sep=".")
    shapes = flat(param_shapes(TINY.model))
    known = {name: numbers(name, shapes[name].shape) for name in SPREAD}
    # In one program, so that random numbers which nothing reads are not computed.
    init = jax.jit(lambda known: flat(init_params(TINY.model, jax.random.key(0))) | known)
    params = jax.device_get(init(known | {"head": known["embed"].T}))
    # The record turns neighbors in a head of 24, (0, 1), (2, 3), ..., and we (0, 12), (1, 13), ...
    qkv = params["attention.qkv"].reshape(10, 3, 96, 4, 12, 2)
    by_halves = qkv[:, :2].swapaxes(-2, -1).reshape(10, 2, 96, 96)
    params["attention.qkv"] = np.concatenate([by_halves, qkv[:, 2:].reshape(10, 1, 96, 96)], 1)
    return params


def some_documents(seed):
    raw = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(80_000)
    tokens, begins = raw[:40_000] % 100, raw[40_000:] % 40 == 0
    begins[0] = True
    return np.where(begins, 100, tokens).astype(np.uint16)


@cache
def twelve_steps(folder):
    """Return the losses of the steps, the changes of the parameters, and the validation loss."""
    for name, seed in {"train": 7, "val": 8}.items():
        write_shard(folder / f"{name}.bin", some_documents(seed))
    mesh, schedule, optimizer = make_mesh(1, 1), TINY.schedule, optimizer_of(TINY)

    def rows(T, longest, start):
        files = [folder / "train.bin"]
        return Rows(files, T, 0, False, separator=100, max_document=longest or 64, start=start)

    @cache
    def program(stage):
        graph = graph_of(schedule.model(TINY.model, stage))
        tied = schedule.ties_head(TINY.model, stage)
        return make_train_step(graph, optimizer, mesh, "float32", tied_head=tied)

    start = first_params()
    params = traverse_util.unflatten_dict(start, sep=".")
    moments = jax.jit(optimizer.init)(params)
    state = TrainState(np.int32(0), params, moments, *np.zeros((2,), "f4"))
    state = jax.device_put(state, NamedSharding(mesh, REPLICATED))  # as the steps return it
    order, losses = RowOrder(rows, schedule, shuffle=False), []
    for step, its in enumerate(RECORD["steps"], start=1):
        batch = train_batch(*order(step), (1, 8))
        rates = Rates(its["rate"], its["momentum"], tuple(its["target_weights"]))
        state, metrics = program(schedule.stage(step))(state, batch, rates)
        losses.append(float(metrics["loss"]))
    after = traverse_util.flatten_dict(jax.tree.map(np.asarray, state.params), sep=".")

    model = schedule.used(TINY.model, 3)
    held_out = ValidationRows([folder / "val.bin"], 1024, 1024, separator=100, context=160)
    assert len(held_out) == 1
    total = make_eval_step(graph_of(model), mesh, "float32")(state.params, held_out(0, 1))
    return losses, start, after, float(total) / 1024


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return twelve_steps(tmp_path_factory.mktemp("record"))


def test_the_losses_of_twelve_steps_are_the_records(run):
    losses, *_ = run
    np.testing.assert_allclose(losses, [its["loss"] for its in RECORD["steps"]], atol=3e-6)


def test_every_parameter_goes_where_the_record_takes_it(run):
    _, start, after, _ = run
    assert after.keys() == RECORD["parameters"].keys()
    for name, expected in RECORD["parameters"].items():
        change = after[name] - start[name]
        found = {"norm": np.linalg.norm(after[name]), "norm_of_change": np.linalg.norm(change)}
        assert found == pytest.approx(expected, rel=2e-4), name


def test_the_validation_loss_is_the_records(run):
    *_, validation = run
    assert validation == pytest.approx(RECORD["validation_loss"], abs=3e-6)


def test_rates_are_the_records():
    for step, its in enumerate(RECORD["steps"], start=1):
        rate, momentum, weights = TINY.schedule.rates(step)
        assert rate == pytest.approx(its["rate"])
        assert momentum == pytest.approx(its["momentum"])
        assert weights == pytest.approx(its["target_weights"])


def test_the_preset_takes_as_many_tokens_as_the_record():
    # 1,275 steps, a third each of 8, 16 and 24 times 16,384 tokens, and 15 more.
    assert SPEEDRUN.schedule.ends == (425, 850, 1275, 1290)
    assert SPEEDRUN.schedule.tokens(1290) == 16_384 * (425 * (8 + 16 + 24) + 15 * 24)


def test_gates_are_those_of_the_record_in_its_order():
    """The record writes its gates out for six heads; these are their first values."""
    early = np.zeros(26)
    early[12:18] = 0.25  # of attention 3
    early[19:26:2] = 0.05  # bigrams of layers 0 to 3
    late = np.zeros(41)
    late[12:18] = 0.25  # of attention 10
    late[19:28:2] = 0.05  # bigrams of layers 4, 5, 7, 8, 9
    late[28] = 0.5  # the skip
    late[29:35] = 1  # of composed heads: given
    model = SPEEDRUN.model
    assert model.late_gates_from == 4
    for layers, expected in ((range(4), early), (range(4, 11), late)):
        gates = DynamicGates(model, layers, jax.random.key(0))
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 768)), "f4")
        np.testing.assert_allclose(gates(x)[0, 0], expected, atol=1e-6)
        np.testing.assert_allclose(gates(x, 0.2)[0, 0], 2 * expected, atol=1e-6)
        chosen = gates.chosen(x, jnp.float32(0.1))
        assert [each.shape[-1] for each in chosen.values()] == [
            6 if kind in ("exclusion", "gate", "given", "taken") else 1 for kind, _ in chosen
        ]
        together = jnp.concatenate([*chosen.values()], axis=-1)
        np.testing.assert_allclose(together[0, 0], expected, atol=1e-6)
