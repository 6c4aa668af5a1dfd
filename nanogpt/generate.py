"""Text from a model: one token after the other, each by a forward pass over the whole context."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nanogpt.step import Params


def generate(
    graph: nnx.GraphDef,
    params: Params,
    prompt: Int[np.ndarray, "P"],
    *,
    num_tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Int[np.ndarray, "num_tokens"]:
    """`num_tokens` tokens that continue `prompt`, which must not be empty.

    Args:
        context: how many of the latest tokens the model sees, its training length.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_k: only the so many likeliest tokens may follow; None allows all of the vocabulary.
    """
    prompt = np.asarray(prompt, np.int32)[-context:]
    window = np.zeros(context, np.int32)
    window[: len(prompt)] = prompt
    keys = jax.random.split(jax.random.key(seed), num_tokens)
    return np.asarray(_continue(graph, params, window, len(prompt), keys, temperature, top_k))


@partial(jax.jit, static_argnames=("graph", "top_k"))
def _continue(
    graph: nnx.GraphDef,
    params: Params,
    window: Int[Array, "T"],
    length: int,
    keys: Key[Array, "num_tokens"],
    temperature: float,
    top_k: int | None,
) -> Int[Array, "num_tokens"]:
    model = nnx.merge(graph, params)

    def next_token(carry, key):
        window, length = carry
        features = model.features(window[None])[0]
        logits = model.logits(features[length - 1])
        token = _choose(logits[: model.config.vocab_size], temperature, top_k, key)
        # A full window drops its oldest token to make room.
        full = length == len(window)
        window = jnp.where(full, jnp.roll(window, -1), window)
        length = jnp.where(full, length, length + 1)
        return (window.at[length - 1].set(token), length), token

    return jax.lax.scan(next_token, (window, length), keys)[1]


def _choose(
    logits: Float[Array, "V"], temperature: float, top_k: int | None, key: Key[Array, ""]
) -> Int[Array, ""]:
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, len(logits)))[0][-1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature == 0, jnp.argmax(logits), sampled).astype(jnp.int32)
