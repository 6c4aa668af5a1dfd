"""Progress of a long job, and its line on the console."""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from math import inf

import numpy as np


class Pace:
    """Progress, speed and remaining time of a job."""

    def __init__(self, weights: Sequence[int]):
        self.weights = [*weights, 0]
        self.before = np.cumsum([0, *weights]).tolist()
        self.first = None

    def line(self, file: int, share: float, num_bytes: int, tokens: int) -> str:
        """Return a progress line for the share of the file read and the totals so far."""
        done = (self.before[file] + share * self.weights[file]) / max(1, self.before[-1])
        line = f"encoded {done:.1%} | {tokens:,} tokens"
        now = time.monotonic(), done, num_bytes
        self.first = self.first or now  # exclude the start and what was skipped from the speed
        seconds, share_done, new_bytes = np.subtract(now, self.first)
        if share_done <= 0:
            return line
        left = timedelta(seconds=round(seconds * (1 - done) / share_done))
        return f"{line} | {new_bytes / 1e6 / seconds:.1f} MB/s | ETA {left}"


@contextmanager
def progress_line() -> Generator[Callable[[str], None], None, None]:
    """Yield a function that shows a line: in place on a terminal, otherwise every ten seconds."""
    terminal = sys.stderr.isatty()
    pause, start, end = (0.2, "\r", "\x1b[K") if terminal else (10.0, "", "\n")
    last = -inf

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > pause:
            last = time.monotonic()
            with suppress(OSError, ValueError):  # the console may be gone
                print(start, line, end, sep="", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        last = -inf
        if terminal:
            show("")
