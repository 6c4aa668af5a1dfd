"""Finding files by a path, a glob or the folder that contains them.

Names of existing files and folders are taken literally, even if they contain glob characters, as is
the folder at the start of a glob. Links are followed, but no folder is entered twice, so circular
links cause no loop.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path


def matches(pattern: str) -> list[str]:
    """Return the files and folders that match a path or glob, sorted; `~` is the home folder.

    `**` matches any folders, as in Python's glob.
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
    """Explain what a path is instead of a readable file; None if it is one or does not exist."""
    if path.is_file() or not os.path.lexists(path):
        return None
    if path.is_dir():
        return "is a folder that cannot be read"
    if path.is_fifo():
        return "is a pipe, not a file"
    return "is not a regular file" if path.exists() else "is a broken link"


def files_below(place: str, leave_out: Path | None = None) -> Iterator[Path]:
    """Yield the file `place`, or everything in the folder `place`, as absolute paths.

    Names that begin with a dot are skipped, as is the folder `leave_out`. Dangling links, pipes and
    folders that cannot be read are included.
    """
    place = os.path.abspath(place)
    if not os.path.isdir(place):
        yield Path(place)
    for folder, names in walk(place, leave_out):
        yield from (Path(folder, name) for name in names)


def walk(place: str, leave_out: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield the folder `place` and those below it, sorted, each with the names of its files.

    Folders that cannot be read are included in those names.
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
