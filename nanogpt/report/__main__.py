"""`python3 -m nanogpt.report runs/a runs/b` plots runs on shared axes.

report.png is a picture; report.html has the same curves as vector graphics, and a table of the runs
and the settings that differ between them.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Annotated

import tyro

from nanogpt.checks import UserError
from nanogpt.command_line import parse, print_result
from nanogpt.report.curves import NoNumbers, read_run
from nanogpt.report.page import page
from nanogpt.report.picture import overview
from nanogpt.runs.folder import RunError


@dataclass(frozen=True)
class Options:
    """Plot runs on shared axes, and list their differences."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, e.g. runs/<name>."""
    out: Path | None = None
    """Output: a .png or .html file, or a folder for report.png and report.html; None: the parent
    folder of the first run."""


def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line asks for; return the exit status."""
    options = parse(Options, arguments, prog="python3 -m nanogpt.report")
    try:
        files = report(options.runs, options.out, lambda line: print(line, file=sys.stderr))
        return print_result("\n".join(map(str, files)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def report(
    folders: Sequence[Path],
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write the picture, the page or both (see `Options`), and return their paths.

    Folders without metrics are skipped and reported with `say`, so that runs/* can be given. Raises
    RunError, with a sentence for the user, if there is nothing to draw, or if a run cannot be read
    or a file cannot be written.
    """
    if not folders:
        raise RunError("Nothing to draw. Give one or more run folders, e.g. runs/<name>.")
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
        say(f"Skipped: {error}")
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


if __name__ == "__main__":
    sys.exit(main())
