"""Running commands in benchmarks, and reading the metrics of train_gpt.py's runs."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT, Mistake


def output_of(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    shown: bool = True,
) -> str:
    """Run a command and return its output, shown as it is printed; raises Mistake if it fails.

    The default `environment` is that of this process.
    """
    if shown:
        print("\n$", shlex.join(command), flush=True)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        process = subprocess.Popen(command, cwd=folder, env=environment, errors="replace", **pipe)
    except OSError as error:
        raise Mistake(f"{command[0]} cannot be run ({error.strerror}).") from error
    output = ""
    with process:
        for line in process.stdout:
            if shown:
                print(line, end="", flush=True)
            output += line
    if process.returncode:
        status = process.returncode
        raise Mistake(f"{shlex.join(command)} ended with status {status}; its output ends:", output)
    return output


def train(
    arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    shown: bool = True,
) -> Path:
    """Run train_gpt.py in a folder, and return the folder of its run."""
    command = [sys.executable, str(ROOT / "train_gpt.py"), *arguments.split()]
    output_of(command, folder, environment, shown=shown)
    (run,) = (folder / "runs").iterdir()
    return run


class Watched:
    """A command in a folder, whose output is shown and read as it comes."""

    def __init__(self, command: Sequence[str], folder: Path, settings: Mapping[str, str]):
        """Start it in a folder, with these settings besides those of the environment."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(settings)
        self.output = ""
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, errors="replace", **pipe
        )

    def read_until(self, text: str) -> str:
        """Read on to the next line with `text` in it, and return that line; "" if none comes."""
        for line in self._process.stdout or ():
            print(line, end="", flush=True)
            self.output += line
            if text in line:
                return line
        return ""

    def end(self) -> int:
        """Read all that is still to come, and return the exit status."""
        for line in self._process.stdout or ():
            print(line, end="", flush=True)
            self.output += line
        return self._process.wait()

    def stop(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def median_step_s(run: Path, warm_up: int) -> float:
    """Return the median seconds per step, without the first `warm_up` steps."""
    return statistics.median(step["step_time_s"] for step in logged(run)[warm_up:])
