"""What runs did, as curves read from their folders."""

import json
import re
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from nanogpt.runs.folder import RunError

LABELS = {  # of each metric's axis, and its units, each with the size from which on it is used
    "tokens": ("tokens", {1e9: "billions", 1e6: "millions", 1e3: "thousands"}),
    "step": ("step", {}),
    "time_s": ("training time", {3600: "hours", 60: "minutes", 1: "seconds"}),
    "train_loss": ("loss (nats per token)", {}),
    "val_loss": ("validation loss", {}),
    "learning_rate_factor": ("learning-rate factor", {}),
    "grad_norm": ("gradient norm", {}),
    "tokens_per_s": ("tokens per second", {1e6: "millions", 1e3: "thousands"}),
}


@dataclass(frozen=True)
class History:
    """What a run was and did, as its folder tells."""

    name: str
    metrics: dict[str, Float64[np.ndarray, "steps"]]  # each of LABELS, NaN where a step lacks it
    config: dict[str, Any]
    circumstances: dict[str, Any]  # as in run.json
    parameters: str

    def series(self, x: str, y: str) -> Float64[np.ndarray, "2 points"]:
        """Two metrics, of the steps where both are finite."""
        both = np.stack([self.metrics[x], self.metrics[y]])
        return both[:, np.isfinite(both).all(axis=0)]


class NoNumbers(RunError):
    """There is no run, or none yet, where one was looked for."""


def read_run(folder: Path, name: str) -> History:
    """What a run's folder tells, but for a last line of metrics that is not whole (yet).

    Raises NoNumbers if what is there has no numbers, RunError if there is nothing or something is
    broken; both in a sentence for the user.
    """
    path = folder / "metrics.jsonl"
    if folder.exists() and not path.exists():
        raise NoNumbers(f"{folder} is no run: name the folders of runs, runs/<name>.")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        missing = path if folder.is_dir() else folder
        raise RunError(
            f"{missing} cannot be read ({error.strerror}): name the folders of runs, runs/<name>."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            rows.append([float(record.get(metric, nan)) for metric in LABELS])
        except (ValueError, TypeError, AttributeError):
            if number < len(lines):
                raise RunError(
                    f"{path}, line {number:,} is no JSON object of numbers: repair it or take it "
                    "out."
                ) from None
    if not rows:
        raise NoNumbers(f"{path} has no numbers yet: wait for the run's first step.")
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return History(
        name,
        dict(zip(LABELS, np.array(rows).T, strict=True)),
        _json_object(folder / "config.json"),
        _json_object(folder / "run.json"),
        (re.findall(r"^parameters: ([\d,]+)$", text, re.MULTILINE) or ["unknown"])[-1],
    )


def _json_object(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if there is none."""
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError):
        raise RunError(f"{path} holds no JSON object: restore it or take it away.") from None
