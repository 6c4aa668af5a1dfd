"""The page about runs: their curves, and a table of their settings, results and differences."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

from nanogpt.report.curves import LABELS, History
from nanogpt.report.picture import HOW_TO_READ, INK, LOOKS, draw, new_figure, own_style, panels_for


def page(runs: Sequence[History]) -> str:
    """Return the page, self-contained HTML in which all text from the runs is escaped."""
    looks = [
        f'<span class="look" style="--colour:{colour};--line:{line}">{sign}</span> '
        f"{escape(run.name)}"
        for run, (colour, line, _, sign) in zip(runs, cycle(LOOKS), strict=False)
    ]
    settings = [dict(_flat(run.config)) for run in runs]
    differing = [
        {name: value for name, value in each.items() if any(o.get(name) != value for o in settings)}
        for each in settings
    ]
    heads = "".join(f'<th scope="col">{look}</th>' for look in looks)
    rows = _rows([_facts(run) for run in runs])
    if len(runs) > 1:
        title = "Settings that differ" if any(differing) else "No settings differ"
        rows += f'<tr><th colspan="{len(runs) + 1}">{title}</th></tr>{_rows(differing)}'
    parts = {
        "title": escape(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs",
        "legend": "".join(f"<li>{look}</li>" for look in looks),
        "how_to_read": HOW_TO_READ,
        "panels": "\n".join(_svg(runs, *panel) for panel in panels_for(runs)),
        "table": f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody>",
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda name: parts[name[1]], template)


def _svg(runs: Sequence[History], x: str, y: str) -> str:
    """Draw a panel as SVG, in the page's text colour, scaling to the available width."""
    file = StringIO()
    with own_style():
        figure = new_figure(4.4, 3)
        draw(figure.subplots(), runs, x, y)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r' (id="[\w.]+_\d+"|(width|height)="[\d.]+pt")', "", svg)  # ids would repeat
    svg = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d)\d+|\n", r"\1", path[0]), svg)
    title = f"{LABELS[y][0]} against {LABELS[x][0]}"
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _rows(columns: Sequence[dict[str, Any]]) -> str:
    """Return the rows of the table, from one column per run."""
    return "".join(
        f'<tr><th scope="row">{escape(name).replace("_", "_<wbr>")}</th>'
        + "".join(f"<td>{escape(str(column.get(name, '—')))}</td>" for column in columns)
        + "</tr>"
        for name in dict.fromkeys(name for column in columns for name in column)
    )


def _facts(run: History) -> dict[str, str]:
    """Return the rows of the table that every run has."""
    last = {metric: values[-1] for metric, values in run.metrics.items()}
    known = {**run.config, **run.circumstances}
    steps = f"{last['step']:,.0f}"
    if "num_steps" in known:
        steps += f" of {known['num_steps']:,}"
    validation = "unknown"
    for step, loss in run.series("step", "val_loss").T[-1:]:
        validation = f"{loss:.4f}" + (f" at step {step:,.0f}" if step != last["step"] else "")
    return {
        "preset": known.get("preset", "unknown"),
        "parameters": run.parameters,
        "steps": steps,
        "tokens": f"{last['tokens']:,.0f}",
        "training loss": f"{last['train_loss']:.4f}",
        "validation loss": validation,
        "training time": f"{last['time_s']:,.1f} s",
        "tokens per second": f"{last['tokens'] / last['time_s']:,.0f}",
        "hardware": ", ".join(known.get("accelerators") or [known.get("hardware", "unknown")]),
        "commit": known.get("commit", "unknown"),
        "date": known.get("date", "unknown").replace("T", " ").replace("+00:00", " UTC"),
    }


def _flat(settings: dict[str, Any] | list[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by their full names, such as model.num_layers and stages.1.rate.

    Leaves out the names and sources of the run, and the shards made from its `data`.
    """
    items = settings.items() if isinstance(settings, dict) else enumerate(settings, start=1)
    made_of_own_text = isinstance(settings, dict) and not prefix and settings.get("data")
    made = ("train_files", "val_files") if made_of_own_text else ()
    for name, value in items:
        nested = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(each, dict) for each in value)
        )
        if nested:
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in ("run_name", "resume", "config", "preset", *made):
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            yield f"{prefix}{name}", text
