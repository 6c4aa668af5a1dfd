"""A run that is killed fifty times, at random moments, compared with an uninterrupted run.

    python3 -m benchmarks.reliability.soak
    python3 -m benchmarks.reliability.soak --tiny --kills 3
    python3 -m benchmarks.reliability.soak --processes 2

Both train the laptop preset (with --tiny a far smaller model), for fewer steps. One run gets
SIGKILL or SIGTERM at random moments: while it starts, compiles, trains, validates or writes a
checkpoint; each time it is resumed. After every kill its checkpoints and all its metrics so far are
compared with those of the other run, and at the end everything: parameters, optimizer state and
metrics must be the same to the last bit, except for the times in the metrics.

It takes some minutes, and 2 GB of temporary files.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.command import Mistake, check_positive, run
from benchmarks.reliability.killing import VALIDATE, Death, Different, Incarnation, kill
from benchmarks.reliability.left_behind import checkpoints, digest, metrics
from benchmarks.results import save

PHASES = ("start-up", "compilation", "training", "validation", "saving")
WEIGHTS = (2, 2, 5, 2, 4)  # relative frequency of each phase
EVERY = 10  # steps between checkpoints
TINY = (
    "--batch-size 8 --sequence-length 32 --total-batch-size 512 --val-tokens 8192 "
    "--model.num-layers 1 --model.num-heads 2 --model.width 32 --model.mlp-width 64 "
    "--model.value-embeddings 1 --model.bigram-buckets 64"
)


@dataclass(frozen=True)
class Options:
    """Kill a run repeatedly, and compare it with an uninterrupted run."""

    kills: int = 50
    """Number of times that the run is killed and resumed."""
    steps: int = 0
    """Optimizer steps of both runs; 0 for eight per kill."""
    processes: int = 1
    """Number of processes. SIGTERM is sent to all of them, SIGKILL to one."""
    tiny: bool = False
    """Use a model so small that each process takes seconds: a test of this script."""
    seed: int = 0
    """Random seed for the moments of the kills."""


def main(arguments: list[str] | None = None) -> int:
    """Run the soak test; return the exit status, which is 1 if anything differs."""
    return run(Options, compare, arguments)


def compare(options: Options) -> int:
    """Run both, print and save the table of kills; return 1 if anything differs."""
    check_positive(options, "kills", "processes")
    if options.steps and options.steps < 4 * VALIDATE:
        raise Mistake(f"--steps must be 0 or at least {4 * VALIDATE}, not {options.steps}.")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            figures = soak(options, Path(scratch))
        except Different as difference:
            print(f"DIFFERENT: {difference}")
            return 1
    several = f"_{options.processes}_processes" if options.processes > 1 else ""
    save(f"soak{several}", figures, options.tiny)
    return 0


def soak(options: Options, place: Path) -> dict:
    """Return the results if everything is the same; raises Different otherwise."""
    steps = options.steps or 8 * max(options.kills, VALIDATE)
    begin = time.perf_counter()
    arguments = [
        *("--preset", "laptop", "--num-steps", f"{steps}", "--sample-tokens", "0"),
        *("--val-loss-every", f"{VALIDATE}", "--val-tokens", "32768"),
        *("--checkpoint-every", f"{EVERY}", "--keep-checkpoints"),
    ]
    tiny = TINY.split() if options.tiny else []

    straight = place / "runs" / "straight"
    whole = Incarnation(
        [*arguments, f"{steps}", *tiny, "--run-name", "straight"], place, options.processes
    )
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
        # Kills are spread over the steps: a run that is ahead is killed before it trains.
        saved, share = max(checkpoints(run), default=0), steps * len(deaths) // options.kills
        ahead = saved > min(share + VALIDATE, steps - 3 * VALIDATE)
        count = 2 if ahead else len(PHASES)
        (phase,) = draw.choices(PHASES[:count], WEIGHTS[:count])
        upto = max(saved + EVERY // 2, share)  # the latest step to aim at
        death = kill(again if saved else fresh, place, kind, phase, upto, draw, options.processes)
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
        if not saved:  # nothing to resume: start again, as a user would
            shutil.rmtree(run, ignore_errors=True)

    last = Incarnation(again if checkpoints(run) else fresh, place, options.processes)
    if last.wait() != 0:
        raise Different(f"the killed run ended with {last.ended}")
    if metrics(run) != records:
        raise Different("the metrics at the end")
    if digest(checkpoints(run)[steps]) != expected[steps]:
        raise Different("parameters or optimizer state at the end")
    return report(deaths, steps, compared, time.perf_counter() - begin)


def report(deaths: list[Death], steps: int, compared: int, seconds: float) -> dict:
    """Print the table of kills, and return it."""
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


if __name__ == "__main__":
    sys.exit(main())
