"""Reading metrics.jsonl, one JSON object per step; lines may be damaged."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Required, TypedDict

from nanogpt.checks import ConfigError, Count, Total
from nanogpt.files import parsed

FILE = "metrics.jsonl"


class Metrics(TypedDict, total=False):
    """A line of metrics.jsonl: the metrics of an optimizer step."""

    step: Required[Count]
    train_loss: float
    val_loss: float
    grad_norm: float
    spike: float
    learning_rate_factor: float
    tokens: Total
    epoch: float
    time_s: float
    step_time_s: float
    tokens_per_s: float


def read_records(run: Path) -> Iterator[tuple[bytes, Metrics | ConfigError]]:
    """Yield each line of a run's metrics, with its record or the error in it.

    Raises OSError if the file cannot be read.
    """
    path = run / FILE
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            where = f"{path}, line {number:,}"
            yield line, parsed(line.rstrip(), Metrics, where, "repair or remove it")
        except ConfigError as error:
            yield line, error


def validation_losses(run: Path) -> dict[int, float]:
    """Return the validation losses in a run's metrics, by step; empty if there are no metrics."""
    with suppress(OSError):
        records = (record for _, record in read_records(run) if isinstance(record, dict))
        return {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    return {}
