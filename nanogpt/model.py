"""GPT as the NanoGPT speedrun shaped it, in Flax NNX: modded-nanogpt's dense-attention model.

    tokens -> embed -> norm -> x0 -> L blocks -> norm -> head -> softcap -> logits

A block is attention, then an MLP; each reads the residual stream through a norm and adds to it.
Around that stand the tricks of the speedrun, each one small function or a few lines below:

    norm                  RMSNorm without gains            (Zhang and Sennrich, arXiv:1910.07467)
    query-key norm        bounds the attention scores      (Henry et al., arXiv:2010.04245)
    rotary                positions by rotation            (Su et al., arXiv:2104.09864), of half of
                          each head only                   (modded-nanogpt, 2024-12-17)
    relu²                 the nonlinearity of the MLP      (So et al., arXiv:2109.08668)
    zero projections      whatever adds to the stream, and the head, starts at zero, so the first
                          loss is ln V                     (Yang et al., arXiv:2203.03466)
    embedding shortcut    x <- a x + b x0 before a block   (modded-nanogpt, 2024-11-06)
    U-net skips           outputs of the first half return in the second
                                                           (modded-nanogpt, 2024-11-10)
    value embeddings      token tables mixed into values   (modded-nanogpt, 2024-12-04 and 12-17;
                                                           after Zhou et al., arXiv:2410.17897)
    bigram embedding      a table of hashed token pairs    (modded-nanogpt, 2026-01-19)
    softcap               bounds the logits                (Gemma 2, arXiv:2408.00118)

A model computes in the dtype of its matrices: `compute_copy` casts them, and tables stay float32.

Shapes, here and everywhere: B batch, T sequence, D model width, N heads, H head size, F MLP width,
V vocabulary (padded), L layers. Every array of `GPT.blocks` has a leading L axis.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from nanogpt.attention import attention
from nanogpt.config import GPTConfig, Kernels
from nanogpt.loss import linear_cross_entropy, softcap

Attend = Callable[[Array, Array, Array], Array]  # (q, k, v) to what each query takes from them
XLA = Kernels()  # what runs everywhere


def matrix(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*stack I O"]:
    """Matrices of uniform numbers with a standard deviation of 0.5 / sqrt(I)."""
    bound = 0.5 * (3 / shape[-2]) ** 0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def norm(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x over its root mean square, in float32 up to the result."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype)


def project(x: Float[Array, "*B I"], weight: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ weight as one product of two matrices, which XLA's CPU backend runs fastest."""
    return (x.reshape(-1, weight.shape[0]) @ weight).reshape(*x.shape[:-1], weight.shape[1])


def rotary(x: Float[Array, "B T N H"], base: float) -> Float[Array, "B T N H"]:
    """Turn the pairs (i, i + H/2) of each head by an angle that grows with the position.

    The first H/4 pairs turn by base^0 ... base^-1 radians per token; the other H/4 stand still and
    carry what has no position.
    """
    T, H = x.shape[1], x.shape[3]
    speed = np.concatenate([base ** -np.linspace(0, 1, H // 4), np.zeros(H // 4)])
    angle = np.arange(T)[:, None, None, None] * speed  # [T, 1, 1, H/2]
    cos = np.cos(angle).astype(x.dtype)
    sin = np.concatenate([np.sin(angle), -np.sin(angle)], axis=2).astype(x.dtype)
    pairs = x.reshape(*x.shape[:3], 2, H // 2)
    return (pairs * cos + pairs[:, :, :, ::-1] * sin).reshape(x.shape)


def bigram_bucket(tokens: Int[Array, "B T"], buckets: int) -> Int[Array, "B T"]:
    """A bucket for each pair of a token and the one before it; a row begins with a pair (0, t)."""
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    # Two odd constants (2³² over the golden ratio, a prime of xxHash) spread the pairs mod 2³².
    mixed = tokens.astype(jnp.uint32) * np.uint32(0x9E3779B1)
    mixed ^= before.astype(jnp.uint32) * np.uint32(0x85EBCA77)
    return ((mixed ^ (mixed >> 15)) % np.uint32(buckets)).astype(jnp.int32)


def is_table(path: tuple[jax.tree_util.DictKey, ...]) -> bool:
    """Whether the parameter at this path of the nested dict is a table that tokens index."""
    return path[-1].key.endswith("embed")


def compute_copy(params: PyTree, dtype: str) -> PyTree:
    """The parameters of a GPT, to compute with in `dtype`.

    Tables stay float32: the gradient of a row is the sum over all tokens that share it, thousands
    for a frequent one, and in bfloat16 such a sum stops growing after some hundreds.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p if is_table(path) else p.astype(dtype), params
    )


@jax.custom_vjp
def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0)², which keeps only its result for the backward pass, as its reader does anyway."""
    return jnp.square(jax.nn.relu(x))


relu_squared.defvjp(
    lambda x: (relu_squared(x),) * 2,
    lambda squared, gradient: (2 * jnp.sqrt(squared) * gradient,),
)


class Attention(nnx.Module):
    """Causal self-attention over normalised, rotated queries and keys."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        D = config.width
        self.num_heads, self.rope_base = config.num_heads, config.rope_base
        self.qkv = nnx.Param(matrix(rngs.params(), (3, D, D)))
        self.out = nnx.Param(jnp.zeros((D, D)))
        self.value_mix = nnx.Param(jnp.array([0.5, 0.5]))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        value_embedding: Float[Array, "B T D"] | None,
        attend: Attend,
    ) -> Float[Array, "B T D"]:
        B, T, D = x.shape
        # One product for all three, with values scaled by way of their weights: far fewer numbers.
        scale = jnp.concatenate([jnp.ones(2, x.dtype), self.value_mix[:1]])
        weight = (scale[:, None, None] * self.qkv[...]).swapaxes(0, 1).reshape(D, 3 * D)
        q, k, v = jnp.unstack(project(x, weight).reshape(B, T, 3, self.num_heads, -1), axis=2)
        q, k = rotary(norm(q), self.rope_base), rotary(norm(k), self.rope_base)
        if value_embedding is not None:
            v = v + self.value_mix[1] * value_embedding.reshape(v.shape)
        return project(attend(q, k, v).reshape(B, T, D), self.out[...])


class MLP(nnx.Module):
    """Two matrices with relu² between them."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.up = nnx.Param(matrix(rngs.params(), (config.width, config.mlp_width)))
        self.down = nnx.Param(jnp.zeros((config.mlp_width, config.width)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return project(relu_squared(project(x, self.up[...])), self.down[...])


class Block(nnx.Module):
    """Attention, then the MLP, after a shortcut from the embedding."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.shortcut = nnx.Param(jnp.array([1.0, 0.0]))
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        x0: Float[Array, "B T D"],
        value_embedding: Float[Array, "B T D"] | None,
        attend: Attend,
    ) -> Float[Array, "B T D"]:
        x = self.shortcut[0] * x + self.shortcut[1] * x0
        x = x + self.attention(norm(x), value_embedding, attend)
        return x + self.mlp(norm(x))


class GPT(nnx.Module):
    """A decoder-only transformer language model.

    `kernels` names the implementations of attention and loss; the parameters do not depend on it.
    """

    def __init__(self, config: GPTConfig, kernels: Kernels = XLA, *, rngs: nnx.Rngs):
        V, D, L = config.padded_vocab_size, config.width, config.num_layers
        self.config, self.kernels = config, kernels
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (V, D)))
        if config.value_embeddings:
            tables = (config.value_embeddings, V, D)
            self.value_embed = nnx.Param(jax.random.normal(rngs.params(), tables))
        if config.bigram_buckets:
            self.bigram_embed = nnx.Param(jnp.zeros((config.bigram_buckets, D)))
        self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), L)
        )
        self.skips = nnx.Param(jnp.ones(L // 2))
        self.head = nnx.Param(jnp.zeros((D, V)))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits, float32 and soft-capped, of the token after each token."""
        return self.logits(self.features(tokens))

    def loss(self, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Cross-entropy of each target in nats, float32; zero where the target is negative."""
        return linear_cross_entropy(
            self.features(tokens),
            self.head[...],
            targets,
            self.config.softcap,
            kernel=self.kernels.loss,
            fp8=self.kernels.fp8_head,
        )

    def logits(self, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Soft-capped logits, float32, from what `features` returned, or a part of it."""
        return softcap(project(features, self.head[...]), self.config.softcap)

    def features(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the head reads: the normalised residual stream after the last block."""
        L = self.config.num_layers
        x = self.embed[tokens]
        if self.config.bigram_buckets:
            x = x + self.bigram_embed[bigram_bucket(tokens, self.config.bigram_buckets)]
        x = x0 = norm(x).astype(self.head.dtype)

        value_embeddings, attend = self.value_embeddings(tokens), self.attend(tokens)
        first_half = []
        for layer, block in enumerate(self.layers()):
            if layer >= L - L // 2:
                x = x + self.skips[layer - (L - L // 2)] * first_half.pop()
            window = self.config.window(layer)
            x = block(x, x0, value_embeddings[layer], partial(attend, window=window))
            if layer < L // 2:
                first_half.append(x)
        return norm(x)

    def attend(self, tokens: Int[Array, "B T"]) -> Attend:
        """Attention as this model has it, but for the window, which is each layer's own."""
        separator, documents = self.config.document_separator, None
        if separator is not None:
            documents = jnp.cumsum(tokens == separator, axis=1, dtype=jnp.int32)
        scale, kernel = self.config.attention_scale, self.kernels.attention
        return partial(attention, documents=documents, scale=scale, kernel=kernel)

    def value_embeddings(self, tokens: Int[Array, "B T"]) -> list[Float[Array, "B T D"] | None]:
        """What each layer mixes into its values: tables 0, 1, 2, none, ..., none, 0, 1, 2."""
        L, count = self.config.num_layers, self.config.value_embeddings
        tables = jnp.split(self.value_embed[...], count) if count else []
        looked_up = [table[0][tokens].astype(self.head.dtype) for table in tables]
        return (looked_up + [None] * (L - 2 * count) + looked_up[max(0, 2 * count - L) :])[:L]

    def layers(self) -> list[Block]:
        """The blocks one by one: the loop over them is unrolled, so each may differ from the next.

        One split of each stacked array, rather than a slice per layer, has one concatenation as
        its gradient instead of a sum of L zero-padded arrays.
        """
        graphdef, stacked = nnx.split(self.blocks)
        leaves, structure = jax.tree.flatten(stacked)
        rows = [jnp.split(leaf, self.config.num_layers) for leaf in leaves]
        return [
            nnx.merge(graphdef, jax.tree.unflatten(structure, [row[0] for row in layer]))
            for layer in zip(*rows, strict=True)
        ]
