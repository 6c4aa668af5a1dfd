"""Shards of the user's own text, in the cache folder, for later runs to use again.

<cache>/text-<key>/        shards; the key is a hash of the contents of the files, in order, and of
                           the settings of the shards
        contents/<facts>   hash of the contents of files with these names, sizes and mtimes

So text is read again only if those facts have changed, and encoded again only if its content has.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import NamedTuple

from nanogpt.checks import shown
from nanogpt.data.find import why_no_file
from nanogpt.data.text.documents import Files, find_files
from nanogpt.data.text.encode import usable_cpus
from nanogpt.data.text.eta import progress_line
from nanogpt.data.text.prepare import Recipe, fingerprint_of, make_shards
from nanogpt.data.text.unpacked import suffixes
from nanogpt.files import cache_folder, write_whole

BYTES_PER_PROCESS = 2**23  # for less text, a process takes longer to start than to encode


class Prepared(NamedTuple):
    """The shards that a run can train on."""

    train_files: str  # glob
    val_files: str
    train_tokens: int
    val_tokens: int


def prepare(inputs: Sequence[str], tokenizer: str, field: str = "text") -> Prepared:
    """Return the shards of files, folders and globs in the cache folder, created if missing.

    Progress, and what was left out, is printed to standard error. Raises the errors of `find_files`
    and `make_shards`.
    """
    files, recipe = find_files(inputs), Recipe(tokenizer, field)
    processes = min(usable_cpus(), 1 + sum(files.weights) // BYTES_PER_PROCESS)
    with progress_line() as show:
        files = files._replace(fingerprint=content_of(files, show))
        folder = cache_folder() / f"text-{fingerprint_of(files, recipe)[:12]}"
        made = make_shards(files, folder, recipe, processes, show)
    if made.empty or made.bad or made.dominant:
        print(made.summary(), file=sys.stderr)
    return Prepared(
        train_files=f"{escape(str(folder))}/{recipe.name}_train_*.bin",
        val_files=f"{escape(str(folder))}/{recipe.name}_val_*.bin",
        train_tokens=made.train_tokens,
        val_tokens=made.val_tokens,
    )


def content_of(files: Files, show: Callable[[str], None]) -> str:
    """Return a hash of the files' contents, in order, and of the formats in their names.

    It is cached for the next time, unless a file could not be read.
    """
    known = cache_folder() / "contents" / files.fingerprint
    with suppress(OSError):
        if re.fullmatch(b"[0-9a-f]{64}", content := known.read_bytes()):
            return content.decode()
    kinds_and_digests, readable = [], True
    for name in files.names:
        show(f"reading {shown(name)}")
        digest = ""
        try:
            if why_no_file(Path(name)) is None:  # other paths are reported when they are read
                with open(name, "rb") as file:
                    digest = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError:
            readable = False
        kinds_and_digests.append((sorted(suffixes(Path(name))), digest))
    content = hashlib.sha256(json.dumps(kinds_and_digests).encode()).hexdigest()
    if readable:
        with suppress(OSError):  # reported when the shards cannot be written there either
            known.parent.mkdir(parents=True, exist_ok=True)
            write_whole(known, content)
    return content
