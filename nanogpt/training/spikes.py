"""Loss spikes: how many standard deviations a loss is above recent ones."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

RECENT = 0.05  # weight of a new loss in the running mean and variance, which cover about 20 steps


def spike_and_moments(
    loss: Float[Array, ""],
    mean: Float[Array, ""],
    variance: Float[Array, ""],
    step: Int[Array, ""],
    finite: Bool[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return the spike, 0 in the first steps, and the running mean and variance with this loss.

    The first loss, at step 0, is the initial mean; later ones update mean and variance (West,
    1979). A step that is not finite changes neither.
    """
    surprise = loss - mean
    spike = jnp.where(step >= 1 / RECENT, surprise / jnp.sqrt(variance + 1e-12), 0.0)
    weight = jnp.where(finite, jnp.where(step == 0, 1.0, RECENT), 0.0)
    surprise = jnp.where(finite, surprise, 0.0)
    return spike, mean + weight * surprise, (1 - weight) * (variance + weight * surprise**2)
