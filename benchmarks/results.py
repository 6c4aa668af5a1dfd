"""Where a benchmark's figures go: `results/<name>.json`, with what is needed to repeat them."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


def save(name: str, figures: dict[str, Any]) -> None:
    """Write the figures beside command, date, commit, hardware and versions, and say where."""
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv]
    context = {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(words[0]).stem}", *words[1:]]),
        "date": f"{date.today()}",
        "commit": _commit(),
        "hardware": f"{os.cpu_count()} x {_processor()}",
        "python": platform.python_version(),
        "jax": version("jax"),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(context | figures, indent=2) + "\n")
    print(f"written to {path}")


def _commit() -> str:
    """The commit that was measured; "-dirty" if the code, and not only results, differs from it."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=FOLDER.parent, text=True, capture_output=True)

    same = git("diff", "--quiet", "HEAD", "--", ":/", ":!/benchmarks/results").returncode == 0
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("" if same else "-dirty")


def _processor() -> str:
    """The processor's name, and whether it has AVX-512, which the name need not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name}, AVX-512" if "avx512f" in fields.get("flags", "") else name
