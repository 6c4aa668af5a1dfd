"""How long something takes, beside other ways to do it."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Side = TypeVar("Side", bound=Hashable)


def best_in_turn(sides: Mapping[Side, Callable[[], float]], rounds: int) -> dict[Side, float]:
    """The least time that each side returns.

    They take turns, so that whatever else the machine does slows all alike.
    """
    best = dict.fromkeys(sides, math.inf)
    for _ in range(rounds):
        for side, measure in sides.items():
            best[side] = min(best[side], measure())
    return best


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes until its results are there."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start
