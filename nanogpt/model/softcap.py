"""The soft cap on logits, for the loss and for sampling."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Softcap(NamedTuple):
    """bound * tanh((logit + shift) / width), which keeps logits within ±bound.

    Gemma 2 (arXiv:2408.00118) has bound = width and no shift. (11.5, 15.0, 5.0) is
    modded-nanogpt's 23 * sigmoid((logit + 5) / 7.5) (2026-01) minus 11.5, with the same softmax.
    """

    bound: float
    width: float
    shift: float


def softcap(logits: Float[Array, "..."], cap: Softcap) -> Float[Array, "..."]:
    """Return the capped logits, float32."""
    return cap.bound * softcap_tanh(logits, cap)


def softcap_tanh(
    logits: Float[Array, "..."], cap: Softcap, tanh: Callable[[Array], Array] = jnp.tanh
) -> Float[Array, "..."]:
    """Return the capped logits divided by their bound, float32."""
    x = logits.astype(jnp.float32) * (1 / cap.width)
    # Triton would not optimize away the addition of zero.
    return tanh(x + cap.shift / cap.width if cap.shift else x)
