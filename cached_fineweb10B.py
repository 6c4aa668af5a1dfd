"""Download the tokenised FineWeb10B: the validation shard, then N training shards.

    python cached_fineweb10B.py 9      # 900 million tokens to train on, 2.0 GB in all
    python cached_fineweb10B.py        # all 103 training shards, 20.7 GB in all

A shard gets its name only once its size and SHA-256 agree with the hub's and its header is right,
so whatever matches fineweb10B/fineweb_*.bin is whole. After an interruption run it again: it goes
on where it stopped.
"""

import nanogpt  # noqa: F401  (says what to do where packages are missing)

# isort: split
import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from nanogpt.checks import UserError
from nanogpt.data.shards import ShardError, read_shard

Answer = TypeVar("Answer")

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103


WAITS = (1, 2, 4, 8, 16)  # seconds before another attempt where the hub is overloaded or broken


class DownloadError(UserError):
    """A download that cannot go on; the message is one sentence for the user."""


class HubBusy(DownloadError):
    """The hub asks for patience (429) or fails (5xx): it may answer later."""


class Published(NamedTuple):
    """What the hub says a shard is."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


def main(argv: list[str] | None = None) -> int:
    """Download what the command line asks for; return the exit status."""
    options = parse(argv)
    training = [f"fineweb_train_{i:06d}.bin" for i in range(1, options.shards + 1)]
    try:
        download(["fineweb_val_000000.bin", *training], options.folder)
    except KeyboardInterrupt:
        print("\nInterrupted; run this again to go on where it stopped.", file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"Cannot write in {options.folder} ({error.strerror}): make room there or choose "
            "another --folder, then run this again.",
            file=sys.stderr,
        )
        return 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{message}; see --help.\n")

    def shard_count(text: str) -> int:
        if not (text.isdecimal() and 1 <= int(text) <= TRAINING_SHARDS):
            raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {TRAINING_SHARDS}")
        return int(text)

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shards",
        metavar="N",
        nargs="?",
        type=shard_count,
        default=TRAINING_SHARDS,
        help="training shards, of 100 million tokens and 200 MB each (default: all %(default)s)",
    )
    parser.add_argument(
        "--folder",
        metavar="PATH",
        type=Path,
        default=Path("fineweb10B"),
        help="where the shards go (default: %(default)s)",
    )
    return parser.parse_args(argv)


def download(names: list[str], folder: Path) -> None:
    """Bring the shards `names` into `folder`; print a line for each."""
    published = {name: look_up(name) for name in names if not is_whole(folder / name)}
    folder.mkdir(parents=True, exist_ok=True)
    check_space(published, folder)
    for i, name in enumerate(names, start=1):
        if name in published:
            fetch(name, published[name], folder)
        outcome = "verified" if name in published else "already here"
        megabytes = (folder / name).stat().st_size / 1e6
        print(f"{i}/{len(names)} {name} {megabytes:.1f} MB {outcome}", flush=True)


def is_whole(path: Path) -> bool:
    """Whether the shard `path` is there, as long as its header says."""
    try:
        read_shard(path)
    except ShardError:
        return False
    return True


def look_up(name: str) -> Published:
    """Ask the hub for the size and SHA-256 of the shard `name`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
    file = patiently(name, lambda: get_hf_file_metadata(url))
    # The entity tag of a large file is its SHA-256; any other tag is not the hub's answer.
    if file.size is None or file.etag is None or not re.fullmatch("[0-9a-f]{64}", file.etag):
        raise DownloadError(
            f"The answer about {name} has no size and SHA-256: check that HF_ENDPOINT, if set, "
            "names a hub and that no proxy or login page stands before it."
        )
    return Published(file.size, file.etag)


def check_space(published: dict[str, Published], folder: Path) -> None:
    """Raise DownloadError unless all that is still to come fits on the disk of `folder`."""
    partials = [path for name in published if (path := partial_path(folder, name)).exists()]
    here = sum(path.stat().st_size for path in partials)
    needed = sum(shard.size for shard in published.values()) - here
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"The download needs {needed / 1e9:.1f} GB but {folder} has {free / 1e9:.1f} GB free: "
            "make room, choose another --folder, or ask for fewer shards."
        )


def partial_path(folder: Path, name: str) -> Path:
    """Where a shard is while it is on its way: a hidden file that no shard pattern matches."""
    return folder / f".{name}.partial"


def fetch(name: str, published: Published, folder: Path) -> None:
    """Download the shard `name` or the rest of it, verify it, and only then give it its name."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    partial = partial_path(folder, name)
    with WeakFileLock(folder / ".lock"):  # waits while another download is at it in this folder
        if is_whole(folder / name):  # the other one brought it
            return
        if partial.exists() and partial.stat().st_size > published.size:
            partial.unlink()
        # `hf_hub_download` forgets what an interrupted run had; the function beneath it need not.
        with partial.open("ab") as file:
            patiently(
                name,
                lambda: http_get(
                    hf_hub_url(REPOSITORY, name, repo_type="dataset"),
                    file,
                    resume_size=file.tell(),
                    expected_size=published.size,
                    headers=build_hf_headers(headers={"Accept-Encoding": "identity"}),
                    displayed_filename=name,
                ),
            )
            file.flush()
            os.fsync(file.fileno())
        with partial.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != published.sha256:
            partial.unlink()
            raise DownloadError(
                f"{name} came damaged (its SHA-256 is {sha256}, the hub's {published.sha256}) and "
                "was deleted: run this again to download it anew."
            )
        if not is_whole(partial):
            partial.unlink()
            raise DownloadError(
                f"{name} is not a shard although it came as the hub has it: check that "
                "HF_ENDPOINT, if set, names a hub that carries the real dataset."
            )
        os.replace(partial, folder / name)


def patiently(name: str, ask: Callable[[], Answer]) -> Answer:
    """What `ask` gets from the hub, asked again after a while as long as the hub is busy."""
    for wait in WAITS:
        try:
            with hub_errors(name):
                return ask()
        except HubBusy as error:
            print(f"{error} Trying again in {wait} s.", flush=True)
            time.sleep(wait)
    with hub_errors(name):
        return ask()


@contextmanager
def hub_errors(name: str) -> Generator[None, None, None]:
    """Make one DownloadError of whatever goes wrong between us and the hub."""
    try:
        yield
    except Exception as error:  # the hub's library and those under it share no base class
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the hub but the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"the hub answered HTTP {status}" if status else lines[0].rstrip(".")
        busy = status is not None and (status in (408, 429) or status >= 500)
        raise (HubBusy if busy else DownloadError)(
            f"Cannot download {name} ({reason}): check the network connection and HF_ENDPOINT, "
            "then run this again to go on where it stopped."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
