"""Several real processes that train together over the loopback interface."""

import json
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

import nanogpt.devices.processes
import train_gpt
from nanogpt.devices.processes import join_processes, least, processes_line
from nanogpt.runs.folder import SilentRun
from nanogpt.training.checkpoint import Checkpoint, examined
from tests.programs import Process, wait_until
from tests.small_runs import LONGER, RUN, change_a_token, resume, write_data

QUIET = {"GLOO_LOG_LEVEL": "ERROR"}


def impatient(arguments):
    """The main job, with a shorter timeout for heartbeats of the others."""
    nanogpt.devices.processes.LOST_AFTER = 10
    nanogpt.devices.processes.SEEN_WITHIN = 1
    return train_gpt.main(arguments)


def joined(arguments, cwd, cache, port, number, count=2, devices=1):
    """Start `train_gpt.py` as one of several processes."""
    where = "--coordinator-address", f"127.0.0.1:{port}", "--num-processes", count
    arguments = [*where, "--process-id", number, *arguments]
    return Process(arguments, cwd, cache, devices, environment=QUIET, main=impatient)


@contextmanager
def processes(arguments, cwd, cache, count=2, devices=1):
    """Run `train_gpt.py` in several processes joined by arguments."""
    port = free_port()
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                joined(arguments, cwd, cache, port, number, count=count, devices=devices)
            )
            for number in range(count)
        ]
        # The others are read continuously: a process blocks if its output is not read.
        threads = stack.enter_context(ThreadPoolExecutor(count))
        yield started, [threads.submit(process.end) for process in started[1:]]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def losses(run):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return {record["step"]: (record["train_loss"], record.get("val_loss")) for record in records}


def assert_same(found, expected, rel=1e-5):
    assert found.keys() == expected.keys()
    for step, (train_loss, val_loss) in expected.items():
        assert found[step][0] == pytest.approx(train_loss, rel=rel), step
        assert found[step][1] == (val_loss and pytest.approx(val_loss, rel=rel)), step


def forget_launchers(monkeypatch):
    """Unset the variables that launchers set."""
    launchers = "SLURM_", "OMPI_", "PMI_", "WORLD_", "KUBERNETES_", "JOB_", "TPU_", "MEGASCALE_"
    launchers += ("CUDA_VISIBLE_",)
    for name in list(os.environ):
        if name.startswith(launchers):
            monkeypatch.delenv(name)


def without_gloo(text):
    """Return the output without Gloo's messages about connections on standard output.

    Its threads write at the same time, so a number of theirs may be on its own line.
    """
    gloo = re.compile(r"Gloo|peer ranks|^\s*\d*\s*$")
    return [line for line in text if not gloo.search(line)]


def test_two_processes_train_as_one_does_even_where_one_cannot_save_and_the_first_alone_tells(
    straight, place, cache
):
    """With both shardings; on another machine a single device goes on from what they saved."""
    divided = ["--mesh", "data=2,model=2", "--shard-params", "--batch-size", "2"]
    divided += ["--canonical-masking"]  # bytes can come in any order, so it changes nothing
    with processes([*RUN, *divided, "--run-name", "a"], place, cache, devices=2) as (
        (one, two),
        (end,),
    ):
        one.read_until("step 5/")
        wait_until(Path("runs/a/checkpoints/00000005/manifest.json").exists)
        two.allow(2000)
        statuses = [one.end(), end.result()]
    assert statuses == [2, 2], one.stderr + two.stderr
    failed = "The checkpoint of step {} was not written: File too large (process 1); "
    warnings = [line for line in one.lines if line.startswith("WARNING")]
    for step, warning in zip((10, 13), warnings, strict=True):
        assert warning.startswith(f"WARNING: {failed.format(step)}")
    assert one.stderr.startswith(failed.format(13))
    # A partial save left by the first process when it exited is deleted by the next save.
    assert [x.parent.name for x in Path("runs/a/checkpoints").glob("*/manifest.json")] == [
        "00000005"
    ]
    # Rounding errors grow from step to step.
    assert_same(losses("runs/a"), losses(straight), rel=1e-4)
    first = [{k: v for k, v in losses(run).items() if k <= 5} for run in ("runs/a", straight)]
    assert_same(*first)
    assert "canonical masking: " in "\n".join(one.lines)
    heading, told, *_ = without_gloo(one.lines)
    assert heading.endswith(
        "| 4 x cpu in 2 processes as data=2,model=2, parameters sharded "
        "| Ng = 256 / (2 * 32 * 2) = 2"
    )
    assert without_gloo(two.lines) == []
    assert re.fullmatch(
        r"2 processes, 2 devices each, coordinator 127\.0\.0\.1:\d+; if one dies, all exit; "
        "resume with --resume runs/a",
        told,
    )
    steps = [line for line in one.lines if "train loss" in line and line.startswith("step")]
    assert len(steps) == LONGER
    assert len(list(Path("runs").iterdir())) == 1
    config = json.loads(Path("runs/a/config.json").read_text())
    assert config["process_id"] is None  # another launch has other numbers

    alone = ["--mesh", "None", "--no-shard-params", "--batch-size", "8"]
    process, status, errors = resume(place / "runs" / "a", cache, *alone)
    assert (status, errors) == (0, "")
    assert "resuming runs/a after step 5" in process.lines
    assert_same(losses("runs/a"), losses(straight), rel=1e-4)


# Messages of a process that loses another: from JAX's service, or the current collective.
LOST = re.compile("another task died|Connection (reset|closed) by peer")


def test_one_that_is_killed_or_cannot_begin_ends_all_and_the_run_goes_on_from_whole_saves(
    straight,
    place,
    cache,
):
    """Two losses that the first process must detect, tested in parallel to wait only once."""
    saves, elsewhere, port = Path("runs/a/checkpoints"), place / "elsewhere", free_port()
    elsewhere.mkdir()  # there is no data

    def saving():
        """Return whether a save is in progress that is not the first."""
        return len({(x / "manifest.json").exists() for x in saves.glob("*")}) == 2

    often = [*RUN, "--batch-size", "4", "--checkpoint-every", "1", "--keep-checkpoints", "99"]
    with (
        joined([*RUN, "--batch-size", "4", "--run-name", "b"], place, cache, port, 0) as first,
        joined([*RUN, "--batch-size", "4", "--run-name", "b"], elsewhere, cache, port, 1) as second,
        processes([*often, "--run-name", "a"], place, cache) as ((one, two), (end,)),
        ThreadPoolExecutor() as threads,
    ):
        ends = [threads.submit(process.end) for process in (one, first, second)]
        wait_until(saving)
        two.send(signal.SIGKILL)
        statuses = [future.result() for future in (*ends, end)]
    assert 0 not in statuses
    assert LOST.search(one.stderr)
    assert LOST.search(first.stderr)
    assert second.stderr.startswith("No shard matches train_*.bin")
    assert not Path("runs/b").exists()
    whole = [x for x in saves.iterdir() if (x / "manifest.json").exists()]
    assert whole
    for save in whole:
        assert isinstance(examined(save), Checkpoint)
    # Then the first is lost, and the run goes on on a single device.
    last = ["--resume", "runs/a", "--checkpoint-every", "0"]
    with processes(last, place, cache) as ((one, two), (end,)):
        one.read_until("step 9/")
        assert f"resuming runs/a after step {max(int(x.name) for x in whole)}" in one.lines
        one.send(signal.SIGKILL)
        assert end.result() != 0
    assert LOST.search(two.stderr)
    _, status, errors = resume(place / "runs" / "a", cache, "--batch-size", "8")
    assert (status, errors) == (0, "")
    assert_same(losses("runs/a"), losses(straight))


@pytest.mark.parametrize(
    ("what", "changes", "told"),
    [
        ("settings", "", "Process 1 has different settings from process 0 (seed): "),
        ("data", "token", "Process 1 has different data from process 0 (shard train_1.bin): "),
        ("data", "shard", "Process 1 has different data from process 0: "),
        ("folder", "", "Process 1 does not see runs/a/holder, which process 0 wrote: "),
    ],
)
def test_processes_that_were_started_differently_all_say_so(place, cache, what, changes, told):
    port, elsewhere = free_port(), place / "elsewhere"
    arguments = [*RUN, "--batch-size", "4", "--run-name", "a", "--device", "cpu"]
    elsewhere.mkdir()
    write_data(elsewhere)
    if changes == "token":
        change_a_token(elsewhere / "train_1.bin", 4_321)
    elif changes == "shard":
        (elsewhere / "train_1.bin").unlink()
    different = ["--seed", "1"] if what == "settings" else []
    with (
        joined(arguments, place, cache, port, 0) as one,
        joined([*arguments, *different], elsewhere, cache, port, 1) as two,
        ThreadPoolExecutor() as threads,
    ):
        ends = [threads.submit(process.end) for process in (one, two)]
        assert [end.result() for end in ends] == [2, 2], one.stderr + two.stderr
    for process in (one, two):
        assert process.stderr.startswith(told)
        assert len(process.stderr.splitlines()) == 1
    assert not Path("runs/a").exists()


def test_when_one_is_told_to_end_all_save_after_the_same_step(straight, place, cache):
    # The run is so long that it cannot end before the signal takes effect.
    long = [*RUN, "--batch-size", "4", "--run-name", "a", "--num-steps", "900"]
    with processes(long, place, cache) as ((one, two), (end,)):
        one.read_until("step 4/")
        two.send(signal.SIGTERM)
        statuses = [one.end(), end.result()]
    assert statuses == [143, 143], one.stderr + two.stderr
    (last,) = (line for line in one.lines if "weights and metrics are in" in line)
    step = int(last.split()[1])
    assert 4 <= step < 900
    assert Path(f"runs/a/checkpoints/{step:08}/manifest.json").exists()
    found = losses("runs/a")
    assert max(found) == step
    # The shorter run's rates are the same up to its cooldown.
    same = range(min(step, LONGER // 2) + 1)
    assert_same(
        {k: v for k, v in found.items() if k in same},
        {k: v for k, v in losses(straight).items() if k in same},
    )


def test_what_the_first_cannot_begin_no_other_begins(place, cache):
    Path("runs/a").mkdir(parents=True)
    with processes([*RUN, "--batch-size", "4", "--run-name", "a"], place, cache) as (
        (one, _),
        (end,),
    ):
        statuses = [one.end(), end.result()]
    assert statuses[0] == 2
    assert re.fullmatch(r"runs/a already exists.*\n", one.stderr)
    assert statuses[1] == 2
    assert list(Path("runs/a").iterdir()) == []


def joining(arguments):
    """Join other processes, none of which starts, for a second."""
    join_processes(f"127.0.0.1:{arguments[0]}", 2, 1, patience=1)


def test_a_process_that_no_other_joins_says_so_and_ends(tmp_path, cache):
    port = free_port()
    with Process([port], tmp_path, cache, main=joining) as process:
        assert process.end() == 2
    told = f"The processes of this run did not find each other at 127.0.0.1:{port} within 1 s: "
    assert process.stderr.startswith(told)
    assert len(process.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_told(place, cache):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with joined(RUN, place, cache, port, 0) as process:
            assert process.end() == 2
    (told,) = process.stderr.splitlines()
    assert told.startswith(f"Process 0 cannot listen at port {port} (Address already in use): ")


def gpus_of_a_task(arguments):
    """Print which GPUs this process takes if JAX joins the others, or if we do."""
    (jax.distributed.initialize if arguments == ["jax"] else join_processes)()
    print(jax.config.read("jax_cuda_visible_devices"))


def test_a_single_task_of_a_machine_takes_all_its_gpus(tmp_path, cache):
    """JAX itself would have given it the one with its local number."""
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": f"{free_port()}",
    }
    for who, gpus in (("jax", "0"), ("we", "all")):
        with Process([who], tmp_path, cache, environment=slurm, main=gpus_of_a_task) as process:
            assert process.end() == 0, process.stderr
        assert process.output == f"{gpus}\n", process.stderr


def alone_together(arguments):
    """Be the only process of a run, and say who trains."""
    join_processes(f"127.0.0.1:{arguments[0]}", 1, 0)
    print(processes_line())


def test_who_trains_together_is_told_with_the_coordinator_s_address(tmp_path, cache):
    port = free_port()
    with Process([port], tmp_path, cache, devices=3, main=alone_together) as process:
        assert process.end() == 0, process.stderr
    assert process.output == f"1 processes, 3 devices each, coordinator 127.0.0.1:{port}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--num-processes", "2"], "belong together"),
        (["--coordinator-address", "a:1", "--num-processes", "2"], "belong together"),
        (
            ["--coordinator-address", "a:1", "--num-processes", "2", "--process-id", "2"],
            "process_id must be 0 to num_processes - 1",
        ),
        (
            ["--coordinator-address", "a", "--num-processes", "2", "--process-id", "0"],
            "host:port",
        ),
        (
            ["--coordinator-address", "a:99999", "--num-processes", "2", "--process-id", "0"],
            "host:port",
        ),
    ],
)
def test_arguments_that_join_nothing_are_told_in_one_sentence(arguments, told, capsys):
    assert train_gpt.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert told in sentence


def test_the_run_of_another_process_writes_nothing(tmp_path, capsys):
    with SilentRun(tmp_path) as run:
        run.configure({}, {})
        run.say("hello")
        run.table({"a": "b"})
        run.progress(1, 2, "hello")
        run.record({"step": 1})
        run.rewind(0)
        run.sync()
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_all_plan_for_the_least_memory_that_any_has(monkeypatch):
    assert (least(2**33 + 1), least(None)) == (2**33 + 1, None)  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    other = np.float32(2**34)
    monkeypatch.setattr(
        nanogpt.devices.processes, "process_allgather", lambda here: np.stack([here, other])
    )
    assert [least(memory) for memory in (2**33, 2**35, None)] == [2**33, 2**34, None]
