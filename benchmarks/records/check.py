"""Do these runs end with a mean validation loss of at most 3.28, and not by luck?

    python3 -m benchmarks.records.check runs/record-0 runs/record-1 runs/record-2
    python3 -m benchmarks.records.check records/<date>-<name>

Prints the final losses and training times of the runs, and the p-value of a one-sided t-test (W. S.
Gosset, "The probable error of a mean", 1908): how likely so low a mean would be if the recipe's
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
    """Test whether runs show that their mean final validation loss is at most a target."""

    logs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, folders that hold such folders, or files metrics.jsonl."""
    target: float = TARGET
    """The validation loss to reach."""


class RecordError(Mistake):
    """Runs that cannot be read or make no record."""


class LastStep(TypedDict):
    """What is read of the last line of metrics.jsonl."""

    step: int
    tokens: int
    time_s: float
    val_loss: NotRequired[float]


class Steps(TypedDict):
    """What is read of config.json."""

    num_steps: int


class End(NamedTuple):
    """How a run ended."""

    name: str
    step: int
    tokens: int  # trained on
    val_loss: float  # nats per token
    time_s: float  # of training, without compilation and validation


class Statistics(NamedTuple):
    """Of the final validation losses of n runs; sd and p are NaN for a single one."""

    n: int
    mean: float
    sd: float  # of a run, estimated with n - 1
    p: float  # one-sided, of a mean so low if the true one were the target


def main(arguments: list[str] | None = None) -> int:
    """Run the test; return the exit status."""
    return run(Options, test, arguments)


def test(options: Options) -> int:
    """Print the table and the test; 0 if the mean is shown to be low enough, else 1."""
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
    """The metrics.jsonl of every run in `logs`; RecordError if one of them holds none."""
    files = []
    for log in logs:
        own = log if log.is_file() else log / "metrics.jsonl"
        found = [own] if own.is_file() else sorted(log.glob("*/metrics.jsonl"))
        if not found:
            raise RecordError(
                f"{log} holds no run: give the folder of a run, a folder of such folders, or a "
                "metrics.jsonl."
            )
        files += found
    if not files:
        raise RecordError("There are no runs to test: name their folders.")
    return files


def end(metrics: Path) -> End:
    """The last step of a run; its name is its folder's.

    Raises RecordError if that is not the step where config.json, if it lies beside, says the run
    stops, or if it has no validation loss.
    """
    try:
        line = (metrics.read_bytes().splitlines() or [b""])[-1]
    except OSError as error:
        raise RecordError(f"{metrics} cannot be read ({error.strerror}).") from error
    last = parsed(line, LastStep, f"The last line of {metrics}", "give runs that came to their end")
    step, tokens, time_s, val_loss = (last.get(name, nan) for name in LastStep.__annotations__)
    config = metrics.with_name("config.json")
    num_steps = read_object(config, Steps)["num_steps"] if config.is_file() else step
    if step != num_steps:
        raise RecordError(
            f"{metrics} ends at step {step} of {num_steps}: give runs that came to their end."
        )
    if not np.isfinite(val_loss):
        raise RecordError(
            f"{metrics} has no validation loss at its last step, {step}: give runs that came to "
            "their end."
        )
    return End(metrics.resolve().parent.name, step, tokens, val_loss, time_s)


def read_object(path: Path, kind: type) -> dict[str, Any]:
    """The JSON object in a file, of which `kind` declares a part; ConfigError if that is broken."""
    remedy = "give a run that this version has made"
    value = read_json(path, dict[str, Any], remedy)
    checked(value, kind, path, remedy)
    return value


def statistics(ends: Sequence[End], target: float) -> Statistics:
    """The t-test of the final validation losses against the target.

    Raises RecordError if the runs stop at different steps, if one is there twice, or if all end
    with the very same loss.
    """
    from scipy.stats import ttest_1samp  # takes longer to load than everything else here

    for one, other in combinations(ends, 2):
        if one.step != other.step:
            raise RecordError(
                f"{one.name} stops at step {one.step} and {other.name} at step {other.step}: test "
                "runs that stop at the same step."
            )
        if (one.val_loss, one.time_s) == (other.val_loss, other.time_s):
            raise RecordError(
                f"{one.name} and {other.name} are one run, with the same loss after the same time: "
                "name each run once."
            )
    losses = np.array([run.val_loss for run in ends])
    n, mean = len(losses), float(losses.mean())
    if n == 1:
        return Statistics(n, mean, nan, nan)
    if np.ptp(losses) == 0:
        raise RecordError(
            f"All runs end with the same validation loss, {mean}, as those of one seed do: give "
            "every run a seed of its own."
        )
    p = ttest_1samp(losses, target, alternative="less").pvalue
    return Statistics(n, mean, float(losses.std(ddof=1)), float(p))


def sentence(found: Statistics, target: float) -> str:
    """The statistics and what follows from them."""
    if found.n == 1:
        return f"n = 1, val loss {found.mean:.4f}. A single run has no p-value: make more."
    shown = "is shown" if found.p < SIGNIFICANT else "is not shown"
    return (
        f"n = {found.n}, mean {found.mean:.5f}, standard deviation {found.sd:.5f}, "
        f"p = {found.p:.2g}. That the mean is at most {target} {shown} at p < {SIGNIFICANT}."
    )


if __name__ == "__main__":
    sys.exit(main())
