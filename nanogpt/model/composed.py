"""Composed heads: a head also attends where other heads do, with weights from each token.

Dynamically composable attention (Xiao et al., arXiv:2405.08553) mixes the attention weights of all
heads. Here, as in modded-nanogpt (2026-05-27), that is one sum per token, over nearby keys:

    shared = sum over heads g of given_g * weights_g;    head h adds taken_h * (shared @ v_h)

Shapes: B batch, T sequence, N heads, H head size, Q queries and K keys of a block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

Weights = Float[Array, "*B Q N"]


def shared_attention(
    q: Float[Array, "*B Q N H"],
    k: Float[Array, "*B K N H"],
    v: Float[Array, "*B K N H"],
    mask: Bool[Array, "*#B Q K"],
    scale: float,
    given: Weights,
    taken: Weights,
) -> Float[Array, "*B Q N H"]:
    """Return what each head adds by attending where all heads do.

    `given` are the weights of the heads in the sum, divided here by their root mean square;
    `taken` are the weights with which heads use it.
    """
    scores = jnp.einsum("...qnh,...knh->...nqk", q, k, preferred_element_type=jnp.float32)
    seen = jnp.where(mask[..., None, :, :], scale * scores, -jnp.inf)
    attended = jax.nn.softmax(seen, axis=-1)
    given = given.astype(jnp.float32)
    given = given * jax.lax.rsqrt(jnp.mean(given**2, axis=-1, keepdims=True) + 1e-6)
    shared = jnp.einsum("...nqk,...qn->...qk", attended, given).astype(v.dtype)
    added = jnp.einsum("...qk,...knh->...qnh", shared, v)
    return taken[..., None].astype(v.dtype) * added


@partial(jax.checkpoint, static_argnums=(4, 5))  # the scores would take more memory than all else
def shared_nearby(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    documents: Int[Array, "B T"],
    window: int,
    scale: float,
    given: Weights,
    taken: Weights,
) -> Float[Array, "B T N H"]:
    """Return `shared_attention` for rows: each query sees its document's last `window` keys.

    Blocks of queries see their own block of keys and the one before it.
    """
    B, T = documents.shape
    size = min(T, 1 << (window - 1).bit_length())

    def blocks(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B blocks size ..."]:
        x = jnp.pad(x, ((0, 0), (0, -T % size), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, -1, size, *x.shape[2:])

    def with_previous(x: Shaped[Array, "B blocks size ..."]) -> Shaped[Array, "B blocks two ..."]:
        previous = jnp.pad(x, ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))[:, :-1]
        return jnp.concatenate([previous, x], axis=2)

    own = blocks(documents + 1)  # so that no document is 0, as before the first block
    distance = size + jnp.arange(size)[:, None] - jnp.arange(2 * size)
    mask = (own[..., None] == with_previous(own)[..., None, :]) & (distance >= 0)
    mask = mask & (distance < window)
    q, k, v, given, taken = map(blocks, (q, k, v, given, taken))
    k, v = with_previous(k), with_previous(v)
    added = shared_attention(q, k, v, mask, scale, given, taken)
    return added.reshape(B, -1, *added.shape[3:])[:, :T]
