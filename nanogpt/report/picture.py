"""Curves of runs on shared axes, drawn with Matplotlib.

`overview` draws the picture of `python3 -m nanogpt.report`, `draw` one panel of it, and `loss_png`
the small picture in a run's folder.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import cycle, zip_longest
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64
from scipy.ndimage import median_filter

from nanogpt.report.compute import fit
from nanogpt.report.curves import LABELS, History, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    *(("tokens", "train_loss"), ("step", "train_loss"), ("time_s", "train_loss")),
    *(("step", "learning_rate_factor"), ("step", "grad_norm"), ("step", "tokens_per_s")),
)
COMPUTE = "flops", "val_loss"  # a panel for runs that can be compared by their FLOPs
HOW_TO_READ = "Lines: running median, with every step faint behind it. Markers: validation loss."
TARGET = 3.28  # target validation loss of speedruns, for GPT-2 tokens of FineWeb
MOST_POINTS = 800  # per line: a panel is about half as many pixels wide

INK = "#2b2d33"  # colour of text and axes; replaced by the page's text colour there
# Okabe and Ito's colours for colour-blind readers, without those too pale for white paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKS = ("o●", "s■", "^▲", "D◆", "v▼", "P✚")  # Matplotlib's name, and the page's symbol
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


def overview(runs: Sequence[History]) -> "Figure":
    """Draw all panels in one picture, with a legend."""
    from matplotlib.lines import Line2D

    names = [name if len(name := run.name) <= 40 else f"{name[:39]}…" for run in runs]
    panels = panels_for(runs)
    columns = -(-len(panels) // 2)
    with own_style():
        figure = new_figure(3.8 * columns, 6.8)
        for axes, panel in zip_longest(figure.subplots(2, columns).flat, panels):
            if panel:
                draw(axes, runs, *panel)
            else:
                axes.remove()
        legend = figure.legend(
            [
                Line2D([], [], c=colour, ls=line, marker=mark)
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


def panels_for(runs: Sequence[History]) -> tuple[tuple[str, str], ...]:
    """Return the metrics of each panel; loss against compute for three sizes on the same data."""
    ends = [(run, end) for run in runs if (end := _final(run)) is not None]
    data = [[run.config.get(x) for x in ("tokenizer", "data", "val_files")] for run, _ in ends]
    sizes = {flops for _, (flops, _) in ends}
    return (*PANELS, COMPUTE) if len(sizes) > 2 and all(d == data[0] for d in data) else PANELS


def _final(run: History) -> Float64[np.ndarray, "2"] | None:
    """Return FLOPs and validation loss of a finished run; None if not finished or not known."""
    found = run.series(*COMPUTE)
    finished = run.metrics["step"][-1] == run.config.get("num_steps")
    return found[:, -1] if finished and found.size else None


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
    """Draw one metric of the runs against another; the training loss with validation losses."""
    from matplotlib.ticker import LogLocator

    if (x, y) == COMPUTE:
        return _draw_compute(axes, runs)
    (x_unit, x_label), (y_unit, y_label) = _unit(runs, x), _unit(runs, y)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.locator_params("x", nbins=4)  # more labels would overlap
    axes.xaxis.set_major_formatter("{x:,g}")
    medians = []
    for run, (colour, line, mark, _) in zip(runs, cycle(LOOKS), strict=False):
        at, values = run.series(x, y) / [[x_unit], [y_unit]]
        if not len(values):
            continue
        # A schedule has no noise, and a median would distort its end.
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
    elif y == "grad_norm" and highest > 10 * lowest:  # smaller ranges would have no ticks
        axes.set_yscale("log", subs=[])
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    else:
        axes.set_ylim(0, 1.15 * highest or 1)


def _draw_compute(axes: "Axes", runs: Sequence[History]) -> None:
    """Draw the last validation loss of each run against its FLOPs, and a power law if it fits."""
    ends = []
    for run, (colour, _, mark, _) in zip(runs, cycle(LOOKS), strict=False):
        if (end := _final(run)) is not None:
            ends.append(end)
            axes.plot(*end, c=colour, ls="", marker=mark)
    flops, losses = np.array(ends).T
    if law := fit(flops, losses):
        (E, _, power), errors = law.values, np.sqrt(np.diag(law.covariance))
        x = np.geomspace(flops.min(), flops.max(), 100)
        axes.plot(x, law.loss(x), c=INK, lw=1)
        axes.set_title(
            f"exponent {-power:.3f} ± {errors[2]:.3f}, irreducible loss {E:.2f} ± {errors[0]:.2f}",
            fontsize="small",
        )
    axes.set(xscale="log", xlabel=LABELS["flops"][0], ylabel=LABELS["val_loss"][0])


def _thinned(
    x: Float64[np.ndarray, "steps"], y: Float64[np.ndarray, "steps"]
) -> tuple[Float64[np.ndarray, "points"], Float64[np.ndarray, "points"]]:
    """Reduce a line to its ends and the extremes of each segment, so that outliers are kept."""
    if len(y) <= MOST_POINTS:
        return x, y
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), MOST_POINTS // 2 - 1):
        kept |= {stretch[y[stretch].argmin()], stretch[y[stretch].argmax()]}
    return x[sorted(kept)], y[sorted(kept)]


def _frame_losses(
    axes: "Axes", runs: Sequence[History], medians: Sequence[Float64[np.ndarray, "steps"]]
) -> None:
    """Crop initial and diverged losses; show the speedrun's target if it is near."""
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
    """Return the divisor of a metric for display, and the label of its axis."""
    label, units = LABELS[metric]
    most = max(run.series(metric, metric)[0].max(initial=0) for run in runs)
    return next(
        ((size, f"{label} ({unit})") for size, unit in units.items() if most >= size), (1, label)
    )


def new_figure(width: float, height: float) -> "Figure":
    """Create a figure of this size in inches, without pyplot, which would keep a reference."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def own_style() -> AbstractContextManager[None]:
    """Use STYLE in Matplotlib, whatever is in this machine's matplotlibrc."""
    from matplotlib import style

    return style.context(["default", STYLE])
