"""Where and how a process runs: what its figures depend on besides the settings."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

CPUINFO = Path("/proc/cpuinfo")  # Linux's; other systems have none
TPU_DEVICES = "/dev/accel0", "/dev/vfio/0"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """What is needed to repeat this process, for JSON.

    command       as it was typed, but that absolute paths lose their folders
    date          ISO 8601, to the second, UTC
    commit        abbreviated; "-dirty" if the code differs from it, "unknown" if it cannot be told
    hardware      number and name of the processors
    accelerators  number and name of each kind that JAX uses; empty where JAX is not loaded
    python, jax, jaxlib, flax, optax, orbax-checkpoint, numpy     their versions
    """
    return {
        "command": shlex.join(["python", *map(_without_folders, sys.orig_argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": f"{os.cpu_count()} x {_processor()}",
        "accelerators": _accelerators(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def launched_with_others() -> bool:
    """Whether a launcher started this process as one of several."""
    env = os.environ
    # In the order in which JAX asks: mpirun may run within a job of Slurm. srun sets the number of
    # its own tasks; a script that is not run by it may see the job's other names.
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if name in env:
            return int(env[name]) > 1
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return in_kubernetes or (has_tpu() and _tpu_hosts() > 1)


def has_its_gpus_alone() -> bool:
    """Whether a launcher started no other process that is to use the GPUs which this one sees.

    Otherwise JAX has each task of Slurm or Open MPI use the one with the task's local number.
    """
    env = os.environ
    tasks, machines = env.get("SLURM_STEP_NUM_TASKS"), env.get("SLURM_STEP_NUM_NODES")
    alone = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1" if tasks == machines else "") == "1"
    return alone or env.get("CUDA_VISIBLE_DEVICES", "").isdecimal()  # it was given a single one


def has_tpu() -> bool:
    """Whether JAX will find TPU chips here."""
    return find_spec("libtpu") is not None and any(map(os.path.exists, TPU_DEVICES))


def _tpu_hosts() -> int:
    """How many hosts the TPU slices of this one have, as variables tell it or Google's cloud."""
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if path := env.get("TPU_PROCESS_ADDRESSES_PATH"):  # JAX 0.12 prefers it
        hosts = Path(path).read_text(encoding="utf-8")
    slices = env.get("MEGASCALE_NUM_SLICES")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in env:
        hosts = _metadata("worker-network-endpoints")
        told = re.search(r"^MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env"), re.MULTILINE)
        slices = slices or (told and told[1])
    return len((hosts or "").split(",")) * int(slices or 1)


def _metadata(name: str) -> str:
    """What Google's cloud tells its machines of themselves; empty where it tells nothing."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    try:
        with urlopen(Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no such server, or it knows no such name
        return ""


def _without_folders(word: str) -> str:
    """/a/b as b and --option=/a/b as --option=b: folders tell of the machine, not of the run."""
    return re.sub(r"^(--[\w.-]+=)?/(.*/)?(?=[^/])", r"\1", word)


def _commit() -> str:
    """The commit of this code; only what was measured, which lies beside it, may differ from it."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, text=True, capture_output=True
        )

    try:
        # A copy that was installed into somebody's repository is not that repository's code.
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return "unknown"
        outcomes = ":!/benchmarks/results", ":!/records"
        same = git("diff", "--quiet", "HEAD", "--", ":/", *outcomes).returncode == 0
        return git("rev-parse", "--short", "HEAD").stdout.strip() + ("" if same else "-dirty")
    except OSError:  # there is no git
        return "unknown"


def _processor() -> str:
    """The processor's name, and whether it has AVX-512, which the name need not tell."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name}, AVX-512" if "avx512f" in fields.get("flags", "") else name


def _accelerators() -> list[str]:
    """Such as ["8 x NVIDIA H200"]; a process that does without JAX need not load it for this."""
    if "jax" not in sys.modules:
        return []
    import jax

    kinds = Counter(device.device_kind for device in jax.devices() if device.platform != "cpu")
    return [f"{count} x {kind}" for kind, count in kinds.items()]
