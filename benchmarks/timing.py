"""Timing of alternatives."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Side = TypeVar("Side", bound=Hashable)


def best_in_turn(sides: Mapping[Side, Callable[[], float]], rounds: int) -> dict[Side, float]:
    """Return the shortest time of each side.

    The sides alternate, so that other load on the machine slows all of them equally.
    """
    best = dict.fromkeys(sides, math.inf)
    for _ in range(rounds):
        for side, measure in sides.items():
            best[side] = min(best[side], measure())
    return best


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the time of a call until its results are ready."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start
