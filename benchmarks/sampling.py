"""Tokens per second when a model writes, and what the memory's bandwidth would allow.

    .venv/bin/python -m benchmarks.sampling

A new model of a preset's size continues texts that nearly fill its context, one and 32 at a time.
Beside that stands one pass over the whole text per token, as decoding would be without a cache,
and the floor: each step has to read every matrix once, and the keys and values that it looks back
to, at the rate at which the same machine adds up the numbers of one large array.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.results import save
from nanogpt.inference.generate import CHUNK, generate
from nanogpt.inference.sampling import Sampling
from nanogpt.model.context import Prompts
from nanogpt.model.parameters import compute_copy
from nanogpt.training.step import graph_of, init_params
from train_gpt import PRESETS

STEPS = 4 * CHUNK


@dataclass(frozen=True)
class Options:
    """Measure how fast a model writes."""

    preset: str = "baseline"
    """Of train_gpt.py: which model."""
    context: int = 1024
    """Tokens of each text in the end."""
    batches: tuple[int, ...] = (1, 32)
    """Texts at a time."""
    dtype: str = "float32"
    """What the model computes in."""
    rounds: int = 3
    """Each figure is the best of so many."""


def main() -> None:
    """Measure, print a table, and save the figures."""
    options = tyro.cli(Options)
    hp = PRESETS[options.preset]
    config = hp.schedule.model(hp.model, len(hp.stages) - 1)
    graph = graph_of(config)
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    # A new head finds all tokens alike; this one does not.
    params["head"] = 0.02 * jax.random.normal(jax.random.key(1), params["head"].shape)
    print(f"{jax.devices()[0].device_kind}, {options.preset}, {options.dtype}")
    rows = [measure(graph, params, batch, options) for batch in options.batches]
    # The best there was: what else the machine does must not make a floor of a lower rate.
    bandwidth = max(row["bandwidth_gb_per_s"] for row in rows)
    print("batch  ms a step  tokens/s  whole passes  faster  floor ms  of the floor's speed")
    for row in rows:
        row["floor_ms"] = row["bytes_per_step"] / bandwidth / 1e6
        row["of_floor"] = row["floor_ms"] / row["ms"]
        print(
            f"{row['batch']:5} {row['ms']:10.2f} {row['tokens_per_s']:9,.0f}"
            f" {row['whole_ms']:10,.0f} ms {row['faster']:6.0f}x"
            f" {row['floor_ms']:9.2f} {row['of_floor']:12.0%}"
        )
    name = "cpu" if jax.default_backend() == "cpu" else "gpu"
    save(f"sampling_{name}_{options.preset}", vars(options) | {"rows": rows})


def measure(graph: nnx.GraphDef, params: Any, batch: int, options: Options) -> dict[str, float]:
    """The figures of one batch size; the three that are compared take turns."""
    vocabulary = params["head"].shape[1] // 2
    texts = np.random.default_rng(0).integers(0, vocabulary, (batch, options.context))
    prompts = [text[:-STEPS].tolist() for text in texts]
    sampling = replace(Sampling(), temperature=1.0)
    numbers = bytes_per_step(graph, params, texts[:, :-STEPS], options)
    large = jnp.ones(max(numbers // 4, 2**28))

    def cached() -> float:
        """Seconds per step, without the pass over the prompts."""
        times = []
        for _ in generate(
            graph,
            params,
            prompts,
            num_tokens=STEPS,
            context=options.context,
            sampling=sampling,
            dtype=options.dtype,
        ):
            times.append(time.perf_counter())
        return (times[-1] - times[0]) / (STEPS - CHUNK)

    whole_pass = jax.jit(lambda params, rows: last_logits(graph, params, rows))
    computed = jax.jit(lambda params: compute_copy(params, options.dtype))(params)
    add_up = jax.jit(jnp.sum)
    best = [np.inf] * 3
    for turn in range(options.rounds + 1):  # the first compiles
        # A sum is over so soon that whatever else runs may slow all of it: the best of ten.
        sums = (seconds(add_up, large) for _ in range(10))
        times = cached(), seconds(whole_pass, computed, texts), min(sums)
        if turn:
            best = [min(pair) for pair in zip(best, times, strict=True)]
    step, whole, adding = best
    return {
        "batch": batch,
        "ms": 1e3 * step,
        "tokens_per_s": batch / step,
        "whole_ms": 1e3 * whole,
        "faster": whole / step,
        "bytes_per_step": numbers,
        "bandwidth_gb_per_s": large.nbytes / adding / 1e9,
    }


def last_logits(graph: nnx.GraphDef, params: Any, rows: jax.Array) -> jax.Array:
    """The logits after each whole row."""
    model = nnx.merge(graph, params)
    return model.logits(model.features(rows)[:, -1])


def bytes_per_step(graph: nnx.GraphDef, params: Any, rows: np.ndarray, options: Options) -> int:
    """What a step reads: the matrices, and the keys and values in view."""

    def cache(params: Any, rows: jax.Array) -> Any:
        model = nnx.merge(graph, compute_copy(params, options.dtype))
        past = Prompts(model.config, rows)
        model.features(rows, past)
        return past.cache(jnp.full(len(rows), rows.shape[1]), options.context)

    seen = jax.eval_shape(cache, params, rows)
    read = {
        "matrices": [params[name] for name in ("attention", "mlp", "head")],
        "cache": [seen.keys, seen.values],
    }
    size = jnp.dtype(options.dtype).itemsize
    return sum(size * leaf.size for leaf in jax.tree.leaves(read))


def seconds(function: Callable[..., jax.Array], *arguments: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
