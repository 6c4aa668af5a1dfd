"""Pictures of runs: `python3 -m nanogpt.report runs/a runs/b` draws them over each other.

report.png is one picture; report.html has the same curves, sharp at any size, and a table of what
the runs were and in which settings they differ.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from io import StringIO
from itertools import cycle
from os.path import commonpath
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanogpt.checks import UserError
from nanogpt.report.curves import (
    HOW_TO_READ,
    INK,
    LABELS,
    LOOKS,
    PANELS,
    History,
    NoNumbers,
    draw,
    new_figure,
    overview,
    own_style,
    read_run,
)
from nanogpt.runs.folder import RunError


@dataclass(frozen=True)
class Options:
    """Draw what runs did, over each other, and tell what they were."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the runs, runs/<name>."""
    out: Path | None = None
    """A .png, a .html, or a folder for both, report.png and report.html; None for the folder that
    the first run lies in."""


def main(arguments: list[str] | None = None) -> int:
    """Draw what the command line asks for; return the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python3 -m nanogpt.report")
    try:
        for file in report(options.runs, options.out, lambda line: print(line, file=sys.stderr)):
            print(file)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def report(
    folders: Sequence[Path],
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write the picture, the page or both, as `Options` says, and return their paths.

    What has no numbers is left out and told with `say`, so that runs/* can be drawn. Raises
    RunError, in a sentence for the user, where there is no Matplotlib, nothing to draw, a run that
    cannot be read or a file that cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise RunError('Pictures need Matplotlib: pip install -e ".[plot]" brings it.')
    if not folders:
        raise RunError("There is nothing to draw: name runs, runs/<name>.")
    places = list(dict.fromkeys(folder.resolve() for folder in folders))
    parent = Path(commonpath([place.parent for place in places]))
    runs, left_out = [], []
    for place in places:
        try:
            runs.append(read_run(place, f"{place.relative_to(parent)}"))
        except NoNumbers as error:
            left_out.append(error)
    if not runs:
        raise left_out[0]
    for error in left_out:
        say(f"Left out: {error}")
    out = out or folders[0].parent
    alone = out.suffix in (".png", ".html") and not out.is_dir()
    files = [out] if alone else [out / "report.png", out / "report.html"]
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".png":
                overview(runs).savefig(file, dpi=110)
            else:
                file.write_text(page(runs), encoding="utf-8")
        except OSError as error:
            raise RunError(
                f"{file} cannot be written ({error.strerror}): choose another place with --out."
            ) from error
    return files


def page(runs: Sequence[History]) -> str:
    """The page: HTML that needs nothing else, in which everything from the runs is escaped."""
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
        "panels": "\n".join(_svg(runs, *panel) for panel in PANELS),
        "table": f"<thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody>",
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda name: parts[name[1]], template)


def _svg(runs: Sequence[History], x: str, y: str) -> str:
    """A panel, drawn in the page's colour of text, in whatever width there is."""
    file = StringIO()
    with own_style():
        figure = new_figure(4.4, 3)
        draw(figure.subplots(), runs, x, y)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r' (id="[\w.]+_\d+"|(width|height)="[\d.]+pt")', "", svg)  # ids: others' as well
    svg = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d)\d+|\n", r"\1", path[0]), svg)
    title = f"{LABELS[y][0]} against {LABELS[x][0]}"
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _rows(columns: Sequence[dict[str, Any]]) -> str:
    """Rows of the table, from a column of each run."""
    return "".join(
        f'<tr><th scope="row">{escape(name).replace("_", "_<wbr>")}</th>'
        + "".join(f"<td>{escape(str(column.get(name, '—')))}</td>" for column in columns)
        + "</tr>"
        for name in dict.fromkeys(name for column in columns for name in column)
    )


def _facts(run: History) -> dict[str, str]:
    """What the table tells of a run, whatever its settings."""
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
    """Settings by their full names, as in model.num_layers and stages.1.rate.

    But for those of the run itself, and for the shards that were made of its `data`.
    """
    items = settings.items() if isinstance(settings, dict) else enumerate(settings, start=1)
    made = ("train_files", "val_files") if not prefix and settings.get("data") else ()
    for name, value in items:
        nested = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(each, dict) for each in value)
        )
        if nested:
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in ("run_name", "resume", "config", "preset", *made):
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            yield f"{prefix}{name}", text


if __name__ == "__main__":
    sys.exit(main())
