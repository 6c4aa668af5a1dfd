"""The three products with the head in FP8 (arXiv:2209.05433), fast on GPUs from Hopper on.

The plain products that they replace are in nanogpt/model/loss.py. Scales are fixed, as in
modded-nanogpt (2025-01-13), and powers of two, so that undoing them is exact. Formats are e4m3, up
to 448, for features and weights, and e5m2, up to 57344, for gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FEATURE_SCALE = 2.0**4  # RMS-normalized, so within ±sqrt(D): 443 after scaling if D is 768
HEAD_SCALE = 2.0**8  # weights saturate at 1.75, and have full precision down to 6e-5
GRADIENT_SCALE = 2.0**14  # dlogits lie within ±1, as weights sum to 1; full precision to 4e-9


def fp8_logits(features: Float[Array, "BT D"], head: Float[Array, "D V"]) -> Float[Array, "BT V"]:
    """Return features @ head, in the dtype of the features."""
    product = jnp.einsum(
        "td,dv->tv",
        _e4m3(features, FEATURE_SCALE),
        _e4m3(head, HEAD_SCALE),
        preferred_element_type=features.dtype,
    )
    return product * (1 / (FEATURE_SCALE * HEAD_SCALE))


def to_e5m2(dlogits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return GRADIENT_SCALE * dlogits in e5m2."""
    return (dlogits * GRADIENT_SCALE).astype(E5M2)


def fp8_gradients(
    features: Float[Array, "BT D"],
    head: Float[Array, "D V"],
    dlogits: Float[Array, "BT V"],
    g: Float[Array, "BT 1"],
) -> tuple[Float[Array, "BT D"], Float[Array, "D V"]]:
    """Return g (dlogits @ headᵀ) and (g features)ᵀ @ dlogits, float32, for dlogits in e5m2."""
    # Otherwise Hopper accumulates with 14 bits: enough for logits, not for sums over all tokens.
    product = partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    largest = jnp.max(jnp.abs(g), initial=jnp.finfo(jnp.float32).tiny)
    weighted = _e4m3(features * (g / largest), FEATURE_SCALE)
    dfeatures = product("tv,dv->td", dlogits, _e4m3(head, HEAD_SCALE))
    dfeatures = dfeatures * (g / (GRADIENT_SCALE * HEAD_SCALE))
    dhead = product("td,tv->dv", weighted, dlogits)
    return dfeatures, dhead * (largest / (FEATURE_SCALE * GRADIENT_SCALE))


def _e4m3(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """Return x * scale in e4m3, clipped to its range: larger values would become NaN."""
    largest = float(jnp.finfo(E4M3).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -largest, largest).astype(E4M3)
