"""How tokens access earlier tokens: in whole rows, or one token at a time with a KV cache.

A token's output depends on earlier tokens in three ways only: attention to keys and values,
features of the previous token, and rotary positions. Each is a method of

    Rows      whole rows without anything before them: training and evaluation
    Prompts   the same, but records what a cache needs: prefill
    Next      one token after those in a cache: decoding

so that the single forward pass in nanogpt/model/gpt.py serves all three.

A cache holds the keys and values of each layer in a ring buffer: a new token replaces the oldest. A
layer with a window keeps only its window; any other keeps `context` tokens, which become its window
in longer texts. Attention depends only on distances between tokens, and none exceeds those seen in
training, so a text can be of any length.

Shapes: B batch, T sequence, N heads, H head size, S slots of a ring.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from nanogpt.config import AttentionKernel, GPTConfig
from nanogpt.model.attention import attention, pair, part, softmax_attention
from nanogpt.model.composed import Weights, shared_attention, shared_nearby
from nanogpt.model.rotary import turned


class Rows:
    """Whole rows of tokens, with nothing before them."""

    def __init__(self, config: GPTConfig, tokens: Int[Array, "B T"], kernel: AttentionKernel):
        self.config, self.kernel, self.length = config, kernel, tokens.shape[1]
        self.begins = self.documents = None
        if config.document_separator is not None:
            self.begins = tokens == config.document_separator
            self.documents = jnp.cumsum(self.begins, axis=1, dtype=np.int32)

    def before(self, name: str, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        """Return x of the previous token in the document, or zero; `name` identifies x."""
        shifted = jnp.pad(x, ((0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)))[:, :-1]
        return shifted if self.begins is None else zero_where(self.begins, shifted)

    def angles(
        self, layer: int, speed: Float[np.ndarray, "pairs"]
    ) -> Float[Array, "1 T places pairs"]:
        """Return the rotary angles of a head's pairs at each token's places, in radians."""
        count = places(self.config, layer)
        angles = turned(jnp.arange(self.length * count)[None], self.length * count, speed)
        return angles.reshape(1, self.length, count, -1)

    def attention(
        self,
        layer: int,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T N H"],
        v: Float[Array, "B T N H"],
        scale: float,
    ) -> Float[Array, "B T N H"]:
        """Return the attention output of a layer for rotated queries and keys."""
        window, paired = self.config.window(layer), places(self.config, layer) == 2
        how = {"scale": scale, "window": window, "kernel": self.kernel, "paired": paired}
        return attention(q, k, v, self.documents, **how)

    def shared(
        self,
        layer: int,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T N H"],
        v: Float[Array, "B T N H"],
        scale: float,
        given: Weights,
        taken: Weights,
    ) -> Float[Array, "B T N H"]:
        """Return what composed heads add to the attention output of a layer."""
        documents = jnp.zeros(q.shape[:2], int) if self.documents is None else self.documents
        window = shared_window(self.config, layer, self.length)
        return shared_nearby(q, k, v, documents, window, scale, given, taken)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The KV cache of B texts, and what else their next tokens need."""

    position: Int[Array, "B"]  # position of the next token
    reach: Int[Array, "B"]  # number of tokens before it in its document
    count: Int[Array, ""]  # number of tokens added since the prompts
    before: dict[str, Shaped[Array, "B 1 ..."]]  # features of the previous token, by name
    keys: dict[int, Float[Array, "BN S H"]]  # by layer; rotated
    values: dict[int, Float[Array, "BN S H"]]


class Prompts(Rows):
    """Rows of prompts, whose keys, values and last features are recorded for a cache."""

    def __init__(self, config: GPTConfig, tokens: Int[Array, "B T"]):
        super().__init__(config, tokens, "xla")
        self.tokens, self.seen = tokens, {}  # by name, or by layer

    def before(self, name: str, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        self.seen[name] = x
        return super().before(name, x)

    def attention(self, layer: int, q: Array, k: Array, v: Array, scale: float) -> Array:
        paired = places(self.config, layer) == 2
        self.seen[layer] = (pair(k), pair(v)) if paired else (k, v)
        return super().attention(layer, q, k, v, scale)

    def cache(self, lengths: Int[Array, "B"], context: int) -> Cache:
        """Return a cache of the first `lengths` tokens of each row, to see `context` of them."""

        def latest(x: Shaped[Array, "B P ..."], size: int) -> Shaped[Array, "B {size} ..."]:
            """Return the last `size` positions before each row's end; missing ones arbitrary."""
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
    """One token of each text after those in a cache; `self.cache` becomes the new cache."""

    def __init__(self, config: GPTConfig, cache: Cache, tokens: Int[Array, "B"], context: int):
        self.config, self.context = config, context
        self.reach, self.begins = cache.reach, None  # number of tokens it sees before itself
        if config.document_separator is not None:
            self.begins = (tokens == config.document_separator)[:, None]
            self.reach = jnp.where(self.begins[:, 0], 0, cache.reach)
        self.old = cache
        self.cache = Cache(cache.position + 1, self.reach + 1, cache.count + 1, {}, {}, {})

    def before(self, name: str, x: Shaped[Array, "B 1 ..."]) -> Shaped[Array, "B 1 ..."]:
        """Return x of the previous token in the document, or zero."""
        self.cache.before[name] = x
        before = self.old.before[name]
        return before if self.begins is None else zero_where(self.begins, before)

    def angles(
        self, layer: int, speed: Float[np.ndarray, "pairs"]
    ) -> Float[Array, "B 1 places pairs"]:
        """Return the rotary angles of a head's pairs at this token's places, in radians."""
        count = places(self.config, layer)
        own = count * self.old.position[:, None] + jnp.arange(count)
        return turned(own, 2**31, speed)[:, None]

    def attention(
        self,
        layer: int,
        q: Float[Array, "B 1 N H"],
        k: Float[Array, "B 1 N H"],
        v: Float[Array, "B 1 N H"],
        scale: float,
    ) -> Float[Array, "B 1 N H"]:
        """Return the attention output of a layer for this token."""
        if paired := places(self.config, layer) == 2:
            q, k, v = pair(q), pair(k), pair(v)
        (B, T, N, H), S = q.shape, self.old.keys[layer].shape[1]
        new = T * self.old.count % S  # the token's first slot
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=new, axis=1)
        self.cache.keys[layer] = write(self.old.keys[layer], by_head(k))
        self.cache.values[layer] = write(self.old.values[layer], by_head(v))
        y = softmax_attention(
            by_head(q),
            self.cache.keys[layer],
            self.cache.values[layer],
            jnp.repeat(self.seen(S, T, window(self.config, layer, self.context, T)), N, axis=0),
            scale,
        )
        y = y.reshape(B, N, T, H).swapaxes(1, 2)
        return part(y) if paired else y

    def seen(self, S: int, T: int, window: int) -> Bool[Array, "B {T} {S}"]:
        """Return which slots of a ring the token sees from each of its T positions."""
        own = jnp.arange(T)[:, None]
        newest = T * self.old.count % S + T - 1
        age = (newest - jnp.arange(S)) % S  # how many positions ago each slot was filled
        distance = age - (T - 1 - own)
        seen = (distance >= 0) & (distance < window)
        return seen & (distance <= T * self.reach[:, None, None] + own)

    def shared(
        self,
        layer: int,
        q: Float[Array, "B 1 N H"],
        k: Float[Array, "B 1 N H"],
        v: Float[Array, "B 1 N H"],
        scale: float,
        given: Weights,
        taken: Weights,
    ) -> Float[Array, "B 1 N H"]:
        """Return what composed heads add to the attention output of a layer, for this token."""
        del k, v  # they are in the cache, after `attention`
        B, _, N, H = q.shape
        rings = self.cache.keys[layer], self.cache.values[layer]
        keys, values = (ring.reshape(B, N, -1, H).swapaxes(1, 2) for ring in rings)
        mask = self.seen(keys.shape[1], 1, shared_window(self.config, layer, self.context))
        return shared_attention(q, keys, values, mask, scale, given, taken)


def by_head(x: Float[Array, "B T N H"]) -> Float[Array, "BN T H"]:
    """Merge texts and heads into one axis, to which XLA's CPU backend writes without copying."""
    B, T, N, H = x.shape
    return x.swapaxes(1, 2).reshape(B * N, T, H)


def zero_where(
    begins: Bool[Array, "B T"], before: Shaped[Array, "B T ..."]
) -> Shaped[Array, "B T ..."]:
    """Return features of previous tokens, with zeros where a document begins."""
    begins = begins.reshape(*begins.shape, *[1] * (before.ndim - 2))
    return jnp.where(begins, jnp.zeros_like(before), before)


def places(config: GPTConfig, layer: int) -> int:
    """Return how many positions a token has in a layer: two with paired heads, else one."""
    return 2 if layer in config.layers(config.paired_heads) else 1


def window(config: GPTConfig, layer: int, context: int, places: int) -> int:
    """Return how many keys a query of a layer sees with a cache; a token has `places` positions."""
    return min(config.window(layer) or places * context, places * context)


def shared_window(config: GPTConfig, layer: int, context: int) -> int:
    """Return how many keys of a layer composed heads share."""
    return min(config.composed_window, window(config, layer, context, 1))


def slots(config: GPTConfig, layer: int, context: int, places: int) -> int:
    """Return the size of a layer's ring buffer, S: whole tokens, enough for all their queries.

    The first position of a token sees further back than its last.
    """
    return places * -(-(window(config, layer, context, places) + places - 1) // places)
