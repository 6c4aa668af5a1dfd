"""Text generation: prefill of the prompts in one pass, then one token at a time with a KV cache.

A compiled program generates a chunk of tokens; the next chunk is started before the last one is
read, so that the device does not wait for the reader.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from nanogpt.inference.sampling import Sampling
from nanogpt.model.context import Cache, Next, Prompts
from nanogpt.model.parameters import compute_copy, unrolled
from nanogpt.training.step import Params

CHUNK = 16  # tokens per text and program call


class Written(NamedTuple):
    """A few tokens of each of B texts, with their probabilities.

    Probabilities are the model's own, before temperature, top_k and top_p.
    """

    tokens: Int32[Array | np.ndarray, "n B"]
    probabilities: Float32[Array | np.ndarray, "n B"]
    likeliest: Int32[Array | np.ndarray, "n B alternatives"]  # most likely first
    their_probabilities: Float32[Array | np.ndarray, "n B alternatives"]


class _State(NamedTuple):
    """The state of B texts."""

    cache: Cache
    logits: Float[Array, "B vocab"]  # of the next token


def generate(
    graph: nnx.GraphDef,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    context: int,
    sampling: Sampling,
    dtype: str = "float32",
    alternatives: int = 0,
) -> Iterator[Written]:
    """Generate `num_tokens` tokens that continue each prompt; yields a few at a time.

    Prompts may differ in length, and none may be empty. A text depends on its number, but not on
    the other texts.

    Args:
        context: the longest context the model was trained with, its sequence length. Only the last
            `context` tokens of a prompt are read. In longer texts, layers without a window see the
            last `context` tokens, as if that had been their window from the beginning.
        dtype: dtype of the computation, "float32" or "bfloat16".
        alternatives: how many of the most likely tokens are reported at each position.
    """
    longest = min(context, max(map(len, prompts)))
    # Powers of two, so that a few compiled programs serve prompts and texts of all lengths.
    context = min(context, _power_of_two(longest + num_tokens))
    rows = np.zeros((len(prompts), min(context, _power_of_two(longest))), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        end = prompt[-longest:]
        row[: len(end)] = end
    lengths = np.array([min(longest, len(prompt)) for prompt in prompts], np.int32)

    graph, params = _unrolled(graph, params, dtype)
    state = _read(graph, params, rows, lengths, context)
    vocabulary = state.logits.shape[1]
    write = partial(
        _write,
        graph,
        params,
        seed=np.uint32(sampling.seed),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(min(sampling.top_k or vocabulary, vocabulary)),
        top_p=np.float32(sampling.top_p),
        limited=sampling.top_k is not None or sampling.top_p < 1,
        context=context,
        alternatives=min(alternatives, vocabulary),
    )
    state, chunk = write(state)
    for done in range(0, num_tokens, CHUNK):
        current = chunk
        if done + CHUNK < num_tokens:
            state, chunk = write(state)
        yield Written(*(np.asarray(x)[: num_tokens - done] for x in current))


@partial(jax.jit, static_argnames=("graph", "dtype"))
def _unrolled(graph: nnx.GraphDef, params: Params, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """Return graph and parameters of the model with its layers unstacked.

    XLA would slice them out of their stacks again for each token, which takes longer than the
    computation of the token itself.
    """
    model = unrolled(nnx.merge(graph, compute_copy(params, dtype)))
    for attention in model.attention:
        attention.qkv = nnx.Param(jnp.concatenate(attention.matrices(), axis=1))
    return nnx.split(model)


@partial(jax.jit, static_argnames=("graph", "context"))
def _read(
    graph: nnx.GraphDef,
    params: Params,
    rows: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    context: int,
) -> _State:
    """Return the state after the first `lengths` tokens of each row."""
    model = nnx.merge(graph, params)
    past = Prompts(model.config, rows)
    features = model.features(rows, past)
    last = jnp.take_along_axis(features, lengths[:, None, None] - 1, axis=1)[:, 0]
    return _State(past.cache(lengths, context), _logits(model, last))


@partial(
    jax.jit,
    static_argnames=("graph", "limited", "context", "alternatives"),
    donate_argnames="state",
)
def _write(
    graph: nnx.GraphDef,
    params: Params,
    state: _State,
    *,
    seed: UInt32[Array, ""],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    limited: bool,
    context: int,
    alternatives: int,
) -> tuple[_State, Written]:
    """Generate the next CHUNK tokens of each text; `limited`: whether top_k or top_p apply."""
    model = nnx.merge(graph, params)
    B, _ = state.logits.shape
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))

    def next_token(state: _State, _: None) -> tuple[_State, Written]:
        cache, logits = state
        scaled = logits / jnp.maximum(temperature, 1e-6)
        draw = partial(
            jax.vmap(jax.random.categorical), jax.vmap(jax.random.fold_in)(keys, cache.position)
        )
        if limited:
            order = jnp.argsort(-scaled, axis=1)
            drawn = draw(_limit(jnp.take_along_axis(scaled, order, axis=1), top_k, top_p))
            chosen = jnp.take_along_axis(order, drawn[:, None], axis=1)[:, 0]
        else:
            chosen = draw(scaled)
        tokens = jnp.where(temperature == 0, jnp.argmax(logits, axis=1), chosen).astype(jnp.int32)

        probabilities = jax.nn.softmax(logits, axis=1)
        written = Written(
            tokens,
            jnp.take_along_axis(probabilities, tokens[:, None], axis=1)[:, 0],
            *jax.lax.top_k(probabilities, alternatives)[::-1],
        )
        past = Next(model.config, cache, tokens, context)
        features = model.features(tokens[:, None], past)[:, 0]
        return _State(past.cache, _logits(model, features)), written

    return jax.lax.scan(next_token, state, length=CHUNK)


def _logits(model: Any, features: Float[Array, "B D"]) -> Float[Array, "B vocab"]:
    """Return the logits, without those of the ids that only pad the vocabulary."""
    return model.logits(features)[:, : model.config.vocab_size]


def _limit(
    logits: Float[Array, "B vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B vocab"]:
    """Set the logits that must not be sampled to -inf; logits are given in descending order."""
    logits = jnp.where(jnp.arange(logits.shape[1]) < top_k, logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=1)
    likelier = jnp.cumsum(probabilities, axis=1) - probabilities  # of more likely tokens
    return jnp.where((likelier < top_p) | (jnp.arange(logits.shape[1]) == 0), logits, -jnp.inf)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
