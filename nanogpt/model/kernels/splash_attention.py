"""JAX's splash attention, for TPUs."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """JAX's block-sparse flash attention for TPUs, interpreted on CPUs; T a multiple of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q.shape[1:3]
    mask = splash.CausalMask((T, T))
    if window is not None:
        mask = splash.LocalMask((T, T), (window - 1, 0), offset=0)
    heads = splash.MultiHeadMask([mask] * N)
    make = partial(splash.make_splash_mha, heads, head_shards=1, q_seq_shards=1)
    on_tpu, on_cpu = (jax.vmap(make(interpret=interpret)) for interpret in (False, True))
    q, k, v = (x.swapaxes(1, 2) for x in (scale * q, k, v))
    segments = None if documents is None else splash.SegmentIds(documents, documents)
    out: Any = jax.lax.platform_dependent(q, k, v, segments, cpu=on_cpu, default=on_tpu)
    return out.swapaxes(1, 2)
