"""Encoding documents into tokens, on all processors.

One process reads the files and distributes batches of documents; workers decode, encode and split
them. Results are returned in the order of the documents, whatever the number of workers.
"""

import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from multiprocessing import get_context, parent_process
from operator import itemgetter
from pathlib import Path
from threading import Thread
from typing import NamedTuple, Protocol

import numpy as np

from nanogpt.data.prefetch import prefetch
from nanogpt.data.shards import Tokens
from nanogpt.data.text.documents import (
    DataError,
    Split,
    Unit,
    digest_of,
    find_split,
    first_share,
    text_of,
)
from nanogpt.data.text.reading import units
from nanogpt.data.tokenizer import load_tokenizer

BATCH = 2**20  # bytes of text that a worker gets at a time
UNIT_BYTES = 100  # overhead of a document, in bytes
TOLD = 5  # number of left-out documents to name

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # quota of a container, in cgroup v2

tokenizer_of = cache(load_tokenizer)


def usable_cpus() -> int:
    """Return the number of CPUs this process may use, by its affinity and its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # there is no quota, or it is "max"
        quota, period = map(int, CPU_QUOTA.read_text().split())
        count = min(count, max(1, quota // period))
    return count


class Inputs(Protocol):
    """Files on this machine or to be downloaded, such as nanogpt.data.text.documents.Files."""

    @property
    def names(self) -> list[str]: ...

    @property
    def weights(self) -> list[int]: ...

    @property
    def fingerprint(self) -> str: ...

    def get(self, name: str) -> Path: ...

    def release(self, names: Sequence[str]) -> None: ...


class Encoded(NamedTuple):
    """A worker's result for a batch."""

    train: Tokens
    val: Tokens
    input_bytes: int
    documents: int
    empty: int
    bad: int
    problems: list[str]  # at most TOLD
    longest: tuple[str, int]  # the document with most tokens in this batch, and their number


class Place(NamedTuple):
    """A position in the inputs."""

    next: tuple[int, int]  # file, and number of its units that were read
    share: float  # share of that file that was read


def split_of(inputs: Inputs, field: str) -> Split:
    """Choose the validation split of the inputs; raises DataError if they have no document."""
    told = []

    def digests() -> Iterator[tuple[int, int]]:
        files = (inputs.get(name) for name in inputs.names)
        for unit in chain.from_iterable(units(file, field, None) for file in files):
            try:
                text = text_of(unit, field)
            except ValueError as error:
                told[:] = told or [f"{unit.where}: {error}"]
                continue
            if unit.digest is not None:
                yield unit.digest, unit.length
            elif not is_empty(text):
                yield digest_of(text), len(text)

    split = find_split(digests())
    if split is None:
        reason = f" ({told[0]})" if told else ""
        raise DataError(f"The inputs have no document{reason}: check the paths and the field.")
    return split


def read_batches(
    inputs: Inputs, field: str, split: Split, start: tuple[int, int]
) -> Iterator[tuple[list[Unit], Place]]:
    """Yield the inputs' units from `start` on, in batches, each with the position of its end."""
    first, skipped = start
    batch, size = [], 0
    paths = prefetch(
        lambda i: inputs.get(inputs.names[i]), range(first, len(inputs.names)), ahead=1
    )
    for source, path in enumerate(paths, first):
        for number, unit in enumerate(units(path, field, split), 1):
            if source == first and number <= skipped:
                continue
            batch.append(unit)
            size += len(unit.raw) + UNIT_BYTES
            if size >= BATCH:
                yield batch, Place((source, number), unit.share_read)
                batch, size = [], 0
    yield batch, Place((len(inputs.names), 0), 0.0)


def in_order(
    work: Callable[[list[Unit]], Encoded],
    batches: Iterable[tuple[list[Unit], Place]],
    processes: int,
) -> Iterator[tuple[Encoded, Place]]:
    """Yield work(batch) with the position of each batch, in order, using `processes` processes.

    At most about two batches per process are in flight.
    """
    if processes == 1:
        yield from ((work(batch), place) for batch, place in batches)
        return
    # If this process is killed, Python cleans up its semaphores with a warning; hide that.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    # Not by fork, as JAX uses threads.
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=become_worker) as pool:
        waiting = deque()
        for batch, place in batches:
            with ctrl_c_held_back():  # inherited by the processes that this starts
                waiting.append((pool.submit(work, batch), place))
            if len(waiting) > 2 * processes:
                result, place = waiting.popleft()
                yield result.result(), place
        for result, place in waiting:
            yield result.result(), place


@contextmanager
def ctrl_c_held_back() -> Generator[None, None, None]:
    """Block Ctrl-C until the end, and for good in the processes started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def become_worker() -> None:
    """Leave Ctrl-C to the parent process, and exit when it ends, even by kill -9."""

    def follow() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=follow, daemon=True).start()


def encode_batch(tokenizer_name: str, field: str, split: Split, batch: list[Unit]) -> Encoded:
    """Encode a batch of documents, each after a separator."""
    tokenizer = tokenizer_of(tokenizer_name)
    separator = np.array([tokenizer.separator], np.uint16)
    train, val = [np.empty(0, np.uint16)], [np.empty(0, np.uint16)]
    documents, empty, problems, sizes = 0, 0, [], Counter()
    for unit in batch:
        try:
            text = text_of(unit, field)
        except ValueError as error:
            problems.append(f"{unit.where}: {error}")
            continue
        if unit.digest is None and is_empty(text):
            empty += 1
            continue
        documents += unit.begins and not unit.is_last_share
        if unit.digest is None and split.below is None:
            first = first_share(len(text))
            parts = [(train, text[:first]), (val, text[first:])]
        else:
            digest = digest_of(text) if unit.digest is None else unit.digest
            parts = [(val if unit.is_last_share or split.is_validation(digest) else train, text)]
        for side, part in parts:
            if part:
                side += [separator] * unit.begins + [tokenizer.encode(part)]
                sizes[unit.where] += unit.begins + len(side[-1])
    return Encoded(
        np.concatenate(train),
        np.concatenate(val),
        sum(len(unit.raw) for unit in batch),
        documents,
        empty,
        len(problems),
        problems[:TOLD],
        max(sizes.items(), key=itemgetter(1), default=("", 0)),
    )


def is_empty(text: str) -> bool:
    return not text or text.isspace()
