"""The plan of a run, made without compiling anything and without a device."""

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from nanogpt.config import ConfigError
from nanogpt.data.dataset import Dataset, Shard
from nanogpt.data.shards import write_shard
from nanogpt.devices.mesh import make_mesh
from nanogpt.runs.description import outlook, table, warnings
from nanogpt.training.plan import Hardware, make_plan, optimizer_of, plan_here
from nanogpt.training.stages import division, with_whole_passes
from nanogpt.training.step import make_init
from train_gpt import PRESETS

H200 = Hardware("NVIDIA H200", 8, 1, 140e9)
SHARDS = Shard("a.bin", 10**9, "0" * 32, None), Shard("b.bin", 10**8, "1" * 32, None)
DATA = Dataset("some", (Path("a.bin"),), (Path("b.bin"),), SHARDS[:1], SHARDS[1:])


def plan_of(preset, hardware=H200, attention="cudnn", **changes):
    return make_plan(
        replace(PRESETS[preset], **changes), hardware, DATA, attention, "some attention"
    )


def test_a_step_has_all_its_tokens_whatever_the_hardware():
    for devices in (1, 2, 8):
        for memory in (None, 16e9, 80e9, 140e9):
            plan = plan_of("speedrun", Hardware("some", devices, 1, memory))
            for number, share in enumerate((1 / 3, 2 / 3, 1, 1)):
                Ng, R = plan.shape(number)
                assert Ng * R * plan.stages[number].row_length == round(393_216 * share)


def test_stages_follow_each_other_through_all_steps():
    stages = plan_of("speedrun").stages
    steps = [step for each in stages for step in range(each.first_step, each.last_step + 1)]
    assert steps == [*range(1, 1291)]
    assert [max(each.model.windows) for each in stages] == [384, 896, 1408, 1664]
    assert [max(each.used_model.windows) for each in stages] == [384, 896, 1408, 2560]
    assert [each.tied_head for each in stages] == [True, True, False, False]
    assert [each.row_length for each in stages] == [16_384] * 4


def test_saves_are_due_by_steps_by_minutes_and_with_keep_best_at_every_validation():
    plan = plan_of("baseline", num_steps=1000, checkpoint_every=400, val_loss_every=250)
    assert [step for step in range(1, 1001) if plan.saves(step)] == [400, 800, 1000]
    assert not plan.saves(401, minutes=1e9)
    best = replace(plan, hp=replace(plan.hp, keep_best=True))
    assert [step for step in range(1, 1001) if best.saves(step)] == [250, 400, 500, 750, 800, 1000]
    assert outlook(best)["checkpoints"].startswith("6 of ")
    assert "the newest 2 and the best are kept, up to" in outlook(best)["checkpoints"]
    timed = replace(plan, hp=replace(plan.hp, checkpoint_minutes=5.0))
    assert [timed.saves(401, minutes) for minutes in (4.9, 5.0)] == [False, True]
    assert outlook(timed)["checkpoints"].endswith("; plus one every 5 minutes")


def test_processes_do_not_save_by_their_clocks():
    with pytest.raises(ConfigError, match=r"^checkpoint_minutes .* 2 processes.*\.$"):
        plan_of("baseline", Hardware("some", 8, 2, 80e9), checkpoint_minutes=5.0)


def test_smaller_micro_batches_are_more_of_them():
    plan = plan_of("baseline", batch_size=64)
    assert plan.shape(0) == (1, 512)
    assert plan.smaller().smaller().shape(0) == (4, 128)
    assert plan.shape(0) == (1, 512)  # a plan does not change
    with pytest.raises(FrozenInstanceError):
        plan.batch_size = 1


def test_less_memory_means_fewer_rows_then_rematerialization():
    # Parameters, gradients and optimizer state of gpt2-xl are 20 GB.
    one = replace(H200, count=1)
    plans = [plan_of("gpt2-xl", replace(one, memory=gb * 1e9)) for gb in (140, 60, 27)]
    assert plans[0].batch_size > plans[1].batch_size >= 1
    assert [plan.kernels.rematerialize for plan in plans] == [False, False, True]
    for plan in plans:
        assert plan.device_bytes <= 15 / 16 * plan.hardware.memory


def test_the_speedrun_fits_eight_tpus_of_16_gb_but_not_one():
    v5e = Hardware("TPU v5 lite", 8, 1, 15.75 * 2**30)
    plan = plan_of("speedrun", v5e, "splash")
    # What XLA plans for the program of the last stage is in docs/tpu.md. Eight devices shard the
    # tables, and need no recomputation.
    assert plan.batch_size == 1
    assert (plan.shard_params, plan.kernels.rematerialize) == (False, False)
    assert plan.device_bytes < 0.92 * v5e.memory
    alone = plan_of("speedrun", replace(v5e, count=1), "splash")
    assert alone.kernels.rematerialize
    assert alone.device_bytes > v5e.memory


def test_parameters_are_sharded_if_a_row_would_not_fit_otherwise_and_they_can_be_evenly():
    devices = replace(H200, count=8)
    shard = [plan_of("gpt2-xl", replace(devices, memory=gb * 1e9)).shard_params for gb in (60, 27)]
    assert shard == [False, True]
    assert plan_of("gpt2-xl", devices, shard_params=True).shard_params
    seven = plan_of(  # of which none holds the same part of 50,304 ids
        "gpt2-xl", replace(H200, count=7, memory=27e9), total_batch_size=7 * 1024 * 64
    )
    assert (seven.shard_params, seven.kernels.rematerialize) == (False, True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(4, False), (2, False), (1, False), (1, True)]),
        ({"rematerialize": True}, [(4, True), (2, True), (1, True)]),
        ({"rematerialize": False}, [(4, False), (2, False), (1, False)]),
    ],
)
def test_what_fails_for_want_of_memory_is_tried_with_fewer_rows_then_rematerialized(
    changes, expected
):
    plan, found = plan_of("baseline", batch_size=4, **changes), []
    while plan:
        found.append((plan.batch_size, plan.kernels.rematerialize))
        smaller = plan.smaller()
        assert smaller is None or smaller.activation_bytes < plan.activation_bytes
        plan = smaller
    assert found == expected


@pytest.mark.parametrize("mesh", [None, "data=4,model=2"])
@pytest.mark.parametrize("shard_params", [False, True])
@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_gradients_and_copies_have_the_size_that_they_have_in_the_step(
    mesh, shard_params, dtype, itemsize
):
    # Devices cannot share the rows of models whose heads need whole value embeddings.
    names = ("value_layers", "exclusive", "gated", "composed")
    own = dict.fromkeys(names, ()) | {"dynamic": False} if mesh else {}
    c = replace(PRESETS["speedrun"].model, paired_heads=(), **own)
    plan = plan_of("speedrun", mesh=mesh, shard_params=shard_params, model=c, dtype=dtype)
    sharers = plan.sharers
    V, D = c.padded_vocab_size, c.width
    matrices = 10 * 4 * D * D + 11 * 2 * D * c.mlp_width  # divided among those that share a row
    of_values, others = 5 * V * D, V * D + c.bigram_buckets * D
    gradients = 4 * ((matrices + of_values) / sharers + others + V * D)
    copies = itemsize * (matrices / sharers + V * D)  # of the head, too
    # Tables are gathered; all but the embedding are sent, and stay, in the run's dtype.
    copies += itemsize * (of_values / sharers + others - V * D) + 4 * V * D
    assert plan.working_bytes == pytest.approx(gradients + copies, rel=1e-3)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [(None, (8, 1)), ("model=2", (4, 2)), ("data=4,model=2", (4, 2)), ("data=8", (8, 1))],
)
def test_devices_are_divided_as_the_mesh_says(mesh, expected):
    assert division(mesh, 8) == expected


@pytest.mark.parametrize(
    ("mesh", "told"), [("data=2", "6 of 8 devices idle"), ("model=16", "needs 16")]
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, told):
    with pytest.raises(ConfigError, match=told):
        division(mesh, 8)


@pytest.mark.parametrize(("together", "groups"), [(1, 4), (2, 2), (4, 1), (None, 1)])
def test_muon_orthogonalizes_queries_and_keys_of_so_many_heads_together(together, groups):
    model = replace(PRESETS["laptop"].model, num_heads=4, width=96)
    hp = replace(PRESETS["laptop"], heads_together=together, model=model)
    hp.check()
    state = jax.eval_shape(make_init(hp.model, optimizer_of(hp), make_mesh(1)), jax.random.key(0))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(state.opt_state)
    }
    of_heads = [shape for name, shape in shapes.items() if "square.attention.qkv" in name]
    # The mean squares of neurons: outputs of whole matrices, inputs of those of a few heads.
    whole = [(3, 3, 1, 96)]
    parts = [(3, 2, groups, 96, 1), (3, 1, 1, 96)]
    assert of_heads == (whole if groups == 1 else parts)


@pytest.mark.parametrize("shard_params", [False, True])
def test_the_state_has_the_size_that_it_has_on_the_devices(shard_params):
    model = replace(PRESETS["laptop"].model, paired_heads=())
    changes = {"shard_params": shard_params, "mesh": "data=4,model=2", "model": model}
    plan = plan_of("laptop", Hardware("cpu", 8, 1, None), "xla", **changes)
    hp, mesh = plan.hp, make_mesh(4, 2)
    init = make_init(hp.model, optimizer_of(hp, mesh, shard_params), mesh, shard_params)
    state = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)
    assert plan.device_state_bytes == pytest.approx(here, abs=16)  # a few counters
    assert plan.state_bytes == pytest.approx(sum(x.size * x.dtype.itemsize for x in state), abs=16)


def test_where_a_step_has_fewer_rows_than_batch_size_for_each_device_there_are_fewer():
    laptop = plan_of("laptop", total_batch_size=2048, batch_size=4)
    assert (laptop.batch_size, laptop.readers, laptop.shape(0)) == (2, 8, (1, 16))


@pytest.mark.parametrize(
    ("preset", "devices", "rows"),
    [
        ("laptop", 8, 32),
        ("laptop", 3, 36),  # 4 rows for each of 3 devices, 3 times
        ("laptop", 6, 24),
        ("speedrun", 8, 24),
        ("speedrun", 3, 27),  # in the stages 9, 18 and 27
        ("speedrun", 5, 30),  # 10, 20 and 30
        ("baseline", 7, 511),
    ],
)
def test_the_nearest_batch_is_found_that_any_number_of_devices_can_share(preset, devices, rows):
    hp = with_whole_passes(PRESETS[preset], devices)
    assert hp.total_batch_size == rows * hp.sequence_length
    assert replace(hp, total_batch_size=PRESETS[preset].total_batch_size) == PRESETS[preset]


def test_no_more_is_validated_on_than_there_is_and_that_is_said(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(2000) % 256)
    files = str(tmp_path / "a.bin")
    hp = replace(PRESETS["laptop"], train_files=files, val_files=files, batch_size=1)
    plan = plan_here(hp)
    assert plan.hp.val_tokens == 1999  # the first is only read
    assert "val_tokens is reduced from 262,144 to 1,999, all there are" in plan.dataset.warnings
    assert plan_here(replace(hp, val_tokens=5)).hp.val_tokens == 5


def test_what_is_due_is_due_at_its_interval_and_at_the_end():
    plan = plan_of("baseline", num_steps=10, val_loss_every=4, checkpoint_every=0)
    assert [step for step in range(1, 11) if plan.validates(step)] == [4, 8, 10]
    assert [step for step in range(1, 11) if plan.saves(step)] == [10]


def test_the_outlook_tells_epochs_stages_memory_and_disk():
    told = table(plan_of("speedrun")) | outlook(plan_of("speedrun"))
    assert told["devices"] == "8 x NVIDIA H200"
    assert told["tokens"].endswith(" in 1,290 steps, 0.34 epochs")  # of 10^9 tokens
    assert told["stage 1"].startswith("steps 1 to 425, 131,072 tokens each, ")
    state = plan_of("speedrun").state_bytes
    assert f"3 of {state / 1e9:.1f} GB" in told["checkpoints"]
    assert f"up to {3 * state / 1e9:.1f} GB on disk" in told["checkpoints"]


def test_a_bfloat16_run_on_a_gpu_that_cannot_multiply_it_is_told_so_in_a_sentence():
    t4 = Hardware("Tesla T4", 1, 1, 14.4e9, bfloat16=False)
    (line,) = warnings(plan_of("baseline", t4, "xla"))
    assert line.startswith("WARNING: Tesla T4 has no bfloat16 units")
    assert line.endswith("use --dtype float32.")
    assert warnings(plan_of("baseline", t4, "xla", dtype="float32")) == []
    assert warnings(plan_of("baseline", Hardware("NVIDIA L4", 1, 1, 21.6e9))) == []
