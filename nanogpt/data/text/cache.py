"""Text of one's own for a run: its shards in the cache folder, made once and found again.

<cache>/text-<key>/        shards; the key tells the content of the files, in their order, and what
                           was made of it
        contents/<facts>   the digest of files with these names, sizes and times of modification

So text is read again only where those facts changed, and encoded again only where it did itself.
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

BYTES_PER_PROCESS = 2**23  # below that a process takes longer to start than to encode


class Prepared(NamedTuple):
    """The shards that a run can train on."""

    train_files: str  # glob
    val_files: str
    train_tokens: int
    val_tokens: int


def prepare(inputs: Sequence[str], tokenizer: str, field: str = "text") -> Prepared:
    """Files, folders and globs as shards in the cache folder, made now unless they are there.

    Progress, and what was left out, goes to standard error. Raises what `find_files` and
    `make_shards` raise.
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
    """A digest of what is in the files, in their order, and of the kinds that their names tell.

    It is kept, so that it is read off next time, unless a file could not be read now.
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
            if why_no_file(Path(name)) is None:  # else told when its documents are missed
                with open(name, "rb") as file:
                    digest = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError:
            readable = False
        kinds_and_digests.append((sorted(suffixes(Path(name))), digest))
    content = hashlib.sha256(json.dumps(kinds_and_digests).encode()).hexdigest()
    if readable:
        with suppress(OSError):  # told when the shards cannot be written there
            known.parent.mkdir(parents=True, exist_ok=True)
            write_whole(known, content)
    return content
