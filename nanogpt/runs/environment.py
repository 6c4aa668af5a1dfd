"""The environment of a process, on which its results depend besides the settings."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")  # only on Linux
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Return what is needed to repeat this process, for JSON.

    command       as typed, with absolute paths shortened to their last part
    date          ISO 8601, to the second, UTC
    commit        abbreviated; "-dirty" if the code differs from it, "unknown" if not in git
    hardware      number and name of the processors
    accelerators  number and name of each kind that JAX uses; empty if JAX is not loaded
    python, jax, jaxlib, flax, optax, orbax-checkpoint, numpy     their versions
    """
    return {
        "command": shlex.join(["python", *map(without_folders, sys.orig_argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": f"{os.cpu_count()} x {_processor()}",
        "accelerators": _accelerators(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def without_folders(word: str) -> str:
    """Shorten /a/b to b and --option=/a/b to --option=b: folders depend on the machine."""
    return re.sub(r"^(--[\w.-]+=)?/(.*/)?(?=[^/])", r"\1", word)


def _commit() -> str:
    """Return the commit of this code; changes to measured results do not make it "-dirty"."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, text=True, capture_output=True
        )

    try:
        # A copy installed into another repository is not that repository's code.
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return "unknown"
        outcomes = ":!/benchmarks/results", ":!/records"
        same = git("diff", "--quiet", "HEAD", "--", ":/", *outcomes).returncode == 0
        return git("rev-parse", "--short", "HEAD").stdout.strip() + ("" if same else "-dirty")
    except OSError:  # git is not installed
        return "unknown"


def _processor() -> str:
    """Return the processor's name, and whether it has AVX-512."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name}, AVX-512" if "avx512f" in fields.get("flags", "") else name


def _accelerators() -> list[str]:
    """Return the accelerators, e.g. ["8 x NVIDIA H200"], without loading JAX only for this."""
    if "jax" not in sys.modules:
        return []
    import jax

    kinds = Counter(device.device_kind for device in jax.devices() if device.platform != "cpu")
    return [f"{count} x {kind}" for kind, count in kinds.items()]
