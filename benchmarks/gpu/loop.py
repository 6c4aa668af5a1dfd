"""Timing of work on the device, and a check that its results agree with XLA's."""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from benchmarks.gpu.rows import Unmeasured
from benchmarks.gpu.variants import Size

Work = Callable[..., PyTree]  # (last result, *arguments) to the next result
WARM_UP = 3  # calls, or steps, before the clock starts
TOLERANCE = 0.1  # relative error: about 1% for bfloat16, 3% for 8-bit floats, 100% for bugs


def median_ms(size: Size, advance: Callable[[PyTree], PyTree], carry: PyTree) -> float:
    """Return the milliseconds of one `carry = advance(carry)`; the host queues many of them."""
    jax.block_until_ready(carry)
    times = []
    for _ in range(size.repeats):
        start = time.perf_counter()
        for _ in range(size.calls):
            carry = advance(carry)
        jax.block_until_ready(carry)
        times.append(1e3 * (time.perf_counter() - start) / size.calls)
    return statistics.median(times)


def looped(work: Work, rounds: int) -> Callable[[tuple], tuple]:
    """Return a jitted `carry -> carry` that repeats `result = work(result, *arguments)`.

    The carry is (result, arguments), and is donated. In each round one element of every argument is
    replaced by one that depends on the last result, so that nothing can be hoisted out of the loop;
    and because the results are carried and returned, nothing can be eliminated.
    """

    def again(_, carry: tuple) -> tuple:
        result, arguments = carry
        first = jax.tree.leaves(result)[0]
        number = jnp.tanh(first[(0,) * first.ndim].astype(jnp.float32))
        nudged = [x.at[(0,) * x.ndim].set(number.astype(x.dtype)) for x in arguments]
        return work(result, *nudged), nudged

    return jax.jit(lambda carry: jax.lax.fori_loop(0, rounds, again, carry), donate_argnums=0)


def part_ms(size: Size, work: Work, arguments: list[Array], result: PyTree = None) -> float:
    """Return the milliseconds of one `work`; the arguments and the first result are donated."""
    if result is None:
        shapes = jax.eval_shape(work, None, *arguments)
        result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    advance, carry = looped(work, size.rounds), (result, arguments)
    for _ in range(WARM_UP):
        carry = advance(carry)
    return median_ms(size, advance, carry) / size.rounds


def check_agreement(work: Work, reference: Work, arguments: list[Array]) -> None:
    """Raise Unmeasured if results differ from the reference's by more than rounding."""
    results = [jax.tree.leaves(jax.jit(each)(None, *arguments)) for each in (work, reference)]
    errors = []
    for pair in zip(*results, strict=True):
        a, b = (np.asarray(x, np.float32) for x in pair)
        errors.append(np.linalg.norm(a - b) / np.linalg.norm(b))
    worst = float(np.max(errors))
    if not worst < TOLERANCE:  # NaN is a disagreement, too
        raise Unmeasured(f"It differs from XLA's results in bfloat16 by {worst:.0%}.")


def random(*shape: int, dtype: Any = jnp.bfloat16) -> Array:
    """Return normal numbers in repeating rows: drawing gigabytes would take too long."""
    return _random(shape, dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _random(shape: tuple[int, ...], dtype: Any) -> Array:
    rows = math.gcd(shape[0], 1024)
    drawn = jax.random.normal(jax.random.key(0), (rows, *shape[1:])).astype(dtype)
    return jnp.tile(drawn, (shape[0] // rows, *[1] * (len(shape) - 1)))
