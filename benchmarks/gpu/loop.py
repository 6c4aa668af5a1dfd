"""Timing what runs on the device, and whether it is worth it: does it compute what XLA does?"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from benchmarks.gpu.rows import Unmeasured
from benchmarks.gpu.variants import Size

Work = Callable[..., PyTree]  # (last result, *arguments) to the next result
WARM_UP = 3  # calls, or steps, before the clock starts
TOLERANCE = 0.1  # relative error: bfloat16 makes 1%, 8-bit floats 3%, mistakes about 100%


def median_ms(size: Size, advance: Callable[[PyTree], PyTree], carry: PyTree) -> float:
    """Milliseconds of one `carry = advance(carry)`; the host sends off many before it waits."""
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
    """Jitted `carry -> carry` that makes `result = work(result, *arguments)` so many times.

    The carry is (result, arguments), and is consumed. In each round one number of every argument is
    replaced by one that depends on the last result. So nothing can be computed once for all rounds;
    and as the results are carried and returned, nothing can be left out.
    """

    def again(_, carry: tuple) -> tuple:
        result, arguments = carry
        first = jax.tree.leaves(result)[0]
        number = jnp.tanh(first[(0,) * first.ndim].astype(jnp.float32))
        nudged = [x.at[(0,) * x.ndim].set(number.astype(x.dtype)) for x in arguments]
        return work(result, *nudged), nudged

    return jax.jit(lambda carry: jax.lax.fori_loop(0, rounds, again, carry), donate_argnums=0)


def part_ms(size: Size, work: Work, arguments: list[Array], result: PyTree = None) -> float:
    """Milliseconds of one `work`; the arguments, and the first result if given, are consumed."""
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
    errors = [
        jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b.astype(jnp.float32))
        for a, b in zip(*results, strict=True)
    ]
    worst = float(np.max(errors))
    if not worst < TOLERANCE:  # NaN, too, is no agreement
        raise Unmeasured(f"It differs from XLA's results in bfloat16 by {worst:.0%}.")


def random(*shape: int, dtype: Any = jnp.bfloat16) -> Array:
    """Normal numbers, whose rows repeat: to draw gigabytes takes long and much memory."""
    rows = math.gcd(shape[0], 1024)
    drawn = jax.random.normal(jax.random.key(0), (rows, *shape[1:])).astype(dtype)
    return jnp.tile(drawn, (shape[0] // rows, *[1] * (len(shape) - 1)))
