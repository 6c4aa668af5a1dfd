"""Runs that died in all known ways and were resumed end like an uninterrupted run.

Faults are real: processes are killed, files damaged, disks full. A test pauses a run through its
console: the run blocks like any program whose output is not read, so nothing here depends on
timing.
"""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

import train_gpt
from nanogpt.adam import AdamGroups
from nanogpt.config import ConfigError, GPTConfig
from nanogpt.data.dataset import SAMPLE
from nanogpt.data.shards import sample_of, write_shard
from nanogpt.training.checkpoint import digest_of
from nanogpt.training.resume import CHANGEABLE, PLACES, resumed_settings
from tests.programs import Process, wait_until
from tests.run_folders import (
    arrays,
    assert_same_run,
    checkpoints,
    contents,
    died_after,
    records,
    steps,
    without_times,
)
from tests.small_runs import (
    LONGER,
    RUN,
    STAGE_ENDS,
    STAGED_STEPS,
    change_a_token,
    resume,
    started,
)
from train_gpt import PRESETS, Hyperparameters

# The same run


def test_the_straight_run_has_what_the_others_are_compared_with(straight):
    assert steps(straight) == [5, 10, 13]
    assert [record["step"] for record in records(straight)] == [*range(1, LONGER + 1)]
    assert [r["step"] for r in records(straight) if "val_loss" in r] == [4, 8, 12, 13]
    names = arrays(straight, LONGER).keys()
    assert any(name.startswith("['params']") for name in names)
    assert any("['opt_state']" in name for name in names)
    assert arrays(straight, 10) != arrays(straight, LONGER)


def test_a_run_that_was_killed_is_free_and_goes_on_after_its_last_checkpoint_to_the_same_end(
    straight, place, cache
):
    """On the way it is also told to end, and goes on after that step."""
    run = place / "runs" / "a"
    with started(place, cache) as first:
        first.read_until("step 5/")
        wait_until(lambda: steps(run) == [5])
        time.sleep(0.2)  # for asynchronous writes
        before = contents(run)
        # Until then only one process at a time has it.
        second, status, errors = resume(run, cache)
        assert (status, second.lines) == (2, [])
        (sentence,) = errors.splitlines()
        assert re.search(
            rf"^runs/a is in use by process {first.pid} on \S+ "
            r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: .*\.$",
            sentence,
        )
        assert contents(run) == before
        first.send(signal.SIGKILL)
        assert first.end() == -signal.SIGKILL
    with Process(["--resume", "runs/a"], place, cache) as told:
        told.read_until("step 6/")
        assert "resuming runs/a after step 5" in told.lines
        assert not any(line.startswith("step 5/") for line in told.lines)
        told.send(signal.SIGTERM)
        told.wait_for_word()
        assert told.end() == 143
    last = steps(run)[-1]
    assert 6 <= last <= 10
    assert told.lines[-2:] == [
        f"trained {last} steps; weights and metrics are in runs/a",
        "Interrupted. Resume with: python3 train_gpt.py --resume runs/a",
    ]
    process, status, errors = resume(run, cache)
    assert (status, errors) == (0, "")
    assert f"resuming runs/a after step {last}" in process.lines
    assert_same_run(run, straight)


def test_auto_goes_on_with_the_run_that_was_started_last(straight, place, capsys):
    run = died_after(10, straight, place)
    for name in ("older", "b"):
        shutil.copytree(run, place / "runs" / name)
    for seconds, name in enumerate(("older", "b", "a")):
        os.utime(place / "runs" / name / "config.json", (1e9 + seconds, 1e9 + seconds))
    assert train_gpt.main(["--resume", "auto", *ONE_ROW_EACH, "--dry-run"]) == 0
    assert "\nrun: runs/a, after step 10\n" in capsys.readouterr().out


def test_a_run_goes_on_with_another_number_of_devices_on_the_same_tokens(straight, place, cache):
    run = died_after(5, straight, place)
    process, status, errors = resume(run, cache, "--batch-size", "1", devices=4)
    assert (status, errors) == (0, "")
    assert "resuming runs/a after step 5" in process.lines
    assert any("(1 * 32 * 4) = 2" in line for line in process.lines)
    assert steps(run) == [5, 10, 13]
    for ours, theirs in zip(records(run), records(straight), strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
        for name in ours.keys() & {"train_loss", "val_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    # On other rows losses differ by more than ten times the tolerance above.
    losses = [record["train_loss"] for record in records(straight)]
    assert np.abs(np.diff(losses)).min() > 10 * 1e-5 * max(losses)


# Stages


def test_a_run_stopped_in_the_validation_that_ends_a_stage_goes_on_with_the_next_to_the_same_end(
    staged, place, cache
):
    straight, end = staged.folder, STAGE_ENDS[0]
    hp = json.loads((straight / "config.json").read_text())
    run = died_after(end - 3, straight, place)
    # So many tokens that the signal arrives during the validation.
    long = ["--val-tokens", "50000", "--checkpoint-every", "0"]
    with Process(["--resume", "runs/a", *long], place, cache) as process:
        process.read_until(f"step {end}/{STAGED_STEPS} | train")
        process.send(signal.SIGTERM)
        assert process.end() == 143
    assert steps(run)[-1] == end
    assert [record["step"] for record in records(run)] == [*range(1, end)]
    process, status, errors = resume(run, cache, "--val-tokens", f"{hp['val_tokens']}")
    assert (status, errors) == (0, "")
    assert f"resuming runs/a after step {end}" in process.lines
    assert_same_run(run, straight)


def test_a_run_goes_on_from_one_stage_through_the_next_on_another_number_of_devices(
    staged, place, cache
):
    straight = staged.folder
    run = died_after(24, straight, place)
    process, status, errors = resume(run, cache, "--batch-size", "1", devices=2)
    assert (status, errors) == (0, "")
    assert any(line.endswith("/ (1 * 64 * 2) = 1, 3") for line in process.lines)
    for ours, theirs in zip(records(run), records(straight), strict=True):
        for name in ("step", "tokens", "learning_rate_factor"):
            assert ours[name] == theirs[name]
        for name in ours.keys() & {"train_loss", "val_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_number_of_steps_that_moves_a_stage_which_has_been_trained_is_refused(
    staged, place, cache
):
    run = shutil.copytree(staged.folder, place / "runs" / "a")
    metrics, whole = (run / "metrics.jsonl").read_bytes(), contents(run / "checkpoints")
    process, status, errors = resume(run, cache, "--num-steps", "56")
    assert (status, process.lines) == (2, [])
    # 27 steps of 128 tokens and one of 384; of 56 steps, the first 54 have 128.
    assert errors == (
        "num_steps cannot change to 56 while runs/a is resumed: its stages would have had "
        "3,584 tokens by now instead of 3,840.\n"
    )
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert contents(run / "checkpoints") == whole


# Which settings may change


def another(value):
    """Return another value of the same type."""
    if isinstance(value, GPTConfig):
        return replace(value, num_layers=value.num_layers + 1)
    if isinstance(value, AdamGroups):
        return replace(value, gates=replace(value.gates, weight_decay=1.0))
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[::-1] + (value[:1] or ("x",))
    return f"{value}x" if isinstance(value, str) else (value or 0) + 1


def test_every_setting_that_is_not_named_as_changeable_is_refused(place):
    hp = PRESETS["laptop"]
    (place / "config.json").write_text(json.dumps(train_gpt.asdict(hp)))
    refused = set()
    for name in (field.name for field in fields(Hyperparameters)):
        changed = another(getattr(hp, name))
        try:
            after = resumed_settings(
                Hyperparameters,
                place,
                lambda hp, name=name, changed=changed: replace(hp, **{name: changed}),
            )
            assert name == "resume" or getattr(after, name) == changed
        except ConfigError as error:
            assert str(error).startswith(f"{name} cannot change from ")
            refused.add(name)
    assert refused == {field.name for field in fields(Hyperparameters)} - CHANGEABLE
    assert refused >= {"seed", "learning_rate", "model", "train_files", "total_batch_size"}


ONE_ROW_EACH = ["--batch-size", "1"]  # on the eight devices of this process


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--learning-rate", "0.5"], ["learning_rate", "0.03", "0.5"]),
        (["--model.width", "64"], ["model", "width=32", "width=64"]),
        (["--seed", "1"], ["seed", "0", "1"]),
        (["--train-files", "train_0.bin"], ["train_files", "train_*.bin", "train_0.bin"]),
    ],
)
def test_a_setting_that_cannot_change_is_named_and_nothing_is_touched(
    straight, place, capsys, change, told
):
    run = died_after(10, straight, place)
    before = contents(run)
    assert train_gpt.main(["--resume", "runs/a", *ONE_ROW_EACH, *change]) == 2
    assert_one_sentence(capsys.readouterr(), *told)
    assert contents(run) == before


def test_a_run_of_the_version_before_late_attentions_goes_on_with_the_same_settings(
    straight, place, capsys
):
    """All that such a run has written in another way is in config.json and in the manifests."""
    run = died_after(10, straight, place)
    later = {"model": GPTConfig.ADDED, "adam": AdamGroups.LATER}

    def without_what_is_new(settings):
        del settings["heads_together"]
        for part, names in later.items():
            for name in names:
                del settings[part][name]
        for stage in settings["stages"]:
            del stage["max_document_length"]
        return settings

    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(without_what_is_new(config)))
    for checkpoint in checkpoints(run):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        # Its groups were those that presets with few rates still have.
        assert not any(
            f".{name}." in array for name in later["adam"] for array in manifest["arrays"]
        )
        facts = manifest["facts"]
        known = {name: config[name] for name in config.keys() - CHANGEABLE - PLACES}
        facts["settings"] = flatten_dict(known, sep=".")
        assert facts["settings"]["stages"] == config["stages"]
        del manifest["sha256"]
        manifest["sha256"] = digest_of(manifest)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    before, now = (
        replace(resumed_settings(Hyperparameters, folder, lambda hp: hp), resume=None)
        for folder in (straight, run)
    )
    assert before == now
    assert train_gpt.main(["--resume", "runs/a", *ONE_ROW_EACH, "--dry-run"]) == 0
    assert "\nrun: runs/a, after step 10\n" in capsys.readouterr().out


def test_lengths_and_intervals_may_change(straight, place, cache):
    run = place / "runs" / "a"
    shutil.copytree(straight, run)
    arguments = ["--num-steps", "16", "--val-loss-every", "3", "--val-tokens", "300"]
    arguments += ["--checkpoint-every", "2", "--keep-checkpoints", "3", "--device", "cpu"]
    _, status, errors = resume(run, cache, *arguments)
    assert (status, errors) == (0, "")
    assert [record["step"] for record in records(run)] == [*range(1, 17)]
    assert [r["step"] for r in records(run) if "val_loss" in r] == [4, 8, 12, 13, 15, 16]
    assert steps(run) == [13, 14, 16]
    # The next resume uses the settings of this one.
    assert json.loads((run / "config.json").read_text())["num_steps"] == 16


def shorter(place):
    write_shard(place / "train_1.bin", np.fromfile(place / "train_1.bin", "<u2")[512:][:-1])


def missing(place):
    (place / "train_1.bin").unlink()


def one_more(place):
    shutil.copy(place / "train_1.bin", place / "train_2.bin")


def another_token(place):
    change_a_token(place / "train_1.bin", 4_321)


def another_to_validate_on(place):
    change_a_token(place / "val.bin", 1_234)


def no_data(place):
    for shard in place.glob("train_*.bin"):
        shard.unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shorter, ["train_1.bin", "9,000 tokens", "8,999 tokens"]),
        (missing, ["train_1.bin", "9,000 tokens", "nothing"]),
        (one_more, ["train_2.bin", "9,000 tokens", "nothing"]),
        (another_token, ["trained on", "the content of shard train_1.bin changed"]),
        (another_to_validate_on, ["validated on", "the content of shard val.bin changed"]),
        (no_data, ["train_*.bin"]),
    ],
)
def test_data_that_are_not_what_they_were_are_named(straight, place, capsys, change, told):
    run = died_after(10, straight, place)
    change(place)
    metrics, whole = (run / "metrics.jsonl").read_bytes(), contents(run / "checkpoints")
    assert train_gpt.main(["--resume", "runs/a", *ONE_ROW_EACH]) == 2
    assert_one_sentence(capsys.readouterr(), *told)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert contents(run / "checkpoints") == whole


def assert_one_sentence(output, *told):
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert sentence.endswith(".")
    for words in told:
        assert words in sentence


# Nothing to resume


def no_runs(run):
    shutil.rmtree(run.parent)


def no_config(run):
    (run / "config.json").unlink()


def config_of_another_program(run):
    (run / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')


def config_cut_short(run):
    config = run / "config.json"
    config.write_text(config.read_text()[:100])


def no_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def only_an_unfinished_one(run):
    for checkpoint in checkpoints(run):
        (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("asked", ["runs/a", "auto"])
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (no_runs, "no run|no config.json"),
        (no_config, "no run|no config.json"),
        (config_of_another_program, "config.json"),
        (config_cut_short, "config.json"),
        (no_checkpoints, "has no checkpoint yet"),
        (only_an_unfinished_one, "no usable checkpoint"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_an_error_and_never_a_fresh_start(
    straight, place, capsys, harm, told, asked
):
    run = died_after(10, straight, place)
    harm(run)
    before = sorted(place.rglob("*"))
    assert train_gpt.main(["--resume", asked, *ONE_ROW_EACH]) == 2
    output = capsys.readouterr()
    assert_one_sentence(output)
    assert re.search(told, output.err)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "other"), [("seed", 7), ("model.softcap", 7.5), ("adam.head.betas", [0.5, 0.6])]
)
def test_the_checkpoint_of_another_run_is_named_and_not_gone_on_from(
    straight, place, capsys, name, other
):
    run = place / "runs" / "a"
    shutil.copytree(straight, run)
    config = json.loads((run / "config.json").read_text())
    *outer, last = name.split(".")
    settings = config
    for key in outer:
        settings = settings[key]
    had, settings[last] = settings[last], other
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    assert train_gpt.main(["--resume", "runs/a", "--num-steps", "25", *ONE_ROW_EACH]) == 2
    told = f"checkpoints/00000013 is from another run, with {name} {had} instead of {other}: "
    assert told in capsys.readouterr().err
    assert {
        k: v for k, v in contents(run).items() if k.name not in ("lock", "holder", "log.txt")
    } == {k: v for k, v in before.items() if k.name not in ("lock", "holder", "log.txt")}


def test_a_run_that_is_finished_says_so(straight, place, capsys):
    run = place / "runs" / "a"
    shutil.copytree(straight, run)
    metrics, whole = (run / "metrics.jsonl").read_bytes(), contents(run / "checkpoints")
    assert train_gpt.main(["--resume", "runs/a", *ONE_ROW_EACH]) == 0
    output = capsys.readouterr()
    assert output.out == (
        "runs/a has already finished its 13 steps. Use a larger --num-steps to train longer.\n"
    )
    assert train_gpt.main(["--resume", "runs/a", "--num-steps", "3", *ONE_ROW_EACH]) == 0
    output = capsys.readouterr()
    assert "has already finished its 13 steps, more than --num-steps 3. Use" in output.out
    assert output.err == ""
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert contents(run / "checkpoints") == whole


# Damaged checkpoints


def largest_file(checkpoint):
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flipped_bit(checkpoint):
    content = bytearray(largest_file(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    largest_file(checkpoint).write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(straight, place, cache):
    run = died_after(10, straight, place)
    newest = run / "checkpoints" / "00000010"
    file = largest_file(newest).relative_to(newest).as_posix()
    flipped_bit(newest)
    process, status, errors = resume(run, cache)
    assert (status, errors) == (0, "")
    (warning,) = (line for line in process.lines if line.startswith("WARNING"))
    for words in ("00000010", file, "changed", "step 5"):
        assert words in warning
    assert "resuming runs/a after step 5" in process.lines
    assert_same_run(run, straight)


def test_when_every_checkpoint_is_damaged_each_is_named_and_nothing_is_done(
    straight, place, capsys
):
    run = died_after(10, straight, place)
    for checkpoint in checkpoints(run):
        flipped_bit(checkpoint)
    before = contents(run / "checkpoints")
    assert train_gpt.main(["--resume", "runs/a", *ONE_ROW_EACH]) == 2
    assert_one_sentence(capsys.readouterr(), "runs/a", "00000005", "00000010")
    assert contents(run / "checkpoints") == before


# A full disk: files cannot grow beyond a limit


def test_what_does_not_fit_is_loud_and_the_training_goes_on(straight, place, cache):
    run = place / "runs" / "a"
    largest = largest_file(straight / "checkpoints" / "00000010").stat().st_size
    with started(place, cache) as process:
        process.read_until("step 5/")
        wait_until(lambda: steps(run) == [5])
        room = (run / "metrics.jsonl").stat().st_size + 10
        process.allow(room)
        process.read_until("step 8/")
        assert (run / "metrics.jsonl").stat().st_size <= room
        process.allow(largest // 2)  # enough for the metrics, which have waited
        assert process.end() == 2
    warnings = [line for line in process.lines if line.startswith("WARNING")]
    assert any("metrics.jsonl" in line for line in warnings)
    for step, warning in zip((10, 13), warnings[-2:], strict=True):
        assert f"The checkpoint of step {step} was not written" in warning
    assert "The checkpoint of step 13 was not written" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert without_times(run) == without_times(straight)
    # Earlier checkpoints are still intact: once there is room, the run continues from there.
    assert steps(run) == [5]
    assert arrays(run, 5) == arrays(straight, 5)


def test_a_disk_that_is_full_from_the_start_is_told_in_one_sentence(straight, place, cache):
    run = died_after(10, straight, place)
    metrics, whole = (run / "metrics.jsonl").read_bytes(), contents(run / "checkpoints")
    for arguments, limit in (
        ([*RUN, "--run-name", "b"], 10),  # no room for config.json
        (["--resume", "runs/a"], 2_500),  # none for the metrics up to step 10
    ):
        with Process(arguments, place, cache, limit=limit) as process:
            status = process.end()
        # JAX warns first if it cannot cache a compiled program.
        *_, sentence = process.stderr.splitlines()
        assert (status, sentence[-1]) == (2, ".")
        assert "File too large" in sentence
        assert "Traceback" not in process.stderr
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert contents(run / "checkpoints") == whole


def test_the_best_checkpoint_is_kept_of_a_run_that_gets_worse(place, cache):
    arguments = ["--learning-rate-factor", "1e4", "--num-steps", "3", "--val-loss-every", "1"]
    arguments += ["--checkpoint-every", "0", "--keep-checkpoints", "1", "--keep-best"]
    with started(place, cache, *arguments) as process:
        assert (process.end(), process.stderr) == (0, "")
    run = place / "runs" / "a"
    losses = {record["step"]: record["val_loss"] for record in records(run)}
    best = min(losses, key=losses.get)
    assert best < 3
    assert steps(run) == [best, 3]
    kept = f"runs/a/checkpoints/{best:08}"
    assert any(line.endswith(f"kept in {kept}") for line in process.lines)
    assert process.lines[-1] == f"  python3 evaluate.py {kept}"
    assert records(run)[0]["learning_rate_factor"] == 1e4


# Numbers that are not finite


TOO_FAST = ["--adam.stream.learning-rate", "1e30"]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(place, cache):
    run = place / "runs" / "a"
    arguments = ["--checkpoint-every", "0", "--checkpoint-minutes", "1e-9"]  # after each step
    with started(place, cache, *TOO_FAST, *arguments) as process:
        assert process.end() == 3
    (said,) = process.stderr.splitlines()
    assert said.startswith("step 3: loss nan, gradient norm nan, learning rates x 1.000")
    assert "The last good checkpoint is runs/a/checkpoints/00000002." in said
    assert [record["step"] for record in records(run)] == [1, 2]
    assert steps(run) == [1, 2]
    leaves = jax.tree.leaves(ocp.load_checkpointables(checkpoints(run)[-1]))
    assert leaves
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    before = arrays(run, 2)
    # It is reproducible: the same step stops the next process.
    _, status, again = resume(run, cache)
    assert (status, again) == (3, process.stderr)
    assert steps(run) == [1, 2]
    assert arrays(run, 2) == before


def test_a_validation_loss_that_is_not_finite_stops_a_run_which_says_that_it_has_no_checkpoint(
    place, cache
):
    """The last update made the parameters too large; there is no later step to notice it."""
    with started(place, cache, *TOO_FAST, "--num-steps", "2") as process:
        status = process.end()
    assert status == 3, process.lines
    (line,) = process.stderr.splitlines()
    assert "step 2" in line
    assert "nan" in line
    assert "runs/a has no checkpoint yet" in line
    assert steps(place / "runs" / "a") == []
    for line in (place / "runs" / "a" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON


# Before a run begins


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there_is_told_in_one_sentence(place, cache, device):
    with started(place, cache, "--device", device) as process:
        assert process.end() == 2
    assert process.lines == []
    (sentence,) = process.stderr.splitlines()
    assert sentence.startswith(f"JAX finds no {device}, only cpu: ")
    assert sentence.endswith(".")
    assert not (place / "runs").exists()


def test_verify_data_finds_a_token_that_the_sample_misses(place, capsys):
    tokens = np.zeros(1_200_000, np.uint16)
    tokens[4_500] = 300
    assert 300 not in sample_of(tokens, SAMPLE)
    write_shard(place / "train_1.bin", tokens)
    assert train_gpt.main([*RUN, *ONE_ROW_EACH, "--verify-data"]) == 2
    assert_one_sentence(capsys.readouterr(), "train_1.bin", "token 300", "4,500")
    assert not (place / "runs").exists()


# The documented promises


def test_every_fault_on_the_page_on_reliability_names_tests_and_all_of_them_exist():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "reliability.md").read_text()
    table = page[page.index("| fault |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 30
    for row in table:
        fault, _, tests = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named, fault
        assert " ".join(f"`{file}::{test}`" for file, test in named) == tests
        for file, test in named:
            assert re.search(rf"^def {test}\(", (root / file).read_text(), re.MULTILINE), test
