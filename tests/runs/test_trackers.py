"""Curves in TensorBoard and Weights & Biases, read back from the files of their own libraries."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from nanogpt.config import ConfigError
from nanogpt.runs.folder import Run
from nanogpt.runs.progress import Progress
from nanogpt.runs.trackers import Trackers, check_trackers, open_trackers
from nanogpt.schedule import Schedule, Stage

CONFIG = {"num_steps": 30, "model": {"windows": (8, 0)}, "resume": None}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Keep W&B on this machine: offline, and with a server that does not exist."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    monkeypatch.undo()
    wandb.teardown()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "runs" / "some").mkdir(parents=True)
    return tmp_path / "runs" / "some"


def record(step):
    """Return a line of metrics.jsonl with numbers that need all digits of a double."""
    return {"step": step, "train_loss": 5 / 3 / step, "tokens": 2048 * step, "val_loss": 7 / step}


def tensorboard_curves(folder):
    """Return {name: {step: value}} as TensorBoard shows it; fails if a step is shown twice."""
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    curves = {
        tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]
    }
    assert all(len(dict(curve)) == len(curve) for curve in curves.values())
    return {tag: dict(curve) for tag, curve in curves.items()}


def wandb_records(folder):
    """Return the records of each process of a W&B run, the first process first.

    The file is a log as LevelDB's: after 7 bytes, blocks of 32 KiB with chunks of records, each
    with a checksum, a length and whether it begins or ends a record.
    """
    wandb.teardown()  # waits for its process, which writes them
    processes = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        data, at, record, records = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if 2**15 - at % 2**15 < 7:
                at += 2**15 - at % 2**15
            _, length, kind = struct.unpack_from("<IHB", data, at)
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last chunk
                records.append(Record.FromString(record))
                record = b""
        processes.append(records)
    return processes


def wandb_curves(records):
    """Return what was logged, as {name: {step: value}}."""
    curves = {}
    for entry in records:
        if entry.HasField("history"):
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in entry.history.item
            }
            for name, value in values.items():
                if not name.startswith("_"):
                    curves.setdefault(name, {})[values["_step"]] = value
    return curves


def never(text):
    raise AssertionError(text)


# What is shown


def test_tensorboard_shows_the_numbers_of_every_step(folder):
    trackers = open_trackers(folder, CONFIG, 1, never, tensorboard=True, wandb=False)
    for step in range(1, 31):
        trackers.log(record(step))
    shown = tensorboard_curves(folder)  # before the end: nothing waits in memory
    assert shown == {
        "train/loss": {step: np.float32(5 / 3 / step) for step in range(1, 31)},
        "progress/tokens": {step: 2048 * step for step in range(1, 31)},
        "val/loss": {step: np.float32(7 / step) for step in range(1, 31)},
    }
    trackers.close(0)
    assert tensorboard_curves(folder) == shown
    assert not list(folder.glob("wandb*"))


@pytest.mark.parametrize("status", [0, 3])
def test_wandb_gets_the_numbers_of_every_step_the_settings_and_the_exit_status(folder, status):
    trackers = open_trackers(folder, CONFIG, 1, never, tensorboard=False, wandb=True)
    for step in range(1, 31):
        trackers.log(record(step))
    trackers.close(status)
    trackers.close(1)  # a second end changes nothing
    [records] = wandb_records(folder)
    assert wandb_curves(records) == {
        "train/loss": {step: 5 / 3 / step for step in range(1, 31)},
        "progress/tokens": {step: 2048 * step for step in range(1, 31)},
        "val/loss": {step: 7 / step for step in range(1, 31)},
    }
    [run] = [entry.run for entry in records if entry.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: config[key] for key in CONFIG} == json.loads(json.dumps(CONFIG))
    assert (run.project, run.display_name) == ("nanogpt-jax", "some")
    assert [e.exit.exit_code for e in records if e.HasField("exit")] == [status]
    assert not (folder / "tensorboard").exists()


def test_the_project_is_that_of_the_environment(folder, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_trackers(folder, CONFIG, 1, never, tensorboard=False, wandb=True).close(0)
    [[run]] = [[e.run for e in records if e.HasField("run")] for records in wandb_records(folder)]
    assert run.project == "mine"


def test_every_number_that_a_step_records_has_a_name_in_a_group(folder):
    schedule = Schedule(
        num_steps=1,
        total_batch_size=8,
        sequence_length=4,
        stages=(Stage(),),
        hold_fraction=0.0,
        cooldown_fraction=0.0,
        final_learning_rate_factor=1.0,
        momentum=0.9,
        momentum_warmup_steps=0,
        momentum_cooldown_steps=0,
    )
    with Run(folder) as run:
        progress = Progress(run, schedule, 1000, utilization=lambda step, rate: None)
        progress.started(1, {"loss": 1.0, "grad_norm": 2.0, "spike": 0.0, "applied": True})
        progress.validate(lambda: 3.0)
    recorded = json.loads((folder / "metrics.jsonl").read_text())
    logged = []
    trackers = Trackers(never)
    trackers.add("", lambda: SimpleNamespace(log=lambda *arguments: logged.append(arguments)))
    trackers.log(recorded)
    [(step, metrics)] = logged
    assert [step, *metrics.values()] == list(recorded.values())
    assert {name.split("/")[0] for name in metrics} == {"train", "val", "progress", "speed"}
    assert (metrics["train/loss"], metrics["val/loss"]) == (1.0, 3.0)


# Resuming a run


def test_tensorboard_shows_a_resumed_run_without_the_steps_that_were_lost(folder):
    first = open_trackers(folder, CONFIG, 1, never, tensorboard=True, wandb=False)
    for step in range(1, 31):
        first.log(record(step))
    second = open_trackers(folder, CONFIG, 21, never, tensorboard=True, wandb=False)
    assert list(tensorboard_curves(folder)["val/loss"]) == list(range(1, 21))
    second.log({"step": 21, "train_loss": 0.5})
    curves = tensorboard_curves(folder)
    assert curves["val/loss"] == {step: np.float32(7 / step) for step in range(1, 21)}
    assert curves["train/loss"] == {
        **{step: np.float32(5 / 3 / step) for step in range(1, 21)},
        21: 0.5,
    }


def test_wandb_goes_on_with_the_same_run(folder):
    for first in (1, 21):
        trackers = open_trackers(folder, CONFIG, first, never, tensorboard=False, wandb=True)
        trackers.log(record(first))
        trackers.close(0)
    runs = [e.run for records in wandb_records(folder) for e in records if e.HasField("run")]
    assert [run.resume for run in runs] == [True, True]
    assert {run.run_id for run in runs} == {(folder / "wandb_id").read_text().strip()}
    assert [list(wandb_curves(r)["val/loss"]) for r in wandb_records(folder)] == [[1], [21]]


def test_steps_that_wandb_has_already_are_not_sent_again(folder, monkeypatch):
    logged = []
    known = SimpleNamespace(id="abc", step=30, log=lambda *_, step, commit: logged.append(step))
    monkeypatch.setattr(wandb, "init", lambda **_: known)
    trackers = open_trackers(folder, CONFIG, 21, never, tensorboard=False, wandb=True)
    for step in range(21, 33):
        trackers.log(record(step))
    assert logged == [30, 31, 32]


# Not requested, not installed, not working


def test_nothing_is_imported_or_made_that_was_not_asked_for(folder):
    program = (
        "import sys; from pathlib import Path;"
        "import nanogpt.runs.folder, nanogpt.runs.trackers as t;"
        "asked = {'tensorboard': False, 'wandb': False};"
        "trackers = t.open_trackers(Path(sys.argv[1]), {}, 1, print, **asked);"
        "trackers.log({'step': 1, 'train_loss': 1.0}); trackers.close(0);"
        "print([name for name in ('tensorboard', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder], capture_output=True, text=True, check=True
    )
    assert (done.stdout, list(folder.iterdir())) == ("[]\n", [])


@pytest.mark.parametrize("option", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_with_the_command_that_brings_it(folder, monkeypatch, option):
    for module in [m for m in sys.modules if m.split(".")[0] == option]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, option, None)
    asked = {"tensorboard": False, "wandb": False} | {option: True}
    with pytest.raises(ConfigError, match=rf'--{option} .*pip install -e "\.\[{option}\]"'):
        check_trackers(**asked)
    with pytest.raises(ConfigError):
        open_trackers(folder, CONFIG, 1, never, **asked)
    assert list(folder.iterdir()) == []
    check_trackers(tensorboard=option != "tensorboard", wandb=option != "wandb")


def test_a_folder_that_wandb_left_behind_is_not_taken_for_its_library(tmp_path):
    (tmp_path / "wandb").mkdir()
    program = (
        "import sys; from nanogpt.runs.trackers import check_trackers;"
        "sys.path = [sys.argv[1], *(p for p in sys.path if 'site-packages' not in p)];"
        "check_trackers(False, True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ConfigError: --wandb does not work here (No module named 'wandb.sdk')" in done.stderr


def test_without_a_login_the_run_does_not_begin_and_the_ways_out_are_named(folder, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "none"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match=r"wandb login.*WANDB_MODE=offline.*leave out --wandb"):
        open_trackers(folder, CONFIG, 1, never, tensorboard=False, wandb=True)


FULL_DISK = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from nanogpt.runs.trackers import open_trackers
trackers = open_trackers(Path(sys.argv[1]), {}, 1, print, tensorboard=True, wandb=False)
trackers.add("other", lambda: SimpleNamespace(log=lambda step, _: print(step), close=print))
resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))  # tears the fourth event
for step in range(1, 7):
    trackers.log({"step": step, "val_loss": 7 / step, "train_loss": 1.0, "spike": 0.5})
trackers.close(0)
trackers.close(1)
"""


def test_a_full_disk_is_told_once_and_ends_only_what_it_hit(folder):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, folder], capture_output=True, text=True, check=True
    )
    [warning] = [line for line in done.stdout.splitlines() if not line.isdecimal()]
    assert warning.startswith("WARNING: TensorBoard logging stopped: OSError(27")
    assert done.stdout.replace(warning + "\n", "").split() == ["1", "2", "3", "4", "5", "6", "0"]
    assert list(tensorboard_curves(folder)["val/loss"]) == [1, 2, 3]
    again = open_trackers(folder, {}, 3, never, tensorboard=True, wandb=False)
    again.log(record(3))
    assert list(tensorboard_curves(folder)["val/loss"]) == [1, 2, 3]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_an_error_of_wandb_is_told_once_and_does_not_reach_the_run(folder, monkeypatch, failing):
    def fail(*arguments, **named):
        raise wandb.errors.CommError("no route to host")

    run = SimpleNamespace(id="abc", step=0, log=print, finish=print)
    run.log = fail if failing == "log" else lambda *_, **__: None
    run.finish = fail if failing == "finish" else lambda **_: None
    monkeypatch.setattr(wandb, "init", fail if failing == "init" else lambda **_: run)
    told = []
    trackers = open_trackers(folder, CONFIG, 1, told.append, tensorboard=True, wandb=True)
    for step in range(1, 4):
        trackers.log(record(step))
    trackers.close(0)
    assert told == ["WARNING: Weights & Biases logging stopped: CommError('no route to host')"]
    assert list(tensorboard_curves(folder)["val/loss"]) == [1, 2, 3]
