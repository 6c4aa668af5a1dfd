"""JAX's splash attention, for TPUs, with blocks that suit our rows and windows."""

from functools import cache
from math import gcd
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    group: int = 1,
) -> Float[Array, "B T N H"]:
    """Compute JAX's block-sparse attention, interpreted on CPUs; T must be a multiple of 128.

    Tokens of paired heads are in groups, as `pair` in attention.py puts them.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q.shape[1:3]
    sizes = blocks(block(T, window, group))
    on_tpu, on_cpu = (
        jax.vmap(
            splash.make_splash_mha(
                splash.MultiHeadMask([band(T, window, group)] * N),
                block_sizes=sizes,
                head_shards=1,
                q_seq_shards=1,
                interpret=interpret,
            )
        )
        for interpret in (False, True)
    )
    q, k, v = (x.swapaxes(1, 2) for x in (scale * q, k, v))
    segments = None if documents is None else splash.SegmentIds(documents, documents)
    out: Any = jax.lax.platform_dependent(q, k, v, segments, cpu=on_cpu, default=on_tpu)
    return out.swapaxes(1, 2)


def block(T: int, window: int | None, group: int = 1) -> int:
    """Return the size of blocks of queries and keys, a power of two that divides T.

    JAX's default of 128 takes up to four times as long: see the counts in benchmarks/README.md.
    Paired heads alternate in groups of 256 tokens, so that smaller blocks would skip no more.
    """
    return gcd(T, 256 if window is not None and window <= 128 and group == 1 else 512)


def blocks(b: int) -> "splash.BlockSizes":
    """Return blocks of b queries and keys, with two kernels for the backward pass.

    JAX's fused one writes the queries' gradient once for each block of keys.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.BlockSizes(
        block_q=b, block_kv=b, block_q_dkv=b, block_kv_dkv=b, block_q_dq=b, block_kv_dq=b
    )


@cache
def band(T: int, window: int | None, group: int = 1) -> "splash.LocalMask":
    """Return the mask of a window; it skips the comparison for blocks outside of it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    left = None if window is None else window - 1

    def position(i):
        """Return the position in the sequence of index i; groups are powers of two."""
        return (i & -2 * group) + 2 * (i & group - 1) + (i >> group.bit_length() - 1 & 1)

    class Band(splash.LocalMask):
        def __init__(self, *arguments, **how):
            super().__init__(*arguments, **how)
            seen = self.mask_function
            if group > 1:
                self.mask_function = lambda q, k: seen(position(q), position(k))

        def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
            q, kv = idx
            if kv.start >= q.stop or (left is not None and kv.stop <= q.start - left):
                return np.zeros((q.stop - q.start, kv.stop - kv.start), np.bool_)
            return super().__getitem__(idx)

    return Band((T, T), (left, 0), offset=0)
