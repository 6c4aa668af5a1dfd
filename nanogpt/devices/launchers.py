"""What the launcher of a process tells it: Slurm, Open MPI, Kubernetes, or a TPU pod.

No JAX here: a process that trains alone answers mistakes without loading it.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

TPU_DEVICES = "/dev/accel0", "/dev/vfio/0"


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
