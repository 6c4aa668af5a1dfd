"""What runs did, as curves: read from their folders and drawn over each other.

`overview` is the picture of `python3 -m nanogpt.report`, `draw` one panel of it, and `loss_png` the
small picture that a run leaves in its folder.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from jaxtyping import Float64
from scipy.ndimage import median_filter

from nanogpt.checks import ConfigError, checked
from nanogpt.files import parsed, read_json
from nanogpt.runs.folder import Circumstances, Metrics, RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
PANELS = (
    *(("tokens", "train_loss"), ("step", "train_loss"), ("time_s", "train_loss")),
    *(("step", "learning_rate_factor"), ("step", "grad_norm"), ("step", "tokens_per_s")),
)
HOW_TO_READ = "Lines: running medians; every step is faint behind them. Marks: validation loss."
TARGET = 3.28  # validation loss that a speedrun is to reach, of GPT-2's tokens on FineWeb
MOST_POINTS = 800  # of a line: a panel is about half as many pixels wide

INK = "#2b2d33"  # of text and axes; on the page they take the page's
# Okabe and Ito's colours, which the colour-blind tell apart, but those too pale for white paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKS = ("o●", "s■", "^▲", "D◆", "v▼", "P✚")  # Matplotlib's name, and the page's sign
LOOKS = [
    (colour, line, *mark)
    for line in ("solid", "dashed", "dotted")
    for colour, mark in zip(COLOURS, MARKS, strict=True)
]
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{"axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.color": INK, "grid.alpha": 0.12, "legend.frameon": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "report"},
}


class Settings(TypedDict, total=False):
    """What the report reads of config.json by name."""

    preset: str
    tokenizer: str
    num_steps: int
    data: list[str]


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
            record = parsed(line, Metrics, f"{path}, line {number:,}", "repair it or take it out")
            rows.append([float(record.get(metric, nan)) for metric in LABELS])
        except ConfigError as error:
            if number < len(lines):
                raise RunError(str(error)) from error
    if not rows:
        raise NoNumbers(f"{path} has no numbers yet: wait for the run's first step.")
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return History(
        name,
        dict(zip(LABELS, np.array(rows).T, strict=True)),
        _told_in(folder / "config.json", Settings),
        _told_in(folder / "run.json", Circumstances),
        (re.findall(r"^parameters: ([\d,]+)$", text, re.MULTILINE) or ["unknown"])[-1],
    )


def _told_in(path: Path, kind: type) -> dict[str, Any]:
    """All that a JSON file tells, of which `kind` declares a part; nothing if there is none."""
    if not path.exists():
        return {}
    remedy = "restore it or take it away"
    try:
        told = read_json(path, dict[str, Any], remedy)
        checked(told, kind, path, remedy)
        return told
    except ConfigError as error:
        raise RunError(str(error)) from error


def overview(runs: Sequence[History]) -> "Figure":
    """All panels in one picture, with a legend."""
    from matplotlib.lines import Line2D

    names = [name if len(name := run.name) <= 40 else f"{name[:39]}…" for run in runs]
    with own_style():
        figure = new_figure(11.4, 6.8)
        for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            draw(axes, runs, *panel)
        legend = figure.legend(
            [
                Line2D([], [], color=colour, linestyle=line, marker=mark)
                for _, (colour, line, mark, _) in zip(runs, cycle(LOOKS), strict=False)
            ],
            names,
            loc="outside upper left",
            ncols=max(1, 140 // (max(map(len, names)) + 8)),
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        figure.supxlabel(HOW_TO_READ, x=0.006, ha="left", fontsize="medium")
    return figure


def loss_png(folder: Path) -> Path:
    """Draw the loss of a run into its folder, and return the picture's path.

    Raises RunError if the run cannot be read, OSError if the picture cannot be written.
    """
    with own_style():
        figure = new_figure(5.6, 3.6)
        axes = figure.subplots()
        draw(axes, [read_run(folder, folder.name)], "step", "train_loss")
        axes.legend()
        figure.savefig(folder / "loss.png", dpi=110)
    return folder / "loss.png"


def draw(axes: "Axes", runs: Sequence[History], x: str, y: str) -> None:
    """Draw one metric of the runs against another, and validation beside the training loss."""
    from matplotlib.ticker import LogLocator

    (x_unit, x_label), (y_unit, y_label) = _unit(runs, x), _unit(runs, y)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.locator_params("x", nbins=4)  # more would run into each other
    axes.xaxis.set_major_formatter("{x:,g}")
    medians = []
    for run, (colour, line, mark, _) in zip(runs, cycle(LOOKS), strict=False):
        at, values = run.series(x, y) / [[x_unit], [y_unit]]
        if not len(values):
            continue
        # A schedule has no noise, and a median would bend its end.
        width = 1 if y == "learning_rate_factor" else 2 * (len(values) // 60) + 1
        medians.append(median_filter(values, width))
        faint = {"alpha": 0.22, "lw": 0.7, "label": "training, every step"}
        axes.plot(*_thinned(at, values), c=colour, zorder=2, **faint)
        thick = {"ls": line, "label": "training, running median"}
        axes.plot(*_thinned(at, medians[-1]), c=colour, zorder=3, **thick)
        at, losses = run.series(x, "val_loss")
        if y == "train_loss" and len(losses):
            marks = {"ls": "", "marker": mark, "ms": 5 if len(losses) <= 40 else 2.5}
            axes.plot(at / x_unit, losses, c=colour, zorder=4, label="validation", **marks)
    highest = max((median.max() for median in medians), default=0.0)
    lowest = min((median[median > 0].min(initial=inf) for median in medians), default=inf)
    if y == "train_loss" and medians:
        _frame_losses(axes, runs, medians)
    elif y == "grad_norm" and highest > 10 * lowest:  # less would leave such an axis without ticks
        axes.set_yscale("log", subs=[])
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    else:
        axes.set_ylim(0, 1.15 * highest or 1)


def _thinned(
    x: Float64[np.ndarray, "steps"], y: Float64[np.ndarray, "steps"]
) -> tuple[Float64[np.ndarray, "points"], Float64[np.ndarray, "points"]]:
    """The ends, and the lowest and highest point of each stretch, so that what stands out stays."""
    if len(y) <= MOST_POINTS:
        return x, y
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), MOST_POINTS // 2 - 1):
        kept |= {stretch[y[stretch].argmin()], stretch[y[stretch].argmax()]}
    return x[sorted(kept)], y[sorted(kept)]


def _frame_losses(
    axes: "Axes", runs: Sequence[History], medians: Sequence[Float64[np.ndarray, "steps"]]
) -> None:
    """Leave out the height that losses began at, or diverged to; show the speedrun's if near."""
    validation = (run.series("step", "val_loss")[1] for run in runs)
    low = min(values.min() for values in (*medians, *validation) if len(values))
    high = max(min(np.percentile(m, 95), 1.25 * m[len(m) // 20]) for m in medians)
    margin = 0.08 * (high - low) or 0.5
    comparable = all(run.config.get("tokenizer") == "gpt2" for run in runs)
    if comparable and low - 3 * margin < TARGET < high:
        low = min(low, TARGET)
        axes.axhline(TARGET, c=INK, lw=1, dashes=(5, 3), label="_")
        place = axes.get_yaxis_transform()
        axes.text(0.01, TARGET + margin / 8, f"{TARGET}", transform=place, fontsize="small")
    axes.set_ylim(low - margin, high + margin)


def _unit(runs: Sequence[History], metric: str) -> tuple[float, str]:
    """What to divide a metric by, and the label of its axis."""
    label, units = LABELS[metric]
    most = max(run.series(metric, metric)[0].max(initial=0) for run in runs)
    return next(
        ((size, f"{label} ({unit})") for size, unit in units.items() if most >= size), (1, label)
    )


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, without pyplot, which would keep it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def own_style() -> AbstractContextManager[None]:
    """Matplotlib as STYLE says, whatever this machine's matplotlibrc does."""
    from matplotlib import style

    return style.context(["default", STYLE])
