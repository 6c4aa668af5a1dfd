"""The validation loss, on the devices of a run."""

from collections.abc import Callable, Iterable

import jax
from jaxtyping import Array, Float, Int

from nanogpt.training.step import Params

Summed = Callable[[Params, Int[Array, "R T1"]], Float[Array, ""]]

IN_FLIGHT = 2  # most batches dispatched but not finished


def validation_loss(
    eval_step: Summed,
    params: Params,
    batches: Iterable[Int[Array, "R T1"]],
    num_tokens: int,
    broken_off: Callable[[], bool] = lambda: False,
) -> float | None:
    """Return the mean loss over `num_tokens` targets, in nats, or None once `broken_off()` is true.

    Only a few batches are in flight. With hundreds, virtual devices of a CPU wait for each other in
    different programs until XLA ends the process, and a GPU would hold all of them in memory.
    """
    sums = []
    for batch in batches:
        if broken_off():
            return None
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-IN_FLIGHT:][0])
    return sum(map(float, sums)) / num_tokens
