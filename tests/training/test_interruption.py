"""Signals to real runs in every phase: what is saved, the exit status, and how fast they exit."""

import json
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.devices.test_processes import free_port
from tests.programs import PATIENCE, PYTHON, SCRIPT, Process, settings, wait_until
from tests.run_folders import (
    arrays,
    assert_same_end,
    assert_same_run,
    checkpoints,
    died_after,
    records,
    steps,
    without_times,
)
from tests.small_runs import RUN, VAL_TOKENS, resume, started

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
NAMES = {TERM: "SIGTERM", INT: "Ctrl-C", HUP: "SIGHUP"}
AT_ONCE = 5.0  # seconds: far less than what the interrupted work would still take


def no_half_files(folder):
    """Return whether there are no temporary files below `folder`."""
    return not [path for path in folder.rglob("*") if "tmp" in path.name]


# During training


def test_a_signal_saves_after_the_step_under_way_and_ends_with_its_status(place, cache):
    """SIGTERM too: see test_resume.py. A run started to survive its terminal ignores SIGHUP."""
    run = place / "runs" / "a"
    intervals = ["--checkpoint-every", "0", "--val-loss-every", "0"]
    with started(place, cache, *intervals, "--num-steps", "99") as process:
        process.read_until("step 2/")
        process.send(HUP)
        process.wait_for_word()
        assert process.end() == 129
    (step,) = steps(run)
    assert 2 <= step <= 6
    assert_ended(process, HUP, run, step)
    with Process(["--resume", "runs/a"], place, cache, ignored=[HUP]) as process:  # as by nohup
        process.read_until(f"step {step + 1}/")
        process.send(HUP)
        process.read_until(f"step {step + 4}/")
        process.send(INT)
        process.wait_for_word()
        assert process.end() == 130
    assert steps(run)[:-1] == [step]
    assert step + 4 <= steps(run)[-1] <= step + 8
    assert_ended(process, INT, run, steps(run)[-1])


def assert_ended(process, sent, run, step):
    assert [record["step"] for record in records(run)] == [*range(1, step + 1)]
    assert process.lines[-2:] == [
        f"trained {step} steps; weights and metrics are in runs/a",
        "Interrupted. Resume with: python3 train_gpt.py --resume runs/a",
    ]
    assert process.stderr.strip() == (
        f"{NAMES[sent]}: finishing this step, then saving. A second signal quits immediately."
    )


def test_a_second_signal_ends_at_once_and_what_was_saved_is_whole(straight, place, cache):
    run = place / "runs" / "a"
    with started(place, cache) as process:
        process.read_until("step 5/")
        wait_until(lambda: steps(run) == [5])
        # Nothing more is read: the run blocks before it can exit after its step.
        process.send(TERM)
        process.wait_for_word()
        assert process.poll() is None
        process.send(TERM)
        wait_until(lambda: process.poll() is not None)
        assert process.end() == 143
    first, second = process.stderr.split("\n\n")
    assert "finishing this step" in first
    assert second == "SIGTERM: quitting immediately.\n"
    assert steps(run) == [5]
    assert arrays(run, 5) == arrays(straight, 5)


def test_a_console_that_is_closed_ends_neither_the_training_nor_the_log(straight, place, cache):
    with started(place, cache) as process:
        process.read_until("step 3/")
        process.close_console()
        assert process.end() == 0, process.stderr
    assert "Traceback" not in process.stderr
    run = place / "runs" / "a"
    assert_same_run(run, straight)
    log = (run / "log.txt").read_text().splitlines()
    words = [line.split(" | ")[:2] for line in log if line.startswith("step ")]
    expected = (straight / "log.txt").read_text().splitlines()
    assert words == [line.split(" | ")[:2] for line in expected if line.startswith("step ")]
    assert "trained 13 steps; weights and metrics are in runs/a" in log


# During validation


def test_a_kill_in_a_validation_costs_no_step_and_the_next_process_makes_up_for_it(
    straight, place, cache
):
    """The last validation, after which nothing is left to do."""
    run = died_after(10, straight, place)
    # 2,344 passes take seconds: time for the signal
    long = ["--val-loss-every", "0", "--val-tokens", "600000"]
    with Process(["--resume", "runs/a", *long], place, cache) as process:
        process.read_until("step 13/13 | train")
        wait_until(lambda: steps(run)[-1] == 13)
        process.send(signal.SIGKILL)
        process.end()
    assert not any("step 13/13 | val loss" in line for line in process.lines), "it came too late"
    assert records(run)[-1]["step"] == 12
    # The next process repeats it, and is killed before it ends.
    short = ["--val-tokens", f"{VAL_TOKENS}"]
    with Process(["--resume", "runs/a", *short], place, cache) as process:
        assert "step 13/13 | val loss " in process.read_until("/13 | ")
        wait_until(lambda: records(run)[-1]["step"] == 13)
        process.send(signal.SIGKILL)
        process.end()
    _, status, errors = resume(run, cache, *short)
    assert (status, errors) == (0, "")
    expected = without_times(straight)
    del expected[11]["val_loss"]  # as asked
    assert without_times(run) == expected
    assert_same_end(run, straight)


# Before and after training


@pytest.mark.parametrize(("sent", "status", "after"), [(TERM, 143, 0.0), (INT, 130, 0.12)])
def test_a_signal_while_jax_is_loaded_ends_at_once_and_leaves_nothing(
    place, cache, sent, status, after
):
    with subprocess.Popen(
        [*PYTHON, SCRIPT, *RUN, "--run-name", "a"],
        env=settings(cache, 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: "jaxlib" in maps.read_text())
        time.sleep(after)
        process.send_signal(sent)
        before = time.monotonic()
        output, errors = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - before < AT_ONCE
    assert process.returncode in (status, -sent)  # a shell reports `status` for both
    assert output == "", "the signal came too late"
    assert "Traceback" not in errors
    assert checkpoints(place / "runs" / "a") == []
    assert no_half_files(place / "runs")


@pytest.mark.parametrize(("sent", "status", "after"), [(HUP, 129, 0.0), (INT, 130, 1.5)])
def test_a_signal_while_it_traces_or_compiles_ends_at_once(place, cache, sent, status, after):
    run = place / "runs" / "a"
    deep = ["--model.num-layers", "16", "--model.windows", *["8"] * 15, "0"]
    nothing_cached = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    with started(place, cache, *deep, environment=nothing_cached) as process:
        process.read_until("XLA attention")
        time.sleep(after)
        before = time.monotonic()
        process.send(sent)
        assert process.end() == status
        assert time.monotonic() - before < AT_ONCE
    assert process.stderr.strip() == f"{NAMES[sent]}: quitting immediately."
    assert not any("compiled" in line for line in process.lines), "the signal came too late"
    assert json.loads((run / "config.json").read_text())["num_steps"] == 13
    assert checkpoints(run) == []
    assert no_half_files(run)


def test_a_signal_while_it_writes_its_sample_ends_at_once_and_the_run_is_whole(
    straight, place, cache
):
    run = died_after(10, straight, place)
    with Process(["--resume", "runs/a", "--sample-tokens", "100000"], place, cache) as process:
        process.read_until("trained 13 steps; weights")
        before = time.monotonic()
        process.send(TERM)
        assert process.end() == 143
        assert time.monotonic() - before < AT_ONCE
    assert not any("sample" in line for line in process.lines)
    assert_same_run(run, straight)
    assert no_half_files(run)


# Several processes


def member(arguments):
    """One of two processes that only make steps together."""
    from jax.experimental.multihost_utils import sync_global_devices

    from nanogpt.devices.processes import join_processes, wait_for_others
    from nanogpt.training.interruption import Interruption

    port, me, last = map(int, arguments)
    with Interruption() as interruption:
        print("begins", flush=True)
        join_processes(f"127.0.0.1:{port}", 2, me)
        interruption.be_patient()
        print("is patient", flush=True)
        for step in range(1, last + 1):
            time.sleep(0.02)
            sync_global_devices(f"step {step}")
            print("step", step, flush=True)
            if interruption.requested():
                print("step", step, "is the last", flush=True)
                wait_for_others()
                return interruption.exit_status
    return 0


@pytest.mark.parametrize(
    ("number", "sent", "statuses", "after"),
    [
        (0, TERM, [143, 143], "step 10"),
        (1, INT, [143, 130], "is patient"),
    ],
)
def test_processes_that_train_together_end_after_the_same_step(
    number, sent, statuses, after, tmp_path, cache
):
    port, last = free_port(), 2000
    with (
        Process([port, 0, last], tmp_path, cache, main=member) as first,
        Process([port, 1, last], tmp_path, cache, main=member) as second,
        ThreadPoolExecutor() as threads,
    ):
        members = first, second
        other_ends = threads.submit(members[1 - number].end)
        members[number].read_until(after)
        members[number].send(sent)
        members[number].end()
        other_ends.result()
    errors = [process.stderr[-2000:] for process in members]
    assert [process.poll() for process in members] == statuses, errors
    made = [[x for x in process.lines if x.startswith("step ")] for process in members]
    assert made[0] == made[1]
    assert made[0][-1].endswith(" is the last")
    assert len(made[0]) < last


@pytest.mark.parametrize(("sent", "status"), [(TERM, 143), (INT, 130)])
def test_a_process_that_waits_for_others_ends_at_once(sent, status, tmp_path, cache):
    with Process([free_port(), 1, 1], tmp_path, cache, main=member) as alone:
        alone.read_until("begins")
        time.sleep(0.3)
        alone.send(sent)
        before = time.monotonic()
        assert alone.end() == status
        assert time.monotonic() - before < AT_ONCE
