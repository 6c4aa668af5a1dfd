"""Cross-entropy over the vocabulary, with the logits kept in the dtype they were computed in.

The logits are the largest array of a training step (a micro-batch of 65,536 tokens times 50,304
ids is 6.6 GB in bfloat16), so no float32 copy of them is ever stored: the forward pass reads them
once for the softmax's normaliser, and the backward pass, written by hand, turns them into their
own gradient in one more pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def softcap(logits: Float[Array, "... V"], cap: float) -> Float[Array, "... V"]:
    """cap * tanh(logits / cap) in float32: keeps logits within ±cap (Gemma 2, arXiv:2408.00118)."""
    return cap * jnp.tanh(logits.astype(jnp.float32) / cap)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."], cap: float
) -> Float[Array, "..."]:
    """-log softmax(softcap(logits))[target] of each token, in nats, as float32.

    Args:
        logits: uncapped logits, bfloat16 or float32.
        targets: the id that was next; a negative one marks a token that has no target: its loss
            and its gradient are zero.
        cap: bound of the soft-capped logits. Because they lie within ±cap, exp(logit - cap)
            neither overflows nor vanishes, and the usual pass over V for the maximum is saved.
    """
    return _forward(logits, targets, cap)[0]


def _forward(logits, targets, cap):
    log_normaliser = cap + jnp.log(jnp.sum(jnp.exp(softcap(logits, cap) - cap), axis=-1))
    # Only the target's logits are gathered. A second reduction over V would make the compiler keep
    # what it shares with the first, the capped logits, in float32.
    target_logit = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(targets >= 0, log_normaliser - softcap(target_logit, cap), 0.0)
    return losses, (logits, targets, log_normaliser)


def _backward(cap, residuals, losses_gradient):
    logits, targets, log_normaliser = residuals
    # The barrier makes XLA compute tanh again from the logits instead of storing it in float32.
    logits = jax.lax.optimization_barrier(logits)
    tanh = jnp.tanh(logits.astype(jnp.float32) / cap)
    probabilities = jnp.exp(cap * tanh - log_normaliser[..., None])
    # The target by comparison: that fuses into the same pass, as a scatter would not.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    gradient = (probabilities - is_target) * (1.0 - tanh**2)
    scale = jnp.where(targets >= 0, losses_gradient, 0.0)[..., None]
    return (gradient * scale).astype(logits.dtype), None


cross_entropy.defvjp(_forward, _backward)
