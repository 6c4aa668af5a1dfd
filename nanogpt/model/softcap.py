"""The soft cap that bounds logits, for the loss and for sampling."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Softcap(NamedTuple):
    """bound * tanh((logit + shift) / width), which keeps logits within ±bound.

    Gemma 2 (arXiv:2408.00118) has bound = width and no shift. (11.5, 15.0, 5.0) is the
    23 * sigmoid((logit + 5) / 7.5) of modded-nanogpt (2026-01), less 11.5, which no softmax sees.
    """

    bound: float
    width: float
    shift: float


def softcap(logits: Float[Array, "..."], cap: Softcap) -> Float[Array, "..."]:
    """The capped logits, float32."""
    return cap.bound * softcap_tanh(logits, cap)


def softcap_tanh(
    logits: Float[Array, "..."], cap: Softcap, tanh: Callable[[Array], Array] = jnp.tanh
) -> Float[Array, "..."]:
    """The capped logits over their bound, float32."""
    x = logits.astype(jnp.float32) * (1 / cap.width)
    # Triton would not leave out the addition of a zero.
    return tanh(x + cap.shift / cap.width if cap.shift else x)
