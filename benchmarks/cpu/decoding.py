"""Time of a decoding step, compared with a full forward pass and with memory bandwidth."""

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import best_in_turn, seconds
from nanogpt.inference.generate import CHUNK, generate
from nanogpt.inference.sampling import Sampling
from nanogpt.model.context import Prompts
from nanogpt.model.parameters import compute_copy
from nanogpt.training.step import graph_of, init_params
from train_gpt import Hyperparameters

STEPS = 4 * CHUNK


def new_model(hp: Hyperparameters) -> tuple[nnx.GraphDef, Any]:
    """Return graph and parameters of a preset's final model, with new weights."""
    config = hp.schedule.used(hp.model, len(hp.stages) - 1)
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    # A new head would give all tokens the same probability.
    params["head"] = 0.02 * jax.random.normal(jax.random.key(1), params["head"].shape)
    return graph_of(config), params


def measure(
    graph: nnx.GraphDef,
    params: Any,
    batch: int,
    *,
    context: int,
    dtype: str,
    rounds: int,
    numbers_added: int = 2**28,
) -> dict[str, float]:
    """Measure decoding of `batch` texts up to `context` tokens, alternating with the comparisons.

    The bandwidth is measured by summing an array of `numbers_added` elements, or more if a step
    reads more.
    """
    vocabulary = params["head"].shape[1] // 2
    texts = np.random.default_rng(0).integers(0, vocabulary, (batch, context))
    prompts = [text[:-STEPS].tolist() for text in texts]
    sampling = replace(Sampling(), temperature=1.0)
    bytes_read = bytes_per_step(graph, params, texts[:, :-STEPS], context, dtype)
    large = jnp.ones(max(bytes_read // 4, numbers_added))
    whole_pass = jax.jit(lambda params, rows: last_logits(graph, params, rows))
    computed = jax.jit(lambda params: compute_copy(params, dtype))(params)
    add_up = jax.jit(jnp.sum)

    def cached() -> float:
        """Return seconds per step, without the prefill."""
        how = {"num_tokens": STEPS, "context": context, "sampling": sampling, "dtype": dtype}
        times = [time.perf_counter() for _ in generate(graph, params, prompts, **how)]
        return (times[-1] - times[0]) / (STEPS - CHUNK)

    sides = {
        "step": cached,
        "whole": lambda: seconds(whole_pass, computed, texts),
        # A sum is so short that other load may slow all of it: take the best of ten.
        "adding": lambda: min(seconds(add_up, large) for _ in range(10)),
    }
    best_in_turn(sides, 1)  # compiles
    best = best_in_turn(sides, rounds)
    return {
        "batch": batch,
        "ms": 1e3 * best["step"],
        "tokens_per_s": batch / best["step"],
        "whole_ms": 1e3 * best["whole"],
        "faster": best["whole"] / best["step"],
        "bytes_per_step": bytes_read,
        "bandwidth_gb_per_s": large.nbytes / best["adding"] / 1e9,
    }


def last_logits(graph: nnx.GraphDef, params: Any, rows: jax.Array) -> jax.Array:
    """Return the logits after each row."""
    model = nnx.merge(graph, params)
    return model.logits(model.features(rows)[:, -1])


def bytes_per_step(
    graph: nnx.GraphDef, params: Any, rows: np.ndarray, context: int, dtype: str
) -> int:
    """Return the bytes that a step reads: the matrices, and the visible keys and values."""

    def cache(params: Any, rows: jax.Array) -> Any:
        model = nnx.merge(graph, compute_copy(params, dtype))
        past = Prompts(model.config, rows)
        model.features(rows, past)
        return past.cache(jnp.full(len(rows), rows.shape[1]), context)

    seen = jax.eval_shape(cache, params, rows)
    read = {
        "matrices": [params[name] for name in ("attention", "mlp", "head")],
        "cache": [seen.keys, seen.values],
    }
    size = jnp.dtype(dtype).itemsize
    return sum(size * leaf.size for leaf in jax.tree.leaves(read))
