"""What the launcher provides: Slurm, Open MPI, Kubernetes or a TPU pod.

JAX is not imported here, so that errors in the arguments of a single process appear at once.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

from nanogpt.checks import ConfigError

TPU_DEVICES = "/dev/accel0", "/dev/vfio/0"


# By the variable with the number of processes, the others that JAX needs. They are in JAX's order,
# as mpirun may run within a Slurm job. srun sets the number of its tasks; a script without srun may
# still see the job's other variables.
LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": (
        *("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ),
    "SLURM_STEP_NUM_TASKS": (
        *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ),
}
UNKNOWN = "PMI_SIZE", "WORLD_SIZE"  # MPICH and Intel MPI; torchrun: unsupported by JAX
GIVE = "give each process --coordinator-address, --num-processes and --process-id"


def launched_with_others() -> bool:
    """Return whether a launcher started this process as one of several.

    Raises ConfigError if it does not provide what JAX needs to join the others.
    """
    env = os.environ
    for name, needed in LAUNCHERS.items():
        if (count := _number(name)) is not None:
            missing = [each for each in needed if not env.get(each)]
            if count > 1 and missing:
                raise ConfigError(
                    f"{name} says that there are {count} processes, but {', '.join(missing)} "
                    f"{'is' if len(missing) == 1 else 'are'} not set: {GIVE}, or unset {name}."
                )
            return count > 1
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    if in_kubernetes or (has_tpu() and _tpu_hosts() > 1):
        return True
    for name in UNKNOWN:
        if (count := _number(name) or 1) > 1:
            raise ConfigError(
                f"{name} says that there are {count} processes, but JAX does not support that "
                f"launcher: {GIVE}, or unset {name}."
            )
    return False


def _number(name: str) -> int | None:
    """Return the number in a variable, None if it is not set; raises ConfigError for other text."""
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise ConfigError(f"{name} must be a number, not {text!r}: correct or unset it.")
    return int(text) if text else None


def has_its_gpus_alone() -> bool:
    """Return whether no other process of the launcher shares the GPUs visible to this one.

    If others do, JAX makes each task of Slurm or Open MPI use the GPU with its local number.
    """
    env = os.environ
    tasks, machines = env.get("SLURM_STEP_NUM_TASKS"), env.get("SLURM_STEP_NUM_NODES")
    alone = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1" if tasks == machines else "") == "1"
    return alone or env.get("CUDA_VISIBLE_DEVICES", "").isdecimal()  # it sees a single GPU


def has_tpu() -> bool:
    """Return whether JAX will find TPU chips here."""
    return find_spec("libtpu") is not None and any(map(os.path.exists, TPU_DEVICES))


def _tpu_hosts() -> int:
    """Return the number of hosts of the TPU slices, from variables or Google's metadata server."""
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if path := env.get("TPU_PROCESS_ADDRESSES_PATH"):  # JAX 0.12 prefers it
        hosts = Path(path).read_text(encoding="utf-8")
    slices = _number("MEGASCALE_NUM_SLICES")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in env:
        hosts = _metadata("worker-network-endpoints")
        told = re.search(r"^MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env"), re.MULTILINE)
        slices = slices or (told and told[1])
    return len((hosts or "").split(",")) * int(slices or 1)


def _metadata(name: str) -> str:
    """Return an attribute from Google Cloud's metadata server; empty if there is none."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    try:
        with urlopen(Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no such server or attribute
        return ""
