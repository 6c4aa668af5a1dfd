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

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Shaped

from nanogpt.config import AttentionKernel, GPTConfig
from nanogpt.model.kernels.cudnn_attention import cudnn_attention
from nanogpt.model.kernels.splash_attention import splash_attention
from nanogpt.model.parameters import project

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


def pair(x: Shaped[Array, "B T N H"], group: int = 1) -> Shaped[Array, "B 2*T N//2 H"]:
    """Merge pairs of heads into one of twice the sequence length, with their tokens alternating.

    Or `group` tokens of one head alternate with as many of the other.
    """
    B, T, N, H = x.shape
    groups = x.reshape(B, T // group, group, N // 2, 2, H)
    return groups.transpose(0, 1, 4, 2, 3, 5).reshape(B, 2 * T, N // 2, H)


def part(x: Shaped[Array, "B T2 pairs H"], group: int = 1) -> Shaped[Array, "B T2//2 2*pairs H"]:
    """Undo `pair`."""
    B, T2, pairs, H = x.shape
    groups = x.reshape(B, -1, 2, group, pairs, H)
    return groups.transpose(0, 1, 3, 4, 2, 5).reshape(B, T2 // 2, 2 * pairs, H)


def heads(
    x: Float[Array, "B T D"],
    matrices: Sequence[Float[Array, "D _"]],
    head_size: int,
    kernel: AttentionKernel,
) -> Sequence[Float[Array, "B T N H"]]:
    """Return queries, keys and values by heads: the products of x with their matrices.

    All in one is faster on CPUs; on TPUs, taking it apart again would cost more than it saves.
    """
    B, T, _ = x.shape
    if kernel == "splash":
        apart = [project(x, each).reshape(B, T, -1, head_size) for each in matrices]
        # Heads come first in memory, as the kernel reads them; left to itself, XLA makes copies.
        return [with_layout_constraint(each, Layout((0, 2, 1, 3))) for each in apart]
    together = project(x, jnp.concatenate(matrices, axis=1))
    return jnp.unstack(together.reshape(B, T, 3, -1, head_size), axis=2)


def pallas_attention(*arrays: Any, **how: Any) -> Float[Array, "B T N H"]:
    """Call this project's flash attention, imported here in case JAX drops its compiler."""
    from nanogpt.model.kernels.flash_attention import flash_attention

    return flash_attention(*arrays, **how)


KERNELS: dict[AttentionKernel, Callable[..., Array]] = {
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
    window: int | Int[Array, ""] | None = None,
    kernel: AttentionKernel = "xla",
    paired: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention of every query over itself and the tokens before it.

    Args:
        q, k, v: queries, keys and values, bfloat16, or for "xla" float32.
        documents: the number of each token's document, increasing along a row; a query sees only
            the keys of its own document. None: no document mask.
        scale: factor on the products q·k before the softmax.
        window: number of keys that a query sees, its own included; None for all earlier ones. An
            array is accepted by "xla", and with documents by "pallas".
        kernel: the implementation; see the top of this file.
        paired: whether two neighboring heads see the keys of both. They take turns: at each token,
            the first head is at one position and the second at the next, and a window counts both.
    """
    attend = partial(KERNELS[kernel], scale=scale, window=window)
    if not paired:
        return attend(q, k, v, documents)
    group = 1
    if kernel == "splash":  # moving whole blocks is faster
        group = gcd(q.shape[1], 256)
        attend = partial(attend, group=group)
    if documents is not None:
        both = jnp.broadcast_to(documents[:, :, None, None], (*documents.shape, 2, 1))
        documents = pair(both, group)[:, :, 0, 0]
    return part(attend(pair(q, group), pair(k, group), pair(v, group), documents), group)


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
    errors = jax.jit(probe(kernel, configs, sequence_length))(0)
    return float(np.max(errors))  # NaN if any is


def probe(
    kernel: AttentionKernel, configs: Sequence[GPTConfig], sequence_length: int
) -> Callable[[int], Float[Array, "windows"]]:
    """Return `errors(seed)`, a single program when jitted: a kernel's errors for each window.

    They are the summed relative errors of output and gradients. The input is a row of the run's
    length, cut so that the reference's T x T scores fit in memory.
    """
    config = configs[0]
    T = min(sequence_length, 2048)
    kinds = dict.fromkeys(
        (layer in c.layers(c.paired_heads), c.window(layer))
        for c in configs
        for layer in range(c.num_layers)
    )
    windows = {paired: [window for p, window in kinds if p == paired] for paired, _ in kinds}

    def output_and_gradients(attend, qkv, window):
        documents = None
        if config.document_separator is not None:
            documents = jnp.cumsum(jnp.arange(T)[None] % 100 == 50, axis=1)
        attend = partial(attend, documents=documents, scale=config.head_size**-0.5, window=window)
        out, pullback = jax.vjp(attend, *qkv)
        return out, *pullback(jnp.ones_like(out))

    def errors(seed):
        shape = (3, 1, T, config.num_heads, config.head_size)
        qkv = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        return jnp.concatenate([errors_of(qkv, paired) for paired in windows])

    def errors_of(qkv, paired):
        every = jnp.array([window or 2 * T for window in windows[paired]])
        exact, reference = qkv.astype(jnp.float32), partial(attention, paired=paired)
        expected = jax.lax.map(partial(output_and_gradients, reference, exact), every)
        attend = partial(output_and_gradients, partial(reference, kernel=kernel), qkv)
        if kernel == "pallas" and config.document_separator is not None:
            found = jax.lax.map(attend, every)  # as in the reference, its windows are inputs
        else:
            found = map(jnp.stack, zip(*map(attend, windows[paired]), strict=True))
        return jnp.stack([*map(relative_errors, found, expected)]).sum(axis=0)

    def relative_errors(found, expected):
        off, size = (jnp.sum(x**2, axis=range(1, x.ndim)) for x in (found - expected, expected))
        return jnp.sqrt(off / size)

    return errors


def _first_line(failure: Exception) -> str:
    return (str(failure).strip() or type(failure).__name__).splitlines()[0][:120]
