"""Do these runs have a mean final validation loss of at most 3.28, with statistical significance?

    python3 -m benchmarks.records.check runs/record-0 runs/record-1 runs/record-2
    python3 -m benchmarks.records.check records/<date>-<name>

Prints the final losses and training times of the runs, and the p-value of a one-sided t-test (W. S.
Gosset, "The probable error of a mean", 1908): the probability of a mean this low if the recipe's
true mean were the target. The exit status is 0 if p < 0.01, 1 if not, 2 if the runs cannot be read.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import nan
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.command import Mistake, run
from nanogpt.checks import checked
from nanogpt.files import parsed, read_json

TARGET = 3.28  # nats per token, on FineWeb
SIGNIFICANT = 0.01  # p must be below this


@dataclass(frozen=True)
class Options:
    """Test whether the mean final validation loss of runs is at most a target."""

    logs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, folders that contain run folders, or metrics.jsonl files."""
    target: float = TARGET
    """The validation loss to reach."""


class RecordError(Mistake):
    """Runs that cannot be read or are not a record."""


class LastStep(TypedDict):
    """The fields that are read from the last line of metrics.jsonl."""

    step: int
    tokens: int
    time_s: float
    val_loss: NotRequired[float]


class Steps(TypedDict):
    """The fields that are read from config.json."""

    num_steps: int


class End(NamedTuple):
    """The last step of a run."""

    name: str
    step: int
    tokens: int  # trained on
    val_loss: float  # nats per token
    time_s: float  # training time, without compilation and validation


class Statistics(NamedTuple):
    """Statistics of the final validation losses of n runs; sd and p are NaN for n = 1."""

    n: int
    mean: float
    sd: float  # sample standard deviation, with n - 1
    p: float  # one-sided: the probability of a mean this low if the true mean were the target


def main(arguments: list[str] | None = None) -> int:
    """Run the test; return the exit status."""
    return run(Options, test, arguments)


def test(options: Options) -> int:
    """Print the table and the test; return 0 if the mean is significantly low enough, else 1."""
    ends = [end(metrics) for metrics in find_metrics(options.logs)]
    found = statistics(ends, options.target)
    table = Table("run", "steps", "tokens", "val loss", "training time")
    for each in ends:
        table.add_row(
            each.name,
            f"{each.step:,}",
            f"{each.tokens:,}",
            f"{each.val_loss:.4f}",
            f"{each.time_s:.1f} s",
        )
    Console(highlight=False).print(table)
    print(sentence(found, options.target))
    return 0 if found.p < SIGNIFICANT else 1


def find_metrics(logs: Sequence[Path]) -> list[Path]:
    """Return the metrics.jsonl of every run in `logs`; raises RecordError if one has none."""
    files = []
    for log in logs:
        own = log if log.is_file() else log / "metrics.jsonl"
        found = [own] if own.is_file() else sorted(log.glob("*/metrics.jsonl"))
        if not found:
            raise RecordError(
                f"{log} contains no run: give a run folder, a folder of run folders, or a "
                "metrics.jsonl."
            )
        files += found
    if not files:
        raise RecordError("There are no runs to test: give their folders.")
    return files


def end(metrics: Path) -> End:
    """Return the last step of a run, named after its folder.

    Raises RecordError if that is not the last step according to config.json, if there is one, or if
    it has no validation loss.
    """
    try:
        line = (metrics.read_bytes().splitlines() or [b""])[-1]
    except OSError as error:
        raise RecordError(f"{metrics} cannot be read ({error.strerror}).") from error
    last = parsed(line, LastStep, f"The last line of {metrics}", "give finished runs")
    step, tokens, time_s, val_loss = (last.get(name, nan) for name in LastStep.__annotations__)
    config = metrics.with_name("config.json")
    num_steps = read_object(config, Steps)["num_steps"] if config.is_file() else step
    if step != num_steps:
        raise RecordError(f"{metrics} ends at step {step} of {num_steps}: give finished runs.")
    if not np.isfinite(val_loss):
        raise RecordError(
            f"{metrics} has no validation loss at its last step, {step}: give finished runs."
        )
    return End(metrics.resolve().parent.name, step, tokens, val_loss, time_s)


def read_object(path: Path, kind: type) -> dict[str, Any]:
    """Read a JSON object, with some fields declared by `kind`; raises ConfigError if invalid."""
    remedy = "give a run of this version"
    value = read_json(path, dict[str, Any], remedy)
    checked(value, kind, path, remedy)
    return value


def statistics(ends: Sequence[End], target: float) -> Statistics:
    """Compute the t-test of the final validation losses against the target.

    Raises RecordError if the runs stop at different steps, if one is given twice, or if all end
    with exactly the same loss.
    """
    from scipy.stats import ttest_1samp  # slower to import than everything else here

    for one, other in combinations(ends, 2):
        if one.step != other.step:
            raise RecordError(
                f"{one.name} stops at step {one.step} and {other.name} at step {other.step}: test "
                "runs that stop at the same step."
            )
        if (one.val_loss, one.time_s) == (other.val_loss, other.time_s):
            raise RecordError(
                f"{one.name} and {other.name} are one run, with the same loss after the same time: "
                "give each run once."
            )
    losses = np.array([run.val_loss for run in ends])
    n, mean = len(losses), float(losses.mean())
    if n == 1:
        return Statistics(n, mean, nan, nan)
    if np.ptp(losses) == 0:
        raise RecordError(
            f"All runs end with the same validation loss, {mean}, as runs with the same seed do: "
            "give every run its own seed."
        )
    p = ttest_1samp(losses, target, alternative="less").pvalue
    return Statistics(n, mean, float(losses.std(ddof=1)), float(p))


def sentence(found: Statistics, target: float) -> str:
    """Return the statistics and the conclusion, in words."""
    if found.n == 1:
        return f"n = 1, val loss {found.mean:.4f}. A p-value needs at least two runs."
    shown = "is shown" if found.p < SIGNIFICANT else "is not shown"
    return (
        f"n = {found.n}, mean {found.mean:.5f}, standard deviation {found.sd:.5f}, "
        f"p = {found.p:.2g}. That the mean is at most {target} {shown} at p < {SIGNIFICANT}."
    )


if __name__ == "__main__":
    sys.exit(main())
