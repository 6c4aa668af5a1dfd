"""Which files are meant: by a path, by a glob, by the folder that they lie in.

What exists is meant as it is called, whatever the characters of its name: a path is no glob, and
the folder that a glob begins with is none either. Links are followed, but no folder is entered
twice, so that links which lead in a circle come to an end.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path


def matches(pattern: str) -> list[str]:
    """The files and folders that a path or glob means, sorted; `~` is the home folder.

    `**` stands for any folders, as in Python's glob.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    if any_folders := re.search(r"(^|(?<=/))\*\*(/|$)", pattern):
        tops, rest = matches(pattern[: any_folders.start()] or "."), pattern[any_folders.end() :]
        folders = (folder for top in tops for folder, _ in walk(top))
        found = (os.path.join(glob.escape(folder), rest or "*") for folder in folders)
        return sorted({path for inner in found for path in matches(inner)})
    for slash in reversed([*re.finditer("/", re.split(r"[*?]", pattern)[0])]):
        if os.path.isdir(folder := pattern[: slash.end()]):
            return sorted(glob.glob(glob.escape(folder) + pattern[slash.end() :]))
    return sorted(glob.glob(pattern))


def why_no_file(path: Path) -> str | None:
    """What is in the place of a file, to be said of the path; None where it is one, or nothing."""
    if path.is_file() or not os.path.lexists(path):
        return None
    if path.is_dir():
        return "is a folder that cannot be read"
    if path.is_fifo():
        return "is a pipe, not a file"
    return "is no file" if path.exists() else "is a link that leads nowhere"


def files_below(place: str, leave_out: Path | None = None) -> Iterator[Path]:
    """The file `place`, or all that is in the folder `place`, by absolute paths.

    Names that begin with a dot stay out, as does the folder `leave_out`. Links that lead nowhere,
    pipes and folders that cannot be read are among them.
    """
    place = os.path.abspath(place)
    if not os.path.isdir(place):
        yield Path(place)
    for folder, names in walk(place, leave_out):
        yield from (Path(folder, name) for name in names)


def walk(place: str, leave_out: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """The folder `place` and those below it, sorted, each with the names of what is no folder.

    A folder that cannot be read is among those names.
    """
    entered, closed = {leave_out and os.path.realpath(leave_out)}, []
    for folder, folders, names in os.walk(place, followlinks=True, onerror=closed.append):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield folder, sorted(name for name in names if name[0] != ".")
    for error in closed:
        yield os.path.split(error.filename)[0], [os.path.basename(error.filename)]
