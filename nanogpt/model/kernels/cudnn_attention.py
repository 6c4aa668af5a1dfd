"""cuDNN's flash attention, through JAX."""

import jax
from jaxtyping import Array, Float, Int


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Compute attention with cuDNN. Raises ValueError if documents are given.

    A dense document mask would cost more than it saves, and cuDNN's packed layout reserves memory
    for a fixed number of documents per row, which data can exceed.
    """
    if documents is not None:
        raise ValueError("cuDNN attention has no document mask: use another kernel.")
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
