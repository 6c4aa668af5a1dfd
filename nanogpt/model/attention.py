"""Causal self-attention: a readable reference, and fast kernels that are tested against it.

`attention` is what the model calls. Its `kernel` is one of

    "xla"     the reference below, compiled by XLA: any device, any dtype
    "cudnn"   cuDNN's fused flash attention: NVIDIA Ampere or newer, bfloat16, no document mask
    "pallas"  this project's flash attention: NVIDIA, bfloat16
    "splash"  JAX's splash attention: TPU, bfloat16

and `choose_attention` picks one for the hardware: it compiles each candidate on a small input and
compares it with the reference; if either fails, it reports why and tries the next.

Shapes: B batch, T sequence, N heads, H head size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nanogpt.config import AttentionKernel, GPTConfig
from nanogpt.model.kernels.cudnn_attention import cudnn_attention
from nanogpt.model.kernels.splash_attention import splash_attention

# By platform, fastest first.
CANDIDATES: dict[str, tuple[AttentionKernel, ...]] = {
    "gpu": ("cudnn", "pallas"),
    "tpu": ("splash",),
}
NAMES = {
    "xla": "XLA attention",
    "cudnn": "cuDNN flash attention",
    "pallas": "Pallas flash attention",
    "splash": "splash attention",
}


def visible(T: int, window: int | Int[Array, ""] | None) -> Bool[Array, "T T"]:
    """Return which keys (columns) each query (row) sees: its own and the `window - 1` before it.

    With `window=None` it sees all earlier ones.
    """
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q kᵀ) v over the visible keys.

    The head axis precedes the sequence axis in the products, which is faster with XLA on CPUs.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mask = visible(q.shape[2], window)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return softmax_attention(q, k, v, mask, scale).swapaxes(1, 2)


def softmax_attention(
    q: Float[Array, "*heads Q H"],
    k: Float[Array, "*heads K H"],
    v: Float[Array, "*heads K H"],
    mask: Bool[Array, "*#heads Q K"],
    scale: float,
) -> Float[Array, "*heads Q H"]:
    """Return softmax(scale * q kᵀ) v where the mask is true, with the softmax in float32."""
    scores = jnp.einsum("...qh,...kh->...qk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scale * scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...qk,...kh->...qh", weights, v)


def pair(x: Float[Array, "B T N H"]) -> Float[Array, "B 2*T N//2 H"]:
    """Merge pairs of heads into one of twice the sequence length, with their tokens alternating."""
    B, T, N, H = x.shape
    return x.reshape(B, T, N // 2, 2, H).swapaxes(2, 3).reshape(B, 2 * T, N // 2, H)


def part(x: Float[Array, "B T2 pairs H"]) -> Float[Array, "B T2//2 2*pairs H"]:
    """Undo `pair`."""
    B, T2, pairs, H = x.shape
    return x.reshape(B, T2 // 2, 2, pairs, H).swapaxes(2, 3).reshape(B, T2 // 2, 2 * pairs, H)


def pallas_attention(*arrays: Any, **how: Any) -> Float[Array, "B T N H"]:
    """Call this project's flash attention, imported here in case JAX drops its compiler."""
    from nanogpt.model.kernels.flash_attention import flash_attention

    return flash_attention(*arrays, **how)


KERNELS = {
    "xla": reference_attention,
    "cudnn": cudnn_attention,
    "pallas": pallas_attention,
    "splash": splash_attention,
}


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    kernel: AttentionKernel = "xla",
) -> Float[Array, "B T N H"]:
    """Causal attention of every query over itself and the tokens before it.

    Args:
        q, k, v: queries, keys and values, bfloat16, or for "xla" float32.
        documents: the number of each token's document, increasing along a row; a query sees only
            the keys of its own document. None: no document mask.
        scale: factor on the products q·k before the softmax.
        window: number of keys that a query sees, its own included; None for all earlier ones.
        kernel: the implementation; see the top of this file.
    """
    return KERNELS[kernel](q, k, v, documents, scale=scale, window=window)


def choose_attention(
    configs: Sequence[GPTConfig], sequence_length: int, dtype: str
) -> tuple[AttentionKernel, str]:
    """Return the fastest kernel that works here, and one line that says which and why.

    `configs` is the model of each stage of the run; they differ in their windows.
    """
    platform = jax.default_backend()
    if platform not in CANDIDATES:
        return "xla", f"{NAMES['xla']} ({platform})"
    if dtype != "bfloat16":
        return "xla", f"{NAMES['xla']}: flash attention needs bfloat16, this run is in {dtype}"
    complaints = []
    for kernel in CANDIDATES[platform]:
        try:
            error = _error_against_reference(kernel, configs, sequence_length)
        except Exception as failure:  # any failure of the driver, the library or the compiler
            complaints.append(f"{NAMES[kernel]} failed its probe ({_first_line(failure)})")
            continue
        if error < 0.05:  # false for NaN
            return kernel, ", because ".join([NAMES[kernel], *complaints[:1]])
        complaints.append(f"{NAMES[kernel]} differs from the reference by {error:.1%}")
    return "xla", f"{NAMES['xla']}, SLOW: {'; '.join(complaints)}"


def _error_against_reference(
    kernel: AttentionKernel, configs: Sequence[GPTConfig], sequence_length: int
) -> float:
    """Return the largest of all windows' summed relative errors of output and gradients.

    The input is a row of the run's length, cut so that the reference's T x T scores fit in memory.
    """
    config = configs[0]
    shape = (3, 1, min(sequence_length, 2048), config.num_heads, config.head_size)
    q, k, v = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    documents = None
    if config.document_separator is not None:
        documents = jnp.cumsum(jnp.arange(shape[2])[None] % 100 == 50, axis=1)

    def output_and_gradients(attend, qkv, window):
        attend = partial(attend, documents=documents, scale=shape[-1] ** -0.5, window=window)
        out, pullback = jax.vjp(attend, *qkv)
        return out, *pullback(jnp.ones_like(out))

    @jax.jit
    def of_kernel(*qkv):
        attend = partial(attention, kernel=kernel)
        return [output_and_gradients(attend, qkv, window) for window in windows]

    @jax.jit
    def of_reference(*qkv):  # windows are inputs, so that this compiles once for all of them
        every = jnp.array([window or shape[2] for window in windows])
        qkv = [x.astype(jnp.float32) for x in qkv]
        return jax.lax.map(partial(output_and_gradients, reference_attention, qkv), every)

    def error(found, expected):
        pairs = zip(found, expected, strict=True)
        return sum(jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs)

    windows = list({c.window(layer) for c in configs for layer in range(c.num_layers)})
    expected = zip(*of_reference(q, k, v), strict=True)  # by window
    return float(np.max([*map(error, of_kernel(q, k, v), expected)]))  # NaN if any is


def _first_line(failure: Exception) -> str:
    return (str(failure).strip() or type(failure).__name__).splitlines()[0][:120]
