"""The main job end to end: a few small runs as a user starts them, and messages about mistakes.

Runs used by several tests are trained once: see small_runs.py.
"""

import ast
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tyro
from flax import nnx

import nanogpt.devices.processes
import nanogpt.training.plan
import nanogpt.training.programs
import train_gpt
from nanogpt.adam import Adam, AdamGroups
from nanogpt.config import ConfigError, GPTConfig
from nanogpt.data.shards import write_shard
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference.weights import load_run
from nanogpt.runs.description import heading
from nanogpt.schedule import Stage
from nanogpt.training.plan import plan_here
from nanogpt.training.step import graph_of
from tests.programs import as_a_user_starts_it, run_to_end
from tests.run_folders import TIMES, mean_loss
from tests.small_runs import (
    SMALL,
    STAGE_ENDS,
    STAGED_STAGES,
    STAGED_STEPS,
    STAGED_VAL_TOKENS,
    TOKENS_PER_STEP,
    VAL_TOKENS,
    T,
    shared_folder,
    trained,
)
from train_gpt import PRESETS, Hyperparameters

# A run


def test_a_run_leaves_its_configuration_log_metrics_and_weights(base):
    names = {file.name for file in base.folder.iterdir()}
    assert names == {
        *("checkpoints", "config.json", "run.json", "holder", "lock", "log.txt", "loss.png"),
        "metrics.jsonl",
    }
    config = json.loads((base.folder / "config.json").read_text())
    assert config.keys() == {field.name for field in fields(Hyperparameters)}
    assert config["model"].keys() == {field.name for field in fields(GPTConfig)}
    assert (config["preset"], config["total_batch_size"]) == ("laptop", TOKENS_PER_STEP)
    assert config["model"]["width"] == 32
    repeat = json.loads((base.folder / "run.json").read_text())
    assert repeat["jax"] == jax.__version__
    assert "train_gpt.py" in repeat["command"]
    assert repeat["config"] == config
    (train,), (val,) = repeat["data"]["train"], repeat["data"]["val"]
    assert (train["name"], val["name"]) == ("train_000000.bin", "val_000000.bin")
    assert f"{train['tokens']:,} tokens" in repeat["data"]["name"]
    assert re.fullmatch(r"[0-9a-f]{32}", train["sample"]) and train["sample"] != val["sample"]


def test_the_first_line_names_preset_data_devices_and_accumulation(base):
    first = base.console[0]
    assert first.startswith("laptop preset | embedded corpus ")
    assert re.search(r"\| 1 x .*cpu.* \| Ng = .* = 1$", first)


def test_the_log_is_the_console(base):
    # The sample may have bytes that a console does not show.
    log, console = (lines[: lines.index("sample:")] for lines in (base.log, base.console))
    assert log == console
    assert not any("\x1b" in line for line in base.console + base.log)


def test_a_table_tells_of_the_run_before_its_first_step_and_another_at_its_end(base):
    steps = [at for at, line in enumerate(base.console) if line.startswith("step ")]
    first, last = base.console[: steps[0]], base.console[steps[-1] + 1 :]
    before, after = (
        dict(re.findall(r"^([a-z ]+): (.+)$", "\n".join(x), re.M)) for x in (first, last)
    )
    _, _, params, _ = load_run(base.folder, make_mesh(1))
    assert before["parameters"] == f"{sum(p.size for p in jax.tree.leaves(params)):,}"
    assert before["preset"] == "laptop"
    assert before["run"] == "runs/base"
    assert before["devices"] == "1 x cpu"
    assert re.fullmatch(
        rf"{6 * TOKENS_PER_STEP:,} in 6 steps, \d\.\d+e-05 epochs", before["tokens"]
    )
    assert before["batch"].endswith(" = 1")
    assert before["attention"] == "XLA attention (cpu)"
    assert before["dtype"] == "float32"
    assert before["model"] == "2 layers, width 32, 2 heads"
    assert before["data"].startswith("embedded corpus ")
    assert re.fullmatch(r"about \d+\.\d GB per device", before["memory"])
    assert re.fullmatch(r"about \d+:\d\d:\d\d to train", before["time"])
    losses = dict(re.findall(r"(\w+) (\d\.\d{4})", after["final loss"]))
    assert float(losses["train"]) == pytest.approx(base.metrics[-1]["train_loss"], abs=6e-5)
    assert float(losses["val"]) == pytest.approx(base.metrics[-1]["val_loss"], abs=6e-5)
    assert after["tokens"] == f"{6 * TOKENS_PER_STEP:,}"
    spent = dict(re.findall(r"(\w+) (\d+\.\d) s", after["time"]))
    assert spent.keys() >= {"compile", "train", "validate", "checkpoint"}
    assert float(spent["train"]) == pytest.approx(base.metrics[-1]["time_s"], abs=0.06)
    speed = int(re.match(r"([\d,]+) tok/s, MFU n/a$", after["speed"])[1].replace(",", ""))
    assert speed == pytest.approx(6 * TOKENS_PER_STEP / base.metrics[-1]["time_s"], rel=0.01)
    assert re.fullmatch(r"\d+\.\d GB.*|n/a", after["peak memory"])
    best = min((r["val_loss"], r["step"]) for r in base.metrics if "val_loss" in r)
    assert after["best val loss"] == "{:.4f} after step {}".format(*best)
    assert base.console[-4] == "Next:"
    assert base.console[-1] == "  python3 evaluate.py runs/base"


def test_a_run_repeated_from_its_configuration_is_the_same_to_the_last_bit_but_for_its_times(
    base, tmp_path, cache
):
    config = base.folder / "config.json"
    done = run_to_end(["--config", config, "--run-name", "again"], tmp_path, cache)
    assert (done.returncode, done.stderr) == (0, "")
    again = tmp_path / "runs/again"
    records = map(json.loads, (again / "metrics.jsonl").read_text().splitlines())
    without_times = [
        [{k: v for k, v in record.items() if k not in TIMES} for record in run]
        for run in (base.metrics, records)
    ]
    assert without_times[0] == without_times[1]
    weights = [load_run(folder, make_mesh(1))[2] for folder in (base.folder, again)]
    for one, other in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_array_equal(one, other)
    settings = json.loads(config.read_text())
    assert json.loads((again / "config.json").read_text()) == settings | {"run_name": "again"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "{config}", "--resume", "auto"], "resume and config each give"),
        (["--config", "{config}", "--init-from", "runs/a"], "init_from and config each give"),
        (["--config", "{config}", "--preset", "laptop"], "preset and config both give"),
        (["--config", "{config}", "--depth", "3"], "depth chooses the size of a new model, but"),
        (["--init-from", "runs/a", "--minutes", "3"], "minutes chooses the size of a new model"),
        (["--preset", "laptop", "--minutes", "3", "--num-steps", "900"], "num_steps and minutes"),
        (["--preset", "laptop", "--depth", "3", "--model.num-layers", "4"], "num_layers and depth"),
        (["--minutes", "1e9"], "minutes must be at most"),
        (["--depth", "0"], "depth must be"),
        (["--config", "none/config.json"], "none/config.json cannot be read (No such file"),
        (["--config", train_gpt.__file__], "train_gpt.py is not valid JSON"),
    ],
)
def test_settings_that_start_from_two_places_or_none_are_told_in_one_sentence(
    base, capsys, arguments, told
):
    arguments = [word.format(config=base.folder / "config.json") for word in arguments]
    assert train_gpt.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert told in sentence


def test_every_step_is_a_line_that_grep_finds(base):
    lines = [line for line in base.console if "train loss" in line]
    pattern = r"step (\d+)/6 \|.*train loss (\d+\.\d{4}) \|.* ([\d,]+) tok/s \|.*ETA \d+:\d\d:\d\d$"
    found = [re.match(pattern, line).groups() for line in lines]
    assert [int(step) for step, _, _ in found] == [1, 2, 3, 4, 5, 6]
    for (_, loss, speed), record in zip(found, base.metrics, strict=True):
        assert float(loss) == pytest.approx(record["train_loss"], abs=6e-5)
        assert float(speed.replace(",", "")) == pytest.approx(record["tokens_per_s"], abs=0.6)


def test_metrics_have_one_object_per_step_with_validation_where_it_was_due(base):
    always = {"step", "train_loss", "tokens", *TIMES}
    assert base.column("step") == [1, 2, 3, 4, 5, 6]
    assert all(record.keys() >= always for record in base.metrics)
    assert [r["step"] for r in base.metrics if "val_loss" in r] == [4, 6]  # every 4 and the last
    assert base.column("tokens") == [step * TOKENS_PER_STEP for step in range(1, 7)]
    np.testing.assert_allclose(base.column("time_s"), np.cumsum(base.column("step_time_s")))
    speeds = TOKENS_PER_STEP / np.array(base.column("step_time_s"))
    np.testing.assert_allclose(base.column("tokens_per_s"), speeds)


def test_the_loss_starts_at_that_of_a_uniform_guess_and_falls(base):
    losses = base.column("train_loss")
    assert losses[0] == pytest.approx(math.log(256), abs=1e-5)
    assert losses[-1] < losses[0] - 0.3


def test_the_last_validation_is_that_of_the_weights_on_the_first_tokens_of_the_split(base, cache):
    (shard,) = cache.rglob("val_*.bin")
    _, graph, params, _ = load_run(base.folder, make_mesh(1))
    loss = mean_loss(graph, params, shard, VAL_TOKENS, T)
    assert base.metrics[-1]["val_loss"] == pytest.approx(loss, abs=1e-5)


def test_a_run_ends_with_its_sample(base):
    sample = "\n".join(base.console).split("\nsample:\n")[1]
    assert sample.startswith("def ")
    assert len(sample) > len("def ")


# Stages


def test_the_speedrun_takes_its_tokens_and_rates_from_one_stage_after_the_other(staged):
    hp = PRESETS["speedrun"]
    assert staged.console[0].startswith("speedrun preset | ")
    assert staged.console[0].endswith(" | Ng = 128, 384 / (2 * 64 * 1) = 1, 3")
    counts = np.diff([0, *STAGE_ENDS])
    tokens = np.repeat([384 * stage.batch for stage in STAGED_STAGES], counts)
    np.testing.assert_allclose(staged.column("tokens"), np.cumsum(tokens))
    np.testing.assert_allclose(np.diff(staged.column("tokens"))[[0, -1]], [128, 384])
    # Rates are constant, then decay linearly to 0.15.
    updates, end = np.arange(STAGED_STEPS), STAGED_STEPS * (1 - hp.hold_fraction)
    begin = end * (1 - hp.cooldown_fraction)
    first, last = np.repeat([stage.rate for stage in STAGED_STAGES], counts), 0.15
    expected = last + (first - last) * np.interp(updates, [begin, end], [1, 0])
    np.testing.assert_allclose(staged.column("learning_rate_factor"), expected)


def test_the_speedrun_learns_and_validates_in_every_stage(staged):
    losses = staged.column("train_loss")
    assert losses[0] == pytest.approx(math.log(256), abs=0.01)  # the head is small, but not zero
    assert losses[-1] < losses[0] - 0.5
    validated = {r["step"]: r["val_loss"] for r in staged.metrics if "val_loss" in r}
    assert [*validated] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 28]
    assert all(one > other for one, other in pairwise(validated.values()))


@pytest.mark.parametrize(("step", "stage"), [(6, 0), (28, 1)])
def test_weights_of_a_stage_are_loaded_with_its_windows_and_rotations(
    staged, tmp_path, tmp_path_factory, step, stage
):
    run = tmp_path / "run"
    shutil.copytree(staged.folder, run)
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    _, graph, params, _ = load_run(run, make_mesh(1))
    stages = STAGED_STAGES
    config = nnx.merge(graph, params).config
    assert config.windows == (stages[stage].validation_windows or stages[stage].windows)
    assert config.rotary_windows == tuple(max(each.windows) for each in stages[: stage + 1])
    # The head is tied to the embedding until the stage that splits them.
    assert np.array_equal(params["head"], params["embed"].T) == (stage == 0)
    # The documents one by one have the loss that the run computed for all of them; with other
    # rotations, or across documents, the loss differs.
    file = shared_folder(tmp_path_factory) / "documents/val.bin"
    found = staged.metrics[step - 1]["val_loss"]
    loss_of = partial(mean_loss, params=params, shard=file, count=STAGED_VAL_TOKENS, T=64)
    assert loss_of(graph, separator=255) == pytest.approx(found, abs=2e-6)
    turned = replace(config, rotary_windows=(128, 1664))
    assert loss_of(graph_of(turned), separator=255) != pytest.approx(found, abs=1e-5)
    crossing = replace(config, document_separator=None)
    assert loss_of(graph_of(crossing)) != pytest.approx(found, abs=1e-4)


TAKEN = (
    "runs/base already exists: choose another run_name, or resume that run (--resume runs/base).\n"
)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert train_gpt.main([*SMALL, "--batch-size", "1", "--dry-run"]) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["devices"] == "8 x cpu"
    assert told["stage 1"] == "steps 1 to 6, 256 tokens each, 1 x 8 rows of 32"
    assert told["tokens"].startswith("1,536 in 6 steps, ")
    assert {"model", "parameters", "data", "memory", "checkpoints"} <= told.keys()
    assert list(tmp_path.iterdir()) == []


def test_a_presets_batch_suits_the_devices_and_one_that_is_given_must(
    cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    arguments = ["--preset", "laptop", "--sequence-length", "96", "--dry-run"]
    assert train_gpt.main(arguments) == 0
    first, *told = capsys.readouterr().out.splitlines()
    assert first == "total_batch_size is 3,072 instead of 4,096, so that all devices can share it"
    assert "batch: Ng = 3,072 / (4 * 96 * 8) = 1" in told
    assert train_gpt.main([*arguments, "--total-batch-size", "4096"]) == 2
    assert "use --total-batch-size 3072 or 6144." in capsys.readouterr().err
    settings = asdict(replace(PRESETS["laptop"], sequence_length=96))
    Path("config.json").write_text(json.dumps(settings))
    assert train_gpt.main(["--config", "config.json", "--dry-run"]) == 2
    assert "use --total-batch-size 3072 or 6144." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ("--depth 3 --model.num-layers 2", "model.num_layers and depth each decide the number"),
        ("--minutes 1 --model.num-layers 2", "model.num_layers and minutes each decide the number"),
        ("--minutes 1 --num-steps 5", "num_steps and minutes each decide how long to train"),
    ],
)
def test_what_a_rule_decides_cannot_be_set_by_hand(arguments, refusal, capsys):
    assert train_gpt.main(["--preset", "laptop", *arguments.split()]) == 2
    assert capsys.readouterr().err.startswith(refusal)


def test_a_dry_run_refuses_what_the_run_would_refuse(base, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    shutil.copytree(base.folder, "runs/a")

    def told(*arguments):
        status = train_gpt.main([*arguments, "--batch-size", "1", "--dry-run"])
        output = capsys.readouterr()
        return status, output.out + output.err

    assert told(*SMALL, "--run-name", "a") == (2, TAKEN.replace("runs/base", "runs/a"))
    assert told(*SMALL, "--run-name", "../a")[0] == 2
    status, text = told("--resume", "runs/a", "--num-steps", "9")
    assert status == 0 and "\nrun: runs/a, after step 6\n" in text
    status, text = told("--resume", "runs/a")
    assert status == 0 and "\nrun: runs/a, after step 6, nothing left to do\n" in text
    settings = json.loads(Path("runs/a/config.json").read_text())
    settings["model"]["width"] *= 2
    Path("runs/a/config.json").write_text(json.dumps(settings))
    status, text = told("--resume", "runs/a", "--num-steps", "9")
    assert status == 2 and "is from another run, with model.width 32 instead of 64" in text


# Runs that must agree


def with_memory_for_the_third_attempt(arguments):
    """The main job, whose first two programs for the training step fail when they run."""
    make, attempts = nanogpt.training.programs.make_train_step, []

    def out_of_memory(state, batch, rates):
        jax.tree.map(lambda x: x.delete(), state)  # it was donated
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def make_train_step(*arguments):
        attempts.append(arguments)
        if len(attempts) > 2:
            return make(*arguments)
        lowered = SimpleNamespace(compile=lambda: out_of_memory)
        return SimpleNamespace(lower=lambda *inputs: lowered)

    nanogpt.training.programs.make_train_step = make_train_step
    return train_gpt.main(arguments)


def test_what_memory_cannot_hold_is_halved_then_rematerialized_and_the_losses_stay(
    base, tmp_path_factory
):
    arguments, main = ["--batch-size", "2"], with_memory_for_the_third_attempt
    run = trained(tmp_path_factory, "halved", *arguments, main=main)
    assert run.console[0].endswith("Ng = 256 / (2 * 32 * 1) = 4")
    halved, recomputed = (line for line in run.console if line.startswith("out of memory"))
    assert halved.endswith("with micro-batches of 2 rows: now 1, Ng = 8")
    assert "one row: layers are now recomputed" in recomputed
    np.testing.assert_allclose(run.column("train_loss"), base.column("train_loss"), rtol=1e-5)


def heading_of(cache, monkeypatch, memory, *arguments):
    """Start SMALL on eight devices with this much memory each."""
    monkeypatch.setattr("nanogpt.training.plan.device_memory", lambda device: memory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    hp = tyro.cli(Hyperparameters, args=[*SMALL, *arguments], default=PRESETS["laptop"])
    return heading(plan_here(hp), Path("runs/here"))


def test_without_a_batch_size_the_micro_batch_is_the_largest_that_should_fit(cache, monkeypatch):
    arguments = ["--batch-size", "None", "--total-batch-size", "131072"]
    lines = heading_of(cache, monkeypatch, 0.09e9, *arguments)
    # A token keeps, per layer, arrays of 608 numbers in all and two heads' scores of 32 keys, twice
    # as many where these are paired, and twice 32 numbers from each of three tables and 256 logits:
    # 2 * 4 * 608 + 3 * 8 * 64 + 4 * (192 + 512) = 9,216 bytes. The state and its gradients take
    # 0.6 MB; in 15/16 of the memory 284 rows of 32 tokens fit beside them, and so half of the 512
    # rows per device and step.
    assert "Ng = 131,072 / (256 * 32 * 8) = 2" in lines[0]
    (line,) = (line for line in lines if line.startswith("micro-batch: "))
    assert line == "micro-batch: 256 rows, about 0.1 GB of activations (device memory 0.1 GB)"


def test_the_plan_is_made_for_the_least_memory_of_all_processes(cache, monkeypatch):
    monkeypatch.setattr("nanogpt.training.plan.least", lambda memory: memory / 2)
    heading = heading_of(cache, monkeypatch, 6e9, "--batch-size", "None")
    assert any("(device memory 3.0 GB)" in line for line in heading)


def test_processes_that_would_use_different_attention_kernels_are_refused(cache, monkeypatch):
    # The other process differs in what begins like the reason for a kernel, and in nothing else.
    module = nanogpt.devices.processes
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(module, "_digest", lambda text: np.uint8([text.startswith("('here")]))
    monkeypatch.setattr(
        module, "process_allgather", lambda x: np.stack([x, x * 2 if np.ndim(x) else x])
    )
    told = r"Process 1 has different attention from process 0 \(here .*XLA.*\): use the same kind"
    with pytest.raises(ConfigError, match=told):
        heading_of(cache, monkeypatch, 6e9)


LITTLE = 0.78e6  # bytes; beside the state a row of 32 tokens needs 9,216 for each of them
SHARDED, RECOMPUTED = ", parameters sharded | ", "layers are recomputed in the backward pass"


@pytest.mark.parametrize(
    ("memory", "devices", "sharded", "recomputed"),
    [(1e6, 8, False, False), (LITTLE, 8, True, False), (LITTLE, 1, False, True)],
)
def test_where_not_even_a_row_fits_devices_shard_or_layers_are_computed_again(
    cache, monkeypatch, memory, devices, sharded, recomputed
):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    first, *later = heading_of(cache, monkeypatch, memory, "--batch-size", "None")
    assert f"| {devices} x " in first
    assert (SHARDED in first, f"{RECOMPUTED} to save memory" in later) == (sharded, recomputed)


def with_little_memory_and_a_broken_matplotlib(arguments):
    nanogpt.training.plan.device_memory = lambda device: LITTLE
    sys.modules["matplotlib.figure"] = None
    return train_gpt.main(arguments)


def test_devices_that_share_and_compute_again_leave_the_losses_however_long_they_validate(
    base, tmp_path_factory
):
    """On as many batches as the laptop preset has, CPU devices could wait for each other in
    different programs."""
    laptop = PRESETS["laptop"]
    batches = laptop.val_tokens // (laptop.sequence_length * laptop.batch_size * 2)
    tokens = f"{batches * 2 * T}"  # of a row on each of two devices
    arguments = ["--batch-size", "None", "--val-loss-every", "0", "--val-tokens", tokens]
    main = with_little_memory_and_a_broken_matplotlib
    run = trained(tmp_path_factory, "on_two", *arguments, main=main, devices=2)
    assert re.search(rf"\| 2 x .*{re.escape(SHARDED)}.* = 4$", run.console[0])
    assert f"{RECOMPUTED} to save memory" in run.log
    assert any(line.startswith("WARNING: could not plot the loss: ") for line in run.console)
    np.testing.assert_allclose(run.column("train_loss"), base.column("train_loss"), rtol=1e-5)
    # On far more tokens, which the run has not seen either.
    assert run.metrics[-1]["val_loss"] == pytest.approx(base.metrics[-1]["val_loss"], abs=0.5)


def test_fineweb_shards_are_read_in_order_each_token_once(tmp_path, tmp_path_factory):
    # Step s of the baseline trains on nothing but the token 10,000 + s, which it never saw: it
    # cannot beat a uniform guess. Had it seen the token before, because the data repeats or skips
    # ahead to the second epoch, it would.
    count = 2 * T  # tokens per step
    data = np.repeat(np.arange(10_001, 10_005), count)
    write_shard(tmp_path / "fineweb_train_000001.bin", data[: 2 * count + 1])
    write_shard(tmp_path / "fineweb_train_000002.bin", data[[*range(2 * count, 4 * count), -1]])
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(count + 1, 10_004))
    run = trained(
        tmp_path_factory,
        "shards",
        *("--preset", "baseline", "--dtype", "bfloat16", "--batch-size", "1"),
        *("--total-batch-size", f"{count}", "--val-tokens", f"{count}", "--num-steps", "4"),
        *("--val-loss-every", "0", "--model.num-layers", "1"),
        *("--model.value-embeddings", "0", "--model.bigram-buckets", "0"),
        *("--train-files", str(tmp_path / "fineweb_train_*.bin")),
        *("--val-files", str(tmp_path / "fineweb_val_*.bin")),
    )
    assert run.console[0].startswith("baseline preset | ")
    assert f"fineweb_train_*.bin, {4 * count + 2} tokens | 1 x " in run.console[0]
    assert run.console[0].endswith(" = 2")
    told = json.loads((run.folder / "run.json").read_text())["data"]["name"]
    assert told.startswith("fineweb_train_*.bin, ") and str(tmp_path) not in told
    uniform = math.log(50304)
    assert run.metrics[0]["train_loss"] == pytest.approx(uniform, abs=1e-2)
    assert min(run.column("train_loss")) > uniform - 0.05
    assert [record["step"] for record in run.metrics if "val_loss" in record] == [4]
    assert run.metrics[-1]["val_loss"] < uniform - 0.2  # the token of the last step


def test_jax_is_told_how_much_memory_to_use_before_it_starts(monkeypatch, capsys):
    """It reads the share of a GPU's memory once, when it looks for one to choose the preset."""
    told = []

    def use_device(device="auto"):
        told.append(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
        raise ConfigError("Enough.")

    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr("nanogpt.runs.settings.find_spec", lambda name: True)
    monkeypatch.setattr("nanogpt.devices.accelerator.use_device", use_device)
    assert train_gpt.main([]) == 2
    assert told == ["0.9"]


def test_names_that_are_taken_are_told_before_the_minutes_are_measured(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main(["--preset", "laptop", "--minutes", "9", "--run-name", "a"]) == 2
    output = capsys.readouterr()
    assert "already exists" in output.err and "depth" not in output.out


# Mistakes


def test_missing_fineweb_stops_the_speedrun_with_the_command_that_fetches_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main(["--preset", "speedrun"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert "`python3 cached_fineweb10B.py 12`" in sentence
    assert "fineweb10B/fineweb_train_*.bin" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_name_is_taken_stops_and_leaves_the_first_untouched(
    base, cache, monkeypatch, capsys
):
    def contents():
        files = (file for file in sorted(base.folder.rglob("*")) if file.is_file())
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    before = contents()
    monkeypatch.chdir(base.folder.parent.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    # Eight devices here: a row each for four passes.
    assert train_gpt.main([*SMALL, "--batch-size", "1", "--run-name", "base"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == TAKEN
    assert contents() == before


SHARDS = ["--train-files", "train.bin", "--val-files", "val.bin"]
ONE_ROW_EACH = ["--batch-size", "1"]  # SMALL on as many as eight devices
SPEEDRUN = ["--preset", "speedrun", "--model.num-layers", "11", "--model.value-embeddings", "5"]
SPEEDRUN += ["--model.bigram-width", "8"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with shards, one of them with a token beyond bytes, one damaged."""
    tokens = np.arange(2000) % 256
    write_shard(tmp_path / "train.bin", tokens)
    write_shard(tmp_path / "val.bin", tokens)
    write_shard(tmp_path / "undivided.bin", tokens % 255)  # without a separator
    write_shard(tmp_path / "beyond.bin", np.where(np.arange(2000) == 1234, 300, tokens))
    (tmp_path / "ruin.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        # 8 devices, see conftest.py: one pass takes 3 * 32 * 8 = 768 tokens.
        (
            ["--batch-size", "3", "--total-batch-size", "2000"],
            ["total_batch_size 2,000", "3 * 32 * 8 = 768", "use --total-batch-size 1536 or 2304."],
        ),
        (
            ["--batch-size", "3", "--total-batch-size", "2048"],
            ["total_batch_size 2,048", "3 * 32 * 8 = 768", "use --total-batch-size 1536 or 2304."],
        ),
        ([*ONE_ROW_EACH, "--train-files", "beyond.bin"], ["token 300", "beyond.bin", "1,234"]),
        ([*ONE_ROW_EACH, "--val-files", "beyond.bin"], ["token 300", "beyond.bin", "1,234"]),
        ([*ONE_ROW_EACH, "--train-files", "ruin.bin"], ["ruin.bin", "damaged"]),
        ([*ONE_ROW_EACH, "--val-files", "None"], ["train_files", "val_files"]),
        (
            [*ONE_ROW_EACH, "--sequence-length", "2048", "--total-batch-size", "16384"],
            ["train.bin", "2049", "sequence_length"],
        ),
        ([*ONE_ROW_EACH, "--run-name", "a/b"], ["run_name", "'a/b'"]),
        (["--mesh", "8"], ["mesh must give devices per axis, such as data=4,model=2"]),
        (["--mesh", "data=2"], ["mesh data=2 leaves 6 of 8 devices idle"]),
        (["--mesh", "data=4,model=4"], ["needs 16 devices, but JAX finds 8"]),
        (
            [*ONE_ROW_EACH, "--mesh", "model=2"],
            ["Pairs of heads (num_heads / 2): 1 cannot be split over 2 devices"],
        ),
        (
            [*ONE_ROW_EACH, "--shard-params", "--model.bigram-buckets", "60"],
            ["bigram_embed cannot be divided by data=8"],
        ),
        (["--model.num-heads", "3"], ["width", "num_heads"]),
        (["--model.value-embeddings", "99"], ["value_embeddings"]),
        (["--num-steps", "0"], ["num_steps"]),
        (["--batch-size", "0"], ["batch_size"]),
        (["--val-tokens", "0"], ["val_tokens"]),
        (["--seed", "-1"], ["seed"]),
        (["--cooldown-fraction", "1.5"], ["cooldown_fraction", "1.5"]),
        (["--momentum", "nan"], ["momentum", "nan"]),
        (["--neuron-decay", "1"], ["neuron_decay", "1.0"]),
        (["--max-document-length", "0"], ["max_document_length", "0"]),
        (
            [*ONE_ROW_EACH, "--max-document-length", "9", "--train-files", "undivided.bin"],
            ["undivided.bin", "document separator 255", "max_document_length to None"],
        ),
        (
            [*SPEEDRUN, "--total-batch-size", "768", "--model.windows", "8", "0"],
            ["model.windows", "(8, 0)", "speedrun"],
        ),
        ([*SPEEDRUN, "--total-batch-size", "256"], ["batch of stage 1", "256"]),
        (
            [*SPEEDRUN, "--tokenizer", "bytes", "--model.document-separator", "50256"],
            ["model.document_separator", "255", "bytes", "50256"],
        ),
        (["--model.tied-head"], ["adam.embedding", "adam.head"]),
        (["--heads-together", "3"], ["heads_together, 3,", "divide num_heads, 2."]),
        (["--heads-together", "0"], ["heads_together", "at least 1", "0"]),
        (
            [*SPEEDRUN, *ONE_ROW_EACH, "--total-batch-size", "384"],
            ["384", "in stage 1, 128,", "1 * 32 * 8 = 256", "use --total-batch-size 768."],
        ),
        (
            ["--tokenizer", "gpt2", "--model.vocab-size", "256"],
            ["vocab_size 256", "50,257", "gpt2"],
        ),
        (
            ["--tokenizer", "gpt2", "--train-files", "None", "--val-files", "None"],
            ["embedded corpus", "bytes", "gpt2"],
        ),
    ],
)
def test_settings_that_make_no_sense_are_told_in_one_sentence(folder, capsys, mistake, told):
    before = sorted(folder.iterdir())
    assert train_gpt.main(["--preset", "laptop", *SMALL, *SHARDS, *mistake]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert sentence.endswith(".")
    for words in told:
        assert words in sentence
    assert sorted(folder.iterdir()) == before


def test_stages_with_windows_and_without_are_not_mixed():
    mixed = (Stage(windows=(8,)), Stage())
    with pytest.raises(ConfigError, match=r"every stage has windows, or none\.$"):
        replace(PRESETS["speedrun"], stages=mixed).check()


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (["--nonsense", "3"], ["--nonsense"]),
        (["--num-steps", "many"], ["--num-steps", "many"]),
        (["--dtype", "float16"], ["--dtype", "float16", "bfloat16"]),
        (["--preset", "desktop"], ["--preset", "desktop", "laptop"]),
        (["--model.windows", "wide"], ["--model.windows", "wide"]),
        (["--adam.head.betas", "0.9"], ["--adam.head.betas"]),
    ],
)
def test_arguments_that_cannot_be_read_are_pointed_at(folder, capsys, monkeypatch, mistake, told):
    monkeypatch.setenv("COLUMNS", "200")  # so that no word is broken between lines
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as end:
        train_gpt.main(["--preset", "laptop", *SMALL, *SHARDS, *mistake])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    for words in told:
        assert words in output.err
    assert sorted(folder.iterdir()) == before


# Help


def meanings(cls):
    """Return the fields of a dataclass and the docstrings below them, from its source."""
    (definition,) = (
        node
        for node in ast.walk(ast.parse(Path(sys.modules[cls.__module__].__file__).read_text()))
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    body = definition.body
    return {
        field.target.id: ast.literal_eval(below.value)
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) != "ClassVar"
    }


def test_help_gives_every_setting_its_meaning_without_loading_jax(tmp_path):
    done = as_a_user_starts_it(
        ["--device", "cpu", "--help"], tmp_path, tmp_path, python_options=("-X", "importtime")
    )
    assert done.returncode == 0
    shown = " ".join(done.stdout.replace("│", " ").split())
    groups = [(Adam, f"--adam.{field.name.replace('_', '-')}.") for field in fields(AdamGroups)]
    for cls, prefix in ((Hyperparameters, "--"), (GPTConfig, "--model."), *groups):
        for name, meaning in meanings(cls).items():
            # The settings of model and Adam are options of their own; stages are a preset's.
            if name not in ("model", "stages", "adam"):
                assert prefix + name.replace("_", "-") in shown
                assert " ".join(meaning.split()) in shown
        assert meanings(cls).keys() == {field.name for field in fields(cls)}
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "optax", "orbax"}
