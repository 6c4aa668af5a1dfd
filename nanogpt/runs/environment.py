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
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")  # Linux's; other systems have none
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
