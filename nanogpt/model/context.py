"""What a token sees of those before it: in whole rows, or one token at a time.

The model looks back in three ways only. It attends to keys and values, it mixes in what stood one
token before, and it turns queries and keys by their position. Each is a method of

    Rows      rows that begin with their first token: training and evaluation
    Prompts   the same, which keeps what later tokens will look back to
    Next      one token after those kept in a cache: decoding

so that one forward pass, that of nanogpt/model/gpt.py, serves all three.

A cache holds the keys and values of each layer in a ring: a new token takes the place of the
oldest. A layer with a window keeps no more than that; any other keeps `context` tokens, and has
them as its window once a text is longer. Rotations depend on distances alone, and none grows beyond
what the model was trained with: a text may go on for as long as one likes.

Shapes: B batch, T sequence, N heads, H head size, S slots of a ring.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from nanogpt.config import AttentionKernel, GPTConfig
from nanogpt.model.attention import attention, softmax_attention
from nanogpt.model.rotary import turned


class Rows:
    """Rows of tokens, before which there is nothing."""

    def __init__(self, config: GPTConfig, tokens: Int[Array, "B T"], kernel: AttentionKernel):
        self.config, self.kernel, self.length = config, kernel, tokens.shape[1]
        self.begins = self.documents = None
        if config.document_separator is not None:
            self.begins = tokens == config.document_separator
            self.documents = jnp.cumsum(self.begins, axis=1, dtype=np.int32)

    def before(self, name: str, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """What stood one token before in its document, or else zero; `name` tells x from others."""
        shifted = jnp.pad(x, ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))[:, :-1]
        return shifted if self.begins is None else zero_where(self.begins, shifted)

    def angles(self, speed: Float[np.ndarray, "pairs"], T: int) -> Float[Array, "1 T pairs"]:
        """How far the pairs of a head are turned in each of T places, in radians."""
        return turned(jnp.arange(T)[None], T, speed)

    def attention(
        self,
        layer: int,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T N H"],
        v: Float[Array, "B T N H"],
        scale: float,
    ) -> Float[Array, "B T N H"]:
        """What each query takes from the values that it sees; several places may form a token."""
        places, documents = q.shape[1] // self.length, self.documents
        if places > 1 and documents is not None:
            documents = jnp.repeat(documents, places, axis=1)
        window = self.config.window(layer)
        return attention(q, k, v, documents, scale=scale, window=window, kernel=self.kernel)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What the next token of each of B texts looks back to."""

    position: Int[Array, "B"]  # of the next token
    reach: Int[Array, "B"]  # how many of the tokens before it are of its document
    count: Int[Array, ""]  # of the tokens that were added since the prompts
    before: dict[str, Shaped[Array, "B 1 ..."]]  # what stood one token before, by its name
    keys: dict[int, Float[Array, "BN S H"]]  # by layer; rotated
    values: dict[int, Float[Array, "BN S H"]]


class Prompts(Rows):
    """Rows of tokens that later tokens will look back to."""

    def __init__(self, config: GPTConfig, tokens: Int[Array, "B T"]):
        super().__init__(config, tokens, "xla")
        self.tokens, self.seen = tokens, {}  # by name, or by layer

    def before(self, name: str, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        self.seen[name] = x
        return super().before(name, x)

    def attention(self, layer: int, q: Array, k: Array, v: Array, scale: float) -> Array:
        self.seen[layer] = k, v
        return super().attention(layer, q, k, v, scale)

    def cache(self, lengths: Int[Array, "B"], context: int) -> Cache:
        """To go on after the first `lengths` tokens of each row, with `context` tokens in view."""

        def latest(x: Shaped[Array, "B P ..."], size: int) -> Shaped[Array, "B {size} ..."]:
            """The latest `size` places before each row's end; what is missing there is anything."""
            end = lengths * (x.shape[1] // self.length)
            index = jnp.maximum(end[:, None] - size + jnp.arange(size), 0)
            return jnp.take_along_axis(x, jnp.expand_dims(index, range(2, x.ndim)), axis=1)

        reach = lengths
        if self.documents is not None:
            last = jnp.take_along_axis(self.documents, lengths[:, None] - 1, axis=1)
            inside = jnp.arange(self.length) < lengths[:, None]
            reach = jnp.sum(inside & (self.documents == last), axis=1)
        keys, values = {}, {}
        for layer in (name for name in self.seen if isinstance(name, int)):
            k, v = self.seen[layer]
            S = slots(self.config, layer, context, k.shape[1] // self.length)
            keys[layer], values[layer] = (by_head(latest(x, S)) for x in (k, v))
        before = {name: latest(x, 1) for name, x in self.seen.items() if isinstance(name, str)}
        return Cache(lengths, reach, jnp.int32(0), before, keys, values)


class Next:
    """One token of each text, after those in a cache; `cache` is then that with it."""

    def __init__(self, config: GPTConfig, cache: Cache, tokens: Int[Array, "B"], context: int):
        self.config, self.context = config, context
        self.reach, self.begins = cache.reach, None  # how many tokens before this one it sees
        if config.document_separator is not None:
            self.begins = (tokens == config.document_separator)[:, None]
            self.reach = jnp.where(self.begins[:, 0], 0, cache.reach)
        self.old = cache
        self.cache = Cache(cache.position + 1, self.reach + 1, cache.count + 1, {}, {}, {})

    def before(self, name: str, x: Shaped[Array, "B 1 ..."]) -> Shaped[Array, "B 1 ..."]:
        """What stood one token before in its document, or else zero."""
        self.cache.before[name] = x
        before = self.old.before[name]
        return before if self.begins is None else zero_where(self.begins, before)

    def angles(self, speed: Float[np.ndarray, "pairs"], T: int) -> Float[Array, "B T pairs"]:
        """How far the pairs of a head are turned in this token's T places, in radians."""
        return turned(T * self.old.position[:, None] + jnp.arange(T), 2**31, speed)

    def attention(
        self,
        layer: int,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T N H"],
        v: Float[Array, "B T N H"],
        scale: float,
    ) -> Float[Array, "B T N H"]:
        """What the queries of this token's T places take from the values that they see."""
        (B, T, N, H), S = q.shape, self.old.keys[layer].shape[1]
        new = T * self.old.count % S  # the first of its slots
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=new, axis=1)
        self.cache.keys[layer] = write(self.old.keys[layer], by_head(k))
        self.cache.values[layer] = write(self.old.values[layer], by_head(v))
        own = jnp.arange(T)[:, None]
        age = (new + T - 1 - jnp.arange(S)) % S  # how many places ago each slot was filled
        distance = age - (T - 1 - own)
        seen = (distance >= 0) & (distance < window(self.config, layer, self.context, T))
        seen = seen & (distance <= T * self.reach[:, None, None] + own)  # [B, T, S]
        y = softmax_attention(
            by_head(q),
            self.cache.keys[layer],
            self.cache.values[layer],
            jnp.repeat(seen, N, axis=0),
            scale,
        )
        return y.reshape(B, N, T, H).swapaxes(1, 2)


def by_head(x: Float[Array, "B T N H"]) -> Float[Array, "BN T H"]:
    """All heads of all texts in one axis: with two, XLA's CPU backend copies a ring to write it."""
    B, T, N, H = x.shape
    return x.swapaxes(1, 2).reshape(B * N, T, H)


def zero_where(
    begins: Bool[Array, "B T"], before: Shaped[Array, "B T ..."]
) -> Shaped[Array, "B T ..."]:
    """What stood before each token, without what is of another document."""
    begins = begins.reshape(*begins.shape, *[1] * (before.ndim - 2))
    return jnp.where(begins, jnp.zeros_like(before), before)


def window(config: GPTConfig, layer: int, context: int, places: int) -> int:
    """How many keys a query of a layer sees when texts may be endless and tokens take `places`."""
    return min(config.window(layer) or places * context, places * context)


def slots(config: GPTConfig, layer: int, context: int, places: int) -> int:
    """How many places the ring of a layer has, S: of whole tokens, enough for all their queries.

    The first place of a token sees one place further back than its last.
    """
    return places * -(-(window(config, layer, context, places) + places - 1) // places)
