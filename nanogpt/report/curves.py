"""The curves and settings of runs, read from their folders."""

import re
from dataclasses import dataclass, fields
from math import nan
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float64

from nanogpt.checks import ConfigError, checked
from nanogpt.config import GPTConfig
from nanogpt.devices.hardware import training_flops
from nanogpt.files import read_json
from nanogpt.runs.folder import Circumstances, RunError
from nanogpt.schedule import Schedule
from nanogpt.training.records import FILE, read_records
from nanogpt.training.resume import ADDED

LABELS = {  # each metric's axis label and units, with the smallest value for which each is used
    "tokens": ("tokens", {1e9: "billions", 1e6: "millions", 1e3: "thousands"}),
    "step": ("step", {}),
    "time_s": ("training time", {3600: "hours", 60: "minutes", 1: "seconds"}),
    "train_loss": ("loss (nats per token)", {}),
    "val_loss": ("validation loss", {}),
    "learning_rate_factor": ("learning-rate factor", {}),
    "grad_norm": ("gradient norm", {}),
    "tokens_per_s": ("tokens per second", {1e6: "millions", 1e3: "thousands"}),
    "flops": ("FLOPs", {}),  # of training so far, from the settings and the tokens
}

SCHEDULE = [field.name for field in fields(Schedule)]


class Settings(TypedDict, total=False):
    """The fields of config.json that the report uses by name."""

    preset: str
    tokenizer: str
    num_steps: int
    data: list[str]


@dataclass(frozen=True)
class History:
    """A run's settings and metrics, from its folder."""

    name: str
    metrics: dict[str, Float64[np.ndarray, "steps"]]  # by name in LABELS; NaN where missing
    config: dict[str, Any]
    circumstances: dict[str, Any]  # from run.json
    parameters: str

    def series(self, x: str, y: str) -> Float64[np.ndarray, "2 points"]:
        """Return two metrics at the steps where both are finite."""
        both = np.stack([self.metrics[x], self.metrics[y]])
        return both[:, np.isfinite(both).all(axis=0)]


class NoNumbers(RunError):
    """A folder that has no metrics, or none yet."""


def read_run(folder: Path, name: str) -> History:
    """Read a run's folder, ignoring an incomplete last line of its metrics.

    Raises NoNumbers if the folder has no metrics, RunError if it does not exist or something in it
    is damaged; both with a sentence for the user.
    """
    path = folder / FILE
    if folder.exists() and not path.exists():
        raise NoNumbers(f"{folder} is not a run folder: give run folders, e.g. runs/<name>.")
    try:
        records = [*read_records(folder)]
    except OSError as error:
        missing = path if folder.is_dir() else folder
        raise RunError(
            f"{missing} cannot be read ({error.strerror}): give run folders, e.g. runs/<name>."
        ) from error
    rows = []
    for line, record in records:
        if isinstance(record, dict):
            numbers: dict[str, Any] = {**record}
            rows.append([float(numbers.get(metric, nan)) for metric in LABELS])
        elif line.endswith(b"\n"):
            raise RunError(str(record))
    if not rows:
        raise NoNumbers(f"{path} has no metrics yet: wait for the run's first step.")
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    metrics = dict(zip(LABELS, np.array(rows).T, strict=True))
    config = _told_in(folder / "config.json", Settings)
    return History(
        name,
        metrics | {"flops": _flops(config, metrics["tokens"])},
        config,
        _told_in(folder / "run.json", Circumstances),
        (re.findall(r"^parameters: ([\d,]+)$", text, re.MULTILINE) or ["unknown"])[-1],
    )


def _flops(
    config: dict[str, Any], tokens: Float64[np.ndarray, "steps"]
) -> Float64[np.ndarray, "steps"]:
    """Return the FLOPs of training after each number of tokens; NaN if settings are unknown."""
    config = ADDED | config
    try:
        model = checked(config.get("model"), GPTConfig)
        schedule = checked({name: config.get(name) for name in SCHEDULE}, Schedule)
    except ConfigError:
        return np.full(len(tokens), nan)
    ends = [0, *schedule.ends]
    flops = [training_flops(model, schedule, end) for end in ends]
    return np.interp(tokens, [*map(schedule.tokens, ends)], flops)


def _told_in(path: Path, kind: type) -> dict[str, Any]:
    """Read a JSON file, empty if missing, and check the fields in `kind`; may raise RunError."""
    if not path.exists():
        return {}
    remedy = "restore it or remove it"
    try:
        told = read_json(path, dict[str, Any], remedy)
        checked(told, kind, path, remedy)
        return told
    except ConfigError as error:
        raise RunError(str(error)) from error
