"""A process of a run, and killing it at a chosen moment."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from benchmarks.command import ROOT
from benchmarks.reliability.left_behind import checkpoints, metrics, unfinished

PATIENCE = 300.0  # seconds without any sign after which a process hangs
VALIDATE = 20  # steps between validations


class Different(Exception):
    """What the soak is there to find."""


@dataclass(frozen=True)
class Death:
    """One kill, and what was lost by it."""

    signal: str
    phase: str  # what the process was at
    reached: int  # last step that metrics.jsonl has
    saved: int  # step of the newest whole checkpoint, 0 for none

    def __str__(self) -> str:
        return f"{self.signal} at {self.phase}: step {self.saved} saved, {self.reached} reached"


class Incarnation:
    """One process of a run, whose console is read as it comes."""

    def __init__(self, arguments: list[str], place: Path):
        cache = place / "cache"
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_gpt.py"), *arguments],
            cwd=place,
            env=os.environ
            | {
                "XDG_CACHE_HOME": str(cache),
                "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_ENABLE_COMPILATION_CACHE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        self.lines: list[str] = []
        self.more = Event()  # set with every line
        self.reader = Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.more.set()
        self.more.set()

    def wait(self) -> int:
        """The exit status."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Different(f"a process does not end ({self.ended})") from None
        self.reader.join()
        self.process.stdout.close()
        return status

    @property
    def ended(self) -> str:
        """How it did, for a message."""
        return f"status {self.process.returncode}: " + " / ".join(self.lines[-3:])

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Return when it is true, or the process has ended."""
        deadline = time.monotonic() + PATIENCE
        while not true() and self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
                raise Different(f"a process does nothing ({self.ended})")
            self.more.wait(0.002)
            self.more.clear()

    @property
    def step(self) -> int:
        """The last step on the console, 0 before the first."""
        steps = [line for line in list(self.lines) if line.startswith("step ")]
        return int(steps[-1].split()[1].split("/")[0]) if steps else 0

    def at(self) -> str:
        """What it is at, as far as its console says."""
        lines = list(self.lines)
        if not any(" preset | " in line for line in lines):
            return "start-up"
        if not any(line.startswith("step ") for line in lines):
            return "compilation"
        last = next(line for line in reversed(lines) if line.startswith("step "))
        due = int(last.split()[1].split("/")[0]) % VALIDATE == 0
        return "validation" if due and "train loss" in last else "training"


def kill(
    arguments: list[str],
    place: Path,
    kind: signal.Signals,
    phase: str,
    upto: int,
    draw: random.Random,
) -> Death:
    """Start a process of the run, and kill it: in that phase, if it comes soon after step `upto`.

    What it was at is told by what it said, and what it left, not by what was aimed at.
    """
    run = place / "runs" / "killed"
    begun, left = max(checkpoints(run), default=0), unfinished(run)
    process = Incarnation(arguments, place)

    def now() -> str:
        return "saving" if unfinished(run) - left else process.at()

    wait = draw.uniform(0, 0.05)
    if phase == "start-up":
        wait = draw.uniform(0, 2)
    elif phase == "compilation":
        process.wait_until(lambda: process.at() != "start-up")
        wait = draw.uniform(0, 0.5)
    else:
        step = draw.randint(begun, upto)
        process.wait_until(lambda: process.step >= step)
        if phase != "training":
            process.wait_until(lambda: now() == phase or process.step > step + VALIDATE)
    time.sleep(wait)
    was = now()
    process.process.send_signal(kind)
    status = process.wait()
    if status not in {-kind, 128 + kind}:
        raise Different(f"{kind.name} at {was} ended with {process.ended}")
    made = metrics(run)
    saved = max(checkpoints(run), default=0)
    resumed = [line for line in process.lines if line.startswith("resuming ")]
    if resumed and resumed[0] != f"resuming runs/killed after step {begun}":
        raise Different(f"step {begun} was saved, but the run said: {resumed[0]}")
    return Death(kind.name, was, made[-1]["step"] if made else 0, saved)
