"""A run that is killed fifty times, at any moment, beside one that nothing happens to.

    .venv/bin/python -m benchmarks.soak
    .venv/bin/python -m benchmarks.soak --tiny --kills 3

Both train the laptop preset (with --tiny a far smaller model), for fewer steps. The second gets
SIGKILL or SIGTERM at moments drawn at random: while it starts, compiles, trains, validates, or
writes a checkpoint; each time it is resumed. After every death its newest checkpoint and all its
metrics so far are compared with those of the first run, and in the end all of them: parameters,
optimizer state and metrics have to be the same to the last bit, but for the times in the metrics.

Some minutes, and 2 GB of temporary files.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

import tyro

from benchmarks.results import save

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("start-up", "compilation", "training", "validation", "saving")
WEIGHTS = (2, 2, 5, 2, 4)  # how often each is aimed at
TIMES = ("time_s", "step_time_s", "tokens_per_s")
EVERY, VALIDATE = 10, 20  # steps between checkpoints and between validations
TINY = (
    "--batch-size 8 --sequence-length 32 --total-batch-size 2048 --model.num-layers 2 "
    "--model.num-heads 2 --model.width 32 --model.mlp-width 64 --model.value-embeddings 1 "
    "--model.bigram-buckets 64"
)
PATIENCE = 300.0  # seconds without any sign after which a process hangs


@dataclass(frozen=True)
class Options:
    """How long to go on."""

    kills: int = 50
    """How often the run is killed and resumed."""
    steps: int = 0
    """Optimizer steps of both runs; 0 for eight per kill."""
    tiny: bool = False
    """A model that shows in seconds whether this program works."""
    seed: int = 0
    """Of the moments of the kills."""


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


def main() -> int:
    """Make both runs, print the table of kills, and save it; 1 if anything differs."""
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            figures = soak(options, Path(scratch))
        except Different as difference:
            print(f"DIFFERENT: {difference}")
            return 1
    save("soak" + "_tiny" * options.tiny, figures)
    return 0


def soak(options: Options, place: Path) -> dict:
    """The figures, if all is the same; else Different."""
    steps = options.steps or 8 * max(options.kills, VALIDATE)
    begin = time.perf_counter()
    arguments = [
        *("--preset", "laptop", "--num-steps", f"{steps}", "--sample-tokens", "0"),
        *("--val-loss-every", f"{VALIDATE}", "--val-tokens", "32768"),
        *("--checkpoint-every", f"{EVERY}", "--keep-checkpoints"),
    ]
    tiny = TINY.split() if options.tiny else []

    straight = place / "runs" / "straight"
    whole = Incarnation([*arguments, f"{steps}", *tiny, "--run-name", "straight"], place)
    if whole.wait() != 0:
        raise Different(f"the uninterrupted run ended with {whole.ended}")
    expected = {step: digest(path) for step, path in checkpoints(straight).items()}
    records = metrics(straight)
    shutil.rmtree(straight)
    print(f"uninterrupted: {steps} steps, {time.perf_counter() - begin:.0f} s", flush=True)

    run, draw, deaths = place / "runs" / "killed", random.Random(options.seed), []
    fresh, again = [*arguments, "3", *tiny, "--run-name", "killed"], ["--resume", "runs/killed"]
    compared = 0
    while len(deaths) < options.kills:
        kind = draw.choice((signal.SIGKILL, signal.SIGTERM))
        # Kills are spread over the steps: a run that is ahead of them is killed before any.
        saved, share = max(checkpoints(run), default=0), steps * len(deaths) // options.kills
        ahead = saved > min(share + VALIDATE, steps - 3 * VALIDATE)
        count = 2 if ahead else len(PHASES)
        (phase,) = draw.choices(PHASES[:count], WEIGHTS[:count])
        upto = max(saved + EVERY // 2, share)  # the step at which the process has lived enough
        death = kill(again if saved else fresh, place, kind, phase, upto, draw)
        deaths.append(death)
        saved = checkpoints(run)
        for step in sorted(saved.keys() & expected.keys()):
            compared += 1
            if digest(saved[step]) != expected[step]:
                raise Different(f"checkpoint {step} after kill {len(deaths)} ({death})")
        made = metrics(run)
        if made != records[: len(made)]:
            raise Different(f"metrics after kill {len(deaths)} ({death})")
        print(f"{len(deaths):3} {death}", flush=True)
        if not saved:  # there is nothing to resume: as a user would, begin anew
            shutil.rmtree(run, ignore_errors=True)

    last = Incarnation(again if checkpoints(run) else fresh, place)
    if last.wait() != 0:
        raise Different(f"the killed run ended with {last.ended}")
    if metrics(run) != records:
        raise Different("the metrics at the end")
    if digest(checkpoints(run)[steps]) != expected[steps]:
        raise Different("parameters or optimizer state at the end")
    return report(deaths, steps, compared, time.perf_counter() - begin)


def report(deaths: list[Death], steps: int, compared: int, seconds: float) -> dict:
    """Print the table of kills, and return its figures."""
    kinds = sorted({death.signal for death in deaths})
    counts = Counter((death.phase, death.signal) for death in deaths)
    redone = {phase: 0 for phase in PHASES}
    for death in deaths:
        redone[death.phase] += max(0, death.reached - death.saved)
    print(f"\n{'killed while at':16}" + "".join(f"{kind:>9}" for kind in kinds) + "  steps redone")
    for phase in PHASES:
        row = "".join(f"{counts[phase, kind]:9}" for kind in kinds)
        print(f"{phase:16}{row}{redone[phase]:14}")
    print(
        f"{len(deaths)} kills in {steps} steps, {compared} checkpoints compared on the way, "
        f"{seconds:.0f} s: parameters, optimizer state and metrics are identical to the last bit."
    )
    return {
        "steps": steps,
        "kills": len(deaths),
        "kills_by_phase_and_signal": {
            phase: {kind: counts[phase, kind] for kind in kinds} for phase in PHASES
        },
        "steps_redone": redone,
        "checkpoints_compared": compared,
        "identical": True,
        "seconds": round(seconds),
        "deaths": [asdict(death) for death in deaths],
    }


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


def unfinished(run: Path) -> set[tuple[str, int]]:
    """The saves under way, and those that died; each with what tells it from one of its name."""
    folder, found = run / "checkpoints", set()
    for path in folder.iterdir() if folder.exists() else []:
        with suppress(FileNotFoundError):  # it was finished, and has its final name now
            if not (path / "manifest.json").exists():
                found.add((path.name, path.stat().st_ino))
    return found


def checkpoints(run: Path) -> dict[int, Path]:
    """The whole checkpoints by step."""
    found = (path.parent for path in (run / "checkpoints").glob("*/manifest.json"))
    return {int(path.name): path for path in found}


def digest(checkpoint: Path) -> str:
    """SHA-256 of all arrays of a checkpoint with their names, types and shapes."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():  # that the arrays come back as they were laid out
        warnings.simplefilter("ignore", UserWarning)
        tree = ocp.load_checkpointables(checkpoint)
    total = hashlib.sha256()
    for name, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(name)} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def metrics(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, without times."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
