"""Causal self-attention: one readable reference, and the fast backend held against it.

`attention` is what the model calls. Its `backend` is one of

    "xla"     the reference below, compiled by XLA: any device, any dtype
    "cudnn"   cuDNN's fused flash attention: NVIDIA Ampere or newer, bfloat16

and `choose_backend` picks one for the hardware at hand: it compiles the fast backend once on a
tiny input, compares it with the reference, and falls back, saying why, if either step fails.

Shapes: B batch, T sequence, N heads, H head size.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Backend = Literal["xla", "cudnn"]


def visible(T: int, window: int | None) -> Bool[Array, "T T"]:
    """Which keys (columns) each query (row) sees: itself and the `window - 1` tokens before it.

    `window=None` shows every earlier token.
    """
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q kᵀ) v over the visible keys; the softmax is taken in float32.

    Heads go before the sequence while the matrices are multiplied, which suits XLA on CPUs.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = jnp.einsum("bnqh,bnkh->bnqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible(q.shape[2], window), scale * scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkh->bnqh", weights, v).swapaxes(1, 2)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    scale: float,
    window: int | None = None,
    backend: Backend = "xla",
) -> Float[Array, "B T N H"]:
    """Causal attention of every query over itself and the tokens before it.

    Args:
        q, k, v: queries, keys and values, float32 or bfloat16 ("cudnn": bfloat16 only).
        scale: what the products q·k are multiplied with before the softmax.
        window: how many keys a query sees, itself included; None for all earlier ones.
        backend: which implementation runs; see the head of this file.
    """
    if backend == "cudnn":
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    return reference_attention(q, k, v, scale=scale, window=window)


def choose_backend(dtype: str, head_size: int) -> tuple[Backend, str]:
    """The fastest backend that works here, and one line that says why it was chosen."""
    if jax.default_backend() != "gpu":
        return "xla", f"XLA attention ({jax.default_backend()})"
    if dtype != "bfloat16":
        return "xla", f"XLA attention: flash attention needs bfloat16, this run computes in {dtype}"
    try:
        error = _error_against_reference("cudnn", head_size)
    except Exception as failure:  # whatever the driver, the library or the compiler says
        return "xla", f"XLA attention, SLOW: cuDNN failed its probe ({_first_line(failure)})"
    if not error < 0.05:  # so that NaN, too, is no agreement
        return "xla", f"XLA attention, SLOW: cuDNN differs from the reference by {error:.1%}"
    return "cudnn", "cuDNN flash attention"


def _error_against_reference(backend: Backend, head_size: int) -> float:
    """Relative error of output and gradients, added up, against the float32 reference."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 2, head_size), jnp.bfloat16)

    def output_and_gradients(attend, *qkv):
        out, pullback = jax.vjp(partial(attend, scale=head_size**-0.5, window=48), *qkv)
        return out, *pullback(jnp.ones_like(out))

    fast = jax.jit(partial(output_and_gradients, partial(attention, backend=backend)))(q, k, v)
    exact = output_and_gradients(reference_attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    pairs = zip(fast, exact, strict=True)
    return float(sum(jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs))


def _first_line(failure: Exception) -> str:
    return (str(failure).strip() or type(failure).__name__).splitlines()[0][:120]
