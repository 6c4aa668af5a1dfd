"""Starting the processes of a run, and killing them at a chosen moment."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from benchmarks.command import ROOT
from benchmarks.reliability.left_behind import checkpoints, metrics, unfinished

PATIENCE = 300.0  # seconds without any output after which a process counts as hanging
VALIDATE = 20  # steps between validations


class Different(Exception):
    """A difference between the runs, which the soak test is meant to find."""


@dataclass(frozen=True)
class Death:
    """One kill, and the steps lost by it."""

    signal: str
    phase: str  # what the process was doing
    reached: int  # last step in metrics.jsonl
    saved: int  # step of the newest complete checkpoint, 0 for none

    def __str__(self) -> str:
        return f"{self.signal} at {self.phase}: step {self.saved} saved, {self.reached} reached"


class Incarnation:
    """A run between two kills, with one process or several; reads the output of the first."""

    def __init__(self, arguments: list[str], place: Path, processes: int = 1):
        cache = place / "cache"
        environment = os.environ | {
            "XDG_CACHE_HOME": str(cache),
            "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_ENABLE_COMPILATION_CACHE": "1",
        }
        joined: list[list[str]] = [[]]
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                where = f"127.0.0.1:{free.getsockname()[1]}"
            told = ["--coordinator-address", where, "--num-processes", f"{processes}"]
            joined = [[*told, "--process-id", f"{number}"] for number in range(processes)]
        self.process, *self.others = (
            subprocess.Popen(
                [sys.executable, str(ROOT / "train_gpt.py"), *arguments, *place_in_run],
                cwd=place,
                env=environment,
                stdout=subprocess.DEVNULL if number else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
            for number, place_in_run in enumerate(joined)
        )
        self.lines: list[str] = []
        self.more = Event()  # set for every new line
        self.reader = Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.more.set()
        self.more.set()

    def wait(self) -> int:
        """Wait for all processes to end; return the exit status of the first."""
        seen = -1
        while self.reader.is_alive() and len(self.lines) > seen:
            seen = len(self.lines)
            self.reader.join(PATIENCE)
        try:
            status = self.process.wait(PATIENCE)
            for other in self.others:
                other.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            raise Different(f"a process does not end ({self.ended})") from None
        self.reader.join()
        self.process.stdout.close()
        return status

    def send(self, kind: signal.Signals) -> None:
        """Send a signal to all processes."""
        for process in (self.process, *self.others):
            process.send_signal(kind)

    @property
    def ended(self) -> str:
        """How the first process ended, for a message."""
        return f"status {self.process.returncode}: " + " / ".join(self.lines[-3:])

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Wait until `true()`, or until the process has ended."""
        deadline = time.monotonic() + PATIENCE
        while not true() and self.process.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise Different(f"a process does nothing ({self.ended})")
            self.more.wait(0.002)
            self.more.clear()

    @property
    def step(self) -> int:
        """The last step in the output, 0 before the first."""
        steps = [line for line in list(self.lines) if line.startswith("step ")]
        return int(steps[-1].split()[1].split("/")[0]) if steps else 0

    def at(self) -> str:
        """Return what the process is doing, judged by its output."""
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
    processes: int = 1,
) -> Death:
    """Start or resume the run, and kill it in this phase, if it comes soon after step `upto`.

    SIGTERM is sent to all of several processes, SIGKILL to one: the others must then end by
    themselves, unless that is before they have met. The phase reported is judged by the output and
    the files, not the one intended.
    """
    run = place / "runs" / "killed"
    begun, left = max(checkpoints(run), default=0), unfinished(run)
    process = Incarnation(arguments, place, processes)

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
    if kind == signal.SIGKILL and process.others:
        all_of_them = (process.process, *process.others)
        killed = draw.choice(all_of_them)
        killed.kill()
        if was == "start-up":  # before they have met, the others wait for it: a launcher ends them
            for other in set(all_of_them) - {killed}:
                other.terminate()
        expected = {-kind} if killed is process.process else set(range(-64, 256)) - {0}
    else:
        process.send(kind)
        expected = {-kind, 128 + kind}
    status = process.wait()
    if status not in expected:
        raise Different(f"{kind.name} at {was} ended with {process.ended}")
    made = metrics(run)
    saved = max(checkpoints(run), default=0)
    resumed = [line for line in process.lines if line.startswith("resuming ")]
    if resumed and resumed[0] != f"resuming runs/killed after step {begun}":
        raise Different(f"step {begun} was saved, but the run said: {resumed[0]}")
    return Death(kind.name, was, made[-1]["step"] if made else 0, saved)
