"""Launchers' environments, and the recipes in launch/, run if the launcher is available."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import yaml

import nanogpt.devices.launchers
import train_gpt
from nanogpt.devices.launchers import LAUNCHERS, has_its_gpus_alone, launched_with_others
from tests.devices.test_processes import QUIET, assert_same, forget_launchers, losses
from tests.programs import PATIENCE, SCRIPT, wait_until
from tests.small_runs import RUN

LAUNCH = Path(SCRIPT).parent / "launch"
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
WITHOUT_GPUS = ("--ntasks-per-node=2", "--gpus-per-node=0")
ARGUMENTS = (*RUN, "--batch-size", "4", "--checkpoint-every", "0")  # saved at the end, and if told


@pytest.fixture
def checkout(place, cache, monkeypatch):
    """A working directory like a user's: program, recipes and data; `python3` is this Python."""
    Path("train_gpt.py").symlink_to(SCRIPT)
    Path("launch").symlink_to(LAUNCH)
    settings = {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for name, value in (QUIET | settings).items():
        monkeypatch.setenv(name, value)
    return place


def test_every_script_is_bash_and_the_executable_ones_say_so():
    for script in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK) == script.read_text().startswith("#!"), script


# Starting or resuming


def start(name, *arguments):
    """Run launch/start_or_resume.sh with a name and arguments; return what it does."""
    print_them = 'set -eu; source "$0" "$@"; printf "%s\\n" "${start[@]}"'
    script = LAUNCH / "start_or_resume.sh"
    done = subprocess.run(
        ["bash", "-c", print_them, script, name, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_job_starts_once_and_then_goes_on_from_its_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--sample-prompt", "Once upon"
    assert start("a", *arguments) == [*arguments, "--run-name", "a.0"]
    Path("runs/ab.0/checkpoints/00000007").mkdir(parents=True)
    Path("runs/ab.0/checkpoints/00000007/manifest.json").touch()  # another job's
    Path("runs/a.0/checkpoints/00000003").mkdir(parents=True)  # not complete
    assert start("a", *arguments) == [*arguments, "--run-name", "a.1"]
    Path("runs/a.1/checkpoints/00000007").mkdir(parents=True)
    Path("runs/a.1/checkpoints/00000007/manifest.json").touch()
    assert start("a", *arguments) == ["--resume", "runs/a.1"]


# Open MPI


@pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="needs Open MPI: apt install openmpi-bin"
)
def test_open_mpi_starts_them_without_any_argument(straight, checkout):
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    done = subprocess.run(
        ["launch/mpirun.sh", "2", *ARGUMENTS, "--run-name", "a"],
        env=os.environ | allowed,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu in 2 processes" in done.stdout
    assert_same(losses("runs/a"), losses(straight))


# Slurm


@contextmanager
def slurm(folder):
    """A private cluster with one node, this machine: yields the environment to use it."""
    with ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        controller, node = (port.getsockname()[1] for port in ports)
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    (folder / "spool").mkdir()
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthInfo=socket={folder}/munge,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    commands = [
        [
            *("munged", "--foreground", "--force", f"--key-file={folder}/key"),
            *(f"--socket={folder}/munge", f"--pid-file={folder}/munged.pid"),
            *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"),
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    started = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.out").open("w")
            with log:
                started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_until((folder / "munge").exists)
        wait_until(lambda: pause() or "idle" in asked(env, "sinfo", "--noheader"))
        yield env
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(PATIENCE)


def asked(env, *command):
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout


@pytest.mark.skipif(
    not all(shutil.which(name, path=f"/usr/sbin:{os.environ['PATH']}") for name in SLURM)
    or os.getuid() != 0,
    reason="needs to be root, and Slurm: apt install slurmctld slurmd slurm-client munge",
)
def test_a_slurm_job_that_is_told_to_end_saves_and_comes_back_and_goes_on_to_the_same_end(
    straight,
    checkout,
    tmp_path_factory,
):
    folder = tmp_path_factory.mktemp("slurm")  # a socket's path is limited to 107 characters
    with slurm(folder) as env:
        submit = "sbatch", "--parsable", *WITHOUT_GPUS, "--output=job.log", "launch/slurm.sbatch"
        job = subprocess.check_output([*submit, *ARGUMENTS], env=env, text=True).strip()
        run, log = Path(f"runs/slurm-{job}.0"), Path("job.log")
        # Paused at its first step, so that it does not end before the signal.
        wait_until(lambda: (run / "metrics.jsonl").exists() and losses(run))
        first = int((run / "holder").read_text().split()[1])
        os.kill(first, signal.SIGSTOP)
        asked(env, "scancel", "--signal=TERM", job)  # as --signal does before the time limit
        # The other process tells it; JAX looks only once a second.
        wait_until(lambda: "SIGTERM caught" in log.read_text())
        os.kill(first, signal.SIGCONT)
        wait_until(lambda: pause() or not asked(env, "squeue", "--noheader", f"--jobs={job}"))
    log = log.read_text()
    assert "2 x cpu in 2 processes" in log
    assert f"Interrupted. Resume with: python3 train_gpt.py --resume {run}" in log
    assert f"resuming {run}" in log
    assert list(Path("runs").iterdir()) == [run]
    assert_same(losses(run), losses(straight))


def pause():
    time.sleep(0.5)


def test_the_slurm_job_has_a_process_per_gpu_is_warned_and_comes_back():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH --")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # to the processes, not to the script (B:)
    assert options["requeue"] == ""
    assert options["open-mode"] == "append"


# Kubernetes


def test_the_jobset_is_as_jax_looks_for_its_processes():
    """Each field is as in JobSet's v1alpha2 and JAX's K8sCluster."""
    found = {it["kind"]: it for it in yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())}
    jobset = found["JobSet"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    # JAX calls process 0 <job>-0.<jobset>: no other subdomain, and all processes in one job.
    assert "network" not in jobset["spec"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX
    assert job["parallelism"] == job["completions"] > 1  # JAX counts by parallelism
    # If any process fails, all are restarted.
    assert job["backoffLimit"] == 0
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    # JAX lists pods and reads the job.
    assert {
        (resource, verb)
        for rule in found["Role"]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    } == {("pods", "list"), ("jobs", "get")}
    account = found["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    assert found["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_jax_finds_the_jobset_s_processes_with_no_more_than_it_may_ask(monkeypatch):
    """With JAX's own code, in a fake cluster with the fields that JobSet's controller sets."""
    from jax._src.clusters import K8sCluster

    found = {it["kind"]: it for it in yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())}
    name = found["JobSet"]["metadata"]["name"]
    (replicated,) = found["JobSet"]["spec"]["replicatedJobs"]
    job_name, calls = f"{name}-{replicated['name']}-0", set()
    labels = {"job-name": job_name, "jobset.sigs.k8s.io/jobset-name": name}
    spec = SimpleNamespace(
        subdomain=name, parallelism=replicated["template"]["spec"]["parallelism"]
    )
    owner = SimpleNamespace(controller=True, kind="Job", name=job_name)
    metadata = SimpleNamespace(name=job_name, labels=labels, owner_references=[owner])

    def pods(**_):
        calls.add(("pods", "list"))
        return SimpleNamespace(items=[SimpleNamespace(metadata=metadata, spec=spec)])

    def job(name, **_):
        calls.add(("jobs", "get"))
        assert name == job_name
        return SimpleNamespace(metadata=metadata, spec=spec)

    fakes = {
        "_core_api": SimpleNamespace(list_namespaced_pod=pods),
        "_batch_api": SimpleNamespace(read_namespaced_job=job),
        "_ApiException": OSError,
        "_namespace": lambda: "default",
    }
    for attribute, fake in fakes.items():
        monkeypatch.setattr(K8sCluster, attribute, fake, raising=False)
    monkeypatch.setenv("HOSTNAME", "localhost")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    # Pods are <jobset>-<replicated job>-<its number>-<index>, in a domain named as the jobset.
    address = K8sCluster.get_coordinator_address(None, None)
    assert address.partition(":")[0] == "nanogpt-train-0-0.nanogpt"
    assert (K8sCluster.get_process_count(), K8sCluster.get_process_id()) == (2, 1)
    assert K8sCluster.get_local_process_id() is None  # a pod's process takes all its GPUs
    for resource, verb in calls:
        assert any(
            resource in rule["resources"] and verb in rule["verbs"]
            for rule in found["Role"]["rules"]
        )


def test_the_jobset_s_command_starts_the_program(checkout):
    found = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    job = next(found)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    python = Path("bin/python3")
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    told = subprocess.run(
        [*container["command"], *container["args"]],
        env=os.environ | {"PATH": f"bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (told.stdout, told.stderr) == ("train_gpt.py --run-name nanogpt.0\n", "")


# TPU pods


def test_a_tpu_pod_is_asked_to_run_it_on_all_hosts(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    gcloud.chmod(0o755)
    told = subprocess.run(
        [
            *(LAUNCH / "tpu_pod.sh", "my-pod", "us-central2-b", "/mnt/my gpt"),
            *("--sample-prompt", "it's; $HOME"),
        ],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    *words, command = told.stdout.splitlines()
    assert words == [
        *("compute", "tpus", "tpu-vm", "ssh", "my-pod"),
        *("--zone=us-central2-b", "--worker=all"),
    ]
    remote = command.removeprefix("--command=").replace("exec python3", "printf '%s\\n'")
    remote = remote.replace("cd /mnt/my\\ gpt && ", "")
    assert subprocess.run(["bash", "-c", remote], capture_output=True, text=True).stdout == (
        "train_gpt.py\n--sample-prompt\nit's; $HOME\n"
    )


# Launchers' environments


SLURM = dict.fromkeys(LAUNCHERS["SLURM_STEP_NUM_TASKS"], "2")
OMPI = dict.fromkeys(LAUNCHERS["OMPI_COMM_WORLD_SIZE"], "2")


@pytest.mark.parametrize(
    ("environment", "others"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # not by srun
        ({"SLURM_STEP_NUM_TASKS": "2", **SLURM}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": ""}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", **OMPI}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        # mpirun within a job of two machines: it reaches the second by srun
        ({"OMPI_COMM_WORLD_SIZE": "2", **OMPI, "SLURM_STEP_NUM_TASKS": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", **SLURM, "PMI_SIZE": "2"}, True),  # srun --mpi=pmi2
        ({"PMI_SIZE": "1", "WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod like any other
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # no TPU here
    ],
)
def test_launchers_are_recognized_by_what_they_set(monkeypatch, environment, others):
    forget_launchers(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_with_others() is others


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PMI_SIZE": "2"}, "PMI_SIZE says that there are 2 processes, but JAX does not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE says that there are 4 processes, but JAX does not"),
        (
            {"SLURM_STEP_NUM_TASKS": "2", **SLURM, "SLURM_LOCALID": "", "SLURM_STEP_NODELIST": ""},
            "but SLURM_STEP_NODELIST, SLURM_LOCALID are not set: give each process --coordinator-",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", **OMPI, "OMPI_MCA_orte_hnp_uri": ""},  # Open MPI 5
            "but OMPI_MCA_orte_hnp_uri is not set: give each process --coordinator-address, --num-",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", **OMPI},
            "JAX could not join the processes of this run (",
        ),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS must be a number, not 'two': "),
    ],
)
def test_a_launcher_that_tells_too_little_is_named_in_one_sentence(
    monkeypatch, capsys, environment, told
):
    forget_launchers(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train_gpt.main([]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert told in sentence


@pytest.mark.parametrize(
    ("variables", "metadata", "others"),
    [
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_PROCESS_ADDRESSES_PATH": "addresses"}, None, True),
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
    tmp_path, monkeypatch, variables, metadata, others
):
    monkeypatch.chdir(tmp_path)
    Path("addresses").write_text("a:8471,b:8471\n")

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, name = self.path.rpartition("/")
            known = path == "/computeMetadata/v1/instance/attributes" and name in (metadata or {})
            self.send_response(200 if known and self.headers["Metadata-Flavor"] else 404)
            self.end_headers()
            self.wfile.write(metadata[name].encode() if known else b"")

        def log_message(self, *_):
            pass

    forget_launchers(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(nanogpt.devices.launchers, "has_tpu", lambda: True)
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        if metadata is None:
            server.server_close()
        else:
            Thread(target=server.serve_forever, daemon=True).start()
        assert launched_with_others() is others
        if metadata is not None:
            server.shutdown()


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, False),
        # srun --gpus-per-task=1
        (
            {
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_STEP_NUM_NODES": "1",
                "CUDA_VISIBLE_DEVICES": "3",
            },
            True,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
                "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
            },
            False,
        ),
    ],
)
def test_whether_gpus_are_shared_is_told_by_the_launcher(monkeypatch, environment, alone):
    forget_launchers(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_its_gpus_alone() is alone
