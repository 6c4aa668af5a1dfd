"""nanoGPT's documented CPU configuration in plain JAX.

GPT-2's architecture (Radford et al., 2019) as in nanoGPT without biases and dropout: learned
positions, LayerNorm, GELU, tied head; AdamW with weight decay 0.1 on matrices, betas 0.9 and 0.99,
gradients clipped to norm 1, 100 steps of warm-up, cosine decay to a tenth.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from benchmarks.cpu.against_nanogpt import BATCH, CONTEXT
from nanogpt.data.corpus import embedded_corpus
from nanogpt.data.shards import find_shards, read_shard

N, D, V, T = 4, 128, 256, CONTEXT
Params = dict[str, Any]


def train(layers: int, steps: int, val_tokens: int) -> None:
    """Train on the embedded corpus; print seconds of training and the final validation loss."""
    corpus = embedded_corpus()
    tokens, val = (read_shard(find_shards(p)[0]) for p in (corpus.train_files, corpus.val_files))
    optimizer = adamw(steps)

    @jax.jit
    def step(params: Params, state: optax.OptState, rows: Array) -> tuple[Params, optax.OptState]:
        gradients = jax.grad(loss_of)(params, rows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    started = time.perf_counter()
    params = jax.jit(init, static_argnums=0)(layers, jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    for _ in range(steps):
        rows = rows_at(tokens, rng.integers(len(tokens) - T, size=BATCH))
        params, state = step(params, state, rows)
    jax.block_until_ready(params)
    training = time.perf_counter() - started

    starts = np.arange(0, val_tokens, T).reshape(-1, 256)
    losses = [float(jax.jit(loss_of)(params, rows_at(val, part))) for part in starts]
    print(training, sum(losses) / len(losses))


def rows_at(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return rows of T + 1 tokens that start at these positions."""
    return np.stack([tokens[s : s + T + 1] for s in starts]).astype(np.int32)


def adamw(steps: int) -> optax.GradientTransformation:
    """Build the optimizer."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(100, steps // 2), steps, 1e-4)

    def is_matrix(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, 0.9, 0.99, weight_decay=0.1, mask=is_matrix),
    )


def init(layers: int, key: Array) -> Params:
    """Return new parameters."""
    keys = iter(jax.random.split(key, 2 + 4 * layers))
    small = 0.02 / (2 * layers) ** 0.5

    def normal(*shape: int, std: float = 0.02) -> Array:
        return std * jax.random.normal(next(keys), shape)

    def block() -> Params:
        return {
            "norm1": jnp.ones(D),
            "qkv": normal(D, 3 * D),
            "out": normal(D, D, std=small),
            "norm2": jnp.ones(D),
            "up": normal(D, 4 * D),
            "down": normal(4 * D, D, std=small),
        }

    blocks = [block() for _ in range(layers)]
    return {"tokens": normal(V, D), "places": normal(T, D), "blocks": blocks, "norm": jnp.ones(D)}


def norm(x: Float[Array, "BT D"], gain: Float[Array, "D"]) -> Float[Array, "BT D"]:
    """Apply LayerNorm without a bias."""
    return jax.nn.standardize(x, epsilon=1e-5) * gain


def loss_of(params: Params, rows: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """Return the mean cross-entropy, in nats per token."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    B = len(rows)
    x = (params["tokens"][inputs] + params["places"]).reshape(B * T, D)
    for p in params["blocks"]:
        qkv = (norm(x, p["norm1"]) @ p["qkv"]).reshape(B, T, 3, N, D // N)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = jnp.einsum("bnqh,bnkh->bnqk", q, k) / (D // N) ** 0.5
        scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
        y = jnp.einsum("bnqk,bnkh->bqnh", jax.nn.softmax(scores), v).reshape(B * T, D)
        x = x + y @ p["out"]
        x = x + jax.nn.gelu(norm(x, p["norm2"]) @ p["up"], approximate=False) @ p["down"]
    logits = norm(x, params["norm"]) @ params["tokens"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets.reshape(-1)).mean()
