"""Several processes that train together, real ones, over the loopback interface."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from test_resume import RUN, STEPS, Process, cache, place, straight, wait_until  # noqa: F401
from test_train_gpt import SCRIPT

import nanogpt.environment
from nanogpt.environment import launched_with_others
from nanogpt.tracking import SilentRun

QUIET = {"GLOO_LOG_LEVEL": "ERROR"}


@contextmanager
def processes(arguments, cwd, cache, count=2, devices=2):  # noqa: F811
    """`train_gpt.py` in so many processes with so many devices each, joined by arguments."""
    with socket.create_server(("127.0.0.1", 0)) as free, ExitStack() as stack:
        port = free.getsockname()[1]
        free.close()
        started = [
            stack.enter_context(
                Process(
                    [
                        *("--coordinator-address", f"127.0.0.1:{port}"),
                        *("--num-processes", count, "--process-id", number, *arguments),
                    ],
                    cwd,
                    cache,
                    devices,
                    environment=QUIET,
                )
            )
            for number in range(count)
        ]
        # The others are read all the time: a process whose output nobody reads waits.
        threads = stack.enter_context(ThreadPoolExecutor(count))
        yield started, [threads.submit(process.end) for process in started[1:]]


def losses(run):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return {record["step"]: (record["train_loss"], record.get("val_loss")) for record in records}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for step, (train_loss, val_loss) in expected.items():
        assert found[step][0] == pytest.approx(train_loss, rel=1e-5), step
        assert found[step][1] == (val_loss and pytest.approx(val_loss, rel=1e-5)), step


def without_gloo(text):
    """Output but for what Gloo says of its connections, on the standard output."""
    return [line for line in text if "Gloo" not in line and "peer ranks" not in line]


def test_two_processes_train_as_one_does_and_the_first_alone_tells(straight, place, cache):  # noqa: F811
    with processes([*RUN, "--batch-size", "1", "--run-name", "a"], place, cache) as (
        (one, two),
        (end,),
    ):
        statuses = [one.end(), end.result()]
    assert statuses == [0, 0], (one.stderr, two.stderr)
    assert_same(losses("runs/a"), losses(straight))
    first = without_gloo(one.lines)[0]
    together = r"\| 4 x cpu of 2 processes, 2 devices in each, coordinator 127\.0\.0\.1:\d+ \|"
    assert re.search(together, first)
    assert "Ng = 256 / (1 * 32 * 4) = 2" in first
    assert without_gloo(two.lines) == []
    steps = [line for line in one.lines if "train loss" in line and line.startswith("step")]
    assert len(steps) == STEPS
    assert len(list(Path("runs").iterdir())) == 1
    config = json.loads(Path("runs/a/config.json").read_text())
    assert config["process_id"] is None  # another launch has other numbers


def test_when_one_is_killed_the_other_ends_and_the_run_goes_on_on_other_devices(
    straight,  # noqa: F811
    place,  # noqa: F811
    cache,  # noqa: F811
):
    with processes([*RUN, "--batch-size", "2", "--run-name", "a"], place, cache) as (
        (one, two),
        (end,),
    ):
        one.read_until("step 10/")
        wait_until(Path("runs/a/checkpoints/00000007/manifest.json").exists)
        one.send(signal.SIGKILL)
        status = end.result()
    assert status != 0
    assert "another task died" in two.stderr
    shutil.copytree("runs/a", "runs/b")
    with Process(["--resume", "runs/a", "--batch-size", "2"], place, cache, 4) as alone:
        assert (alone.end(), alone.stderr) == (0, "")
    assert "resuming runs/a after step 7" in alone.lines
    with processes(["--resume", "runs/b"], place, cache, count=4, devices=1) as (four, ends):
        statuses = [four[0].end(), *(end.result() for end in ends)]
    assert statuses == [0] * 4, four[0].stderr
    for run in ("runs/a", "runs/b"):
        assert_same(losses(run), losses(straight))


def test_when_one_is_told_to_end_all_save_after_the_same_step(straight, place, cache):  # noqa: F811
    # So long a run that it cannot end before the signal is minded.
    long = [*RUN, "--batch-size", "2", "--run-name", "a", "--num-steps", "900"]
    with processes(long, place, cache) as ((one, two), (end,)):
        one.read_until("step 4/")
        two.send(signal.SIGTERM)
        statuses = [one.end(), end.result()]
    assert statuses == [143, 143], (one.stderr, two.stderr)
    (last,) = (line for line in one.lines if line.startswith("weights and metrics of "))
    step = int(last.split()[4])
    assert 4 <= step < 900
    assert Path(f"runs/a/checkpoints/{step:08}/manifest.json").exists()
    found = losses("runs/a")
    assert max(found) == step
    # The shorter run's rates are the same up to its cooldown.
    same = range(min(step, STEPS // 2) + 1)
    assert_same(
        {k: v for k, v in found.items() if k in same},
        {k: v for k, v in losses(straight).items() if k in same},
    )


def test_what_the_first_cannot_begin_no_other_begins(place, cache):  # noqa: F811
    Path("runs/a").mkdir(parents=True)
    with processes([*RUN, "--batch-size", "2", "--run-name", "a"], place, cache) as (
        (one, _),
        (end,),
    ):
        statuses = [one.end(), end.result()]
    assert statuses[0] == 2
    assert re.fullmatch(r"runs/a exists already.*\n", one.stderr)
    assert statuses[1] != 0
    assert list(Path("runs/a").iterdir()) == []


def test_a_process_that_no_other_joins_says_so_and_ends(tmp_path):
    code = (
        "from nanogpt.mesh import join_processes; join_processes('127.0.0.1:{}', 2, 1, patience=1)"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", code.format(port)],
        cwd=Path(SCRIPT).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    told = f"The processes of this run did not find each other at 127.0.0.1:{port} within 1 s: "
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == 1


def test_who_trains_together_is_told_with_the_coordinator_s_address():
    code = (
        "from nanogpt.mesh import join_processes, processes_line; "
        "join_processes('127.0.0.1:{}', 1, 0); print(processes_line())"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", code.format(port)],
        cwd=Path(SCRIPT).parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"1 processes, 3 devices in each, coordinator 127.0.0.1:{port}\n"


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
    ],
)
def test_arguments_that_join_nothing_are_told_in_one_sentence(arguments, told, capsys):
    import train_gpt

    assert train_gpt.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert told in sentence


@pytest.mark.parametrize(
    ("environment", "others"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # not by srun
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod like any other
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # no TPU here
    ],
)
def test_launchers_are_recognised_by_what_they_set(monkeypatch, environment, others):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_with_others() is others


@pytest.mark.parametrize(
    ("variables", "metadata", "others"),
    [
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, True),  # as Kubernetes on Google Cloud sets it
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, None, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, None, True),
        ({}, {"worker-network-endpoints": "10.0.0.1"}, False),
        ({}, {"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2"}, True),
        (
            {},
            {"worker-network-endpoints": "a", "tpu-env": "ZONE: 'b'\nMEGASCALE_NUM_SLICES: '2'"},
            True,
        ),
        ({}, {}, False),  # a server that knows of no TPU
        ({}, None, False),  # none
    ],
)
def test_tpu_hosts_are_told_by_variables_or_by_the_cloud_s_metadata(
    monkeypatch, variables, metadata, others
):
    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, name = self.path.rpartition("/")
            known = path == "/computeMetadata/v1/instance/attributes" and name in (metadata or {})
            self.send_response(200 if known and self.headers["Metadata-Flavor"] else 404)
            self.end_headers()
            self.wfile.write(metadata[name].encode() if known else b"")

        def log_message(self, *_):
            pass

    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(nanogpt.environment, "has_tpu", lambda: True)
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        if metadata is None:
            server.server_close()
        else:
            Thread(target=server.serve_forever, daemon=True).start()
        assert launched_with_others() is others
        if metadata is not None:
            server.shutdown()


def test_what_jax_cannot_find_out_from_a_launcher_is_told_in_one_sentence(monkeypatch, capsys):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # Open MPI 5 does not tell where the first is
    import train_gpt

    assert train_gpt.main([]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "--coordinator-address" in sentence


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
