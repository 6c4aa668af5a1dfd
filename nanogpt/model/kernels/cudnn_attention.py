"""cuDNN's flash attention, by way of JAX."""

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
    """Flash attention by cuDNN. ValueError if documents are given.

    As a dense mask they would cost more than they save, and what cuDNN has for packed documents
    reserves memory for a fixed number of them in every row, which no data promises to keep.
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
