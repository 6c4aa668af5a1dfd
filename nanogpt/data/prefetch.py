"""Prefetching in a thread: the next batches are read while the device computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def prefetch(
    make: Callable[[int], Result], steps: Iterable[int], ahead: int = 2
) -> Iterator[Result]:
    """Yield `make(step)` for each step in order, computed by a thread up to `ahead` steps early.

    An exception in `make` is raised at its step.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        waiting = deque()
        for step in steps:
            waiting.append(worker.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
