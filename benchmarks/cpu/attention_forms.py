"""One attention layer in several forms that compute the same numbers."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nanogpt.config import GPTConfig
from nanogpt.model.attention import reference_attention, visible
from nanogpt.model.gpt import norm, project
from nanogpt.model.rotary import rotary, rotation

B, T, N, H = 4, 128, 2, 48  # a micro-batch of the laptop preset
D = N * H
SPEED, SCALE = rotation(GPTConfig(width=D, num_heads=N))
ANGLE = jnp.float32(np.arange(T)[None, :, None] * SPEED)  # [1, T, H / 2], in radians


def rotary_by_concatenation(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Rotate in the textbook form: split each head in halves, rotate, concatenate."""
    cos, sin = (f(ANGLE)[:, :, None].astype(np.float32) for f in (np.cos, np.sin))
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos + right * sin, right * cos - left * sin], axis=-1)


def attention_heads_last(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Compute attention with the head axis after the sequence axis."""
    scores = jnp.where(visible(T, None), scale * jnp.einsum("bqnh,bknh->bnqk", q, k), -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)


def qkv_flat(x: Array, w: Array) -> list[Array]:
    """Compute queries, keys and values as one product of two matrices."""
    return jnp.unstack(project(x, w.reshape(D, 3 * D)).reshape(B, T, 3, N, H), axis=2)


def qkv_einsum(x: Array, w: Array) -> Array:
    """Compute queries, keys and values as one einsum over [B, T, D]."""
    return jnp.einsum("btd,dcnh->cbtnh", x, w.reshape(D, 3, N, H))


def rotary_by_reversal(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Rotate in the model's form: the halves are swapped along a separate axis."""
    return rotary(x, ANGLE[:, :, None])


def layer(
    x: Array,
    w: Array,
    out: Array,
    qkv: Callable = qkv_flat,
    rotate: Callable = rotary_by_reversal,
    attend: Callable = reference_attention,
) -> Array:
    """Compute the layer; the defaults are the forms in the model."""
    q, k, v = qkv(x, w)
    y = attend(rotate(norm(q)), rotate(norm(k)), v, scale=SCALE)
    return project(y.reshape(B, T, D), out)


FORMS = {
    "as in the model": layer,
    "q, k, v by an einsum over [B, T, D]": partial(layer, qkv=qkv_einsum),
    "rotary by concatenation": partial(layer, rotate=rotary_by_concatenation),
    "attention with heads after the sequence": partial(layer, attend=attention_heads_last),
}
