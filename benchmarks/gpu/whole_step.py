"""The whole optimizer step of a variant: compiling, starting, timing and tracing it."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.stages import Compiled
from jaxtyping import PyTree

from benchmarks.gpu.loop import WARM_UP, median_ms
from benchmarks.gpu.rows import Figures, Unmeasured
from benchmarks.gpu.variants import Rule, Size, Variant, random_tokens
from nanogpt.config import GPTConfig, Kernels
from nanogpt.devices.hardware import flops_per_token, utilization
from nanogpt.devices.mesh import BATCH, REPLICATED, make_mesh, put, shapes_on
from nanogpt.schedule import Rates
from nanogpt.training.plan import optimizer_of
from nanogpt.training.step import graph_of, make_init, make_train_step
from train_gpt import Hyperparameters

LOSS_TOLERANCE = 0.5  # nats, after a few steps that differ in rounding


def make_rules(hp: Hyperparameters, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of train_gpt.py, with or without NorMuon, or Adam for all parameters."""
    if rule == "Adam":
        return optax.with_extra_args_support(
            optax.adam(hp.adam.head.learning_rate, *hp.adam.head.betas)
        )
    neuron_decay = hp.neuron_decay if rule == "NorMuon" else None
    return optimizer_of(replace(hp, neuron_decay=neuron_decay), make_mesh(1))


@cache  # most variants begin alike
def rules_and_init(
    hp: Hyperparameters, rule: Rule, model: GPTConfig
) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """Return the optimizer, and the function that initializes the state."""
    rules = make_rules(hp, rule)
    return rules, make_init(model, rules, make_mesh(1))


@cache  # for the base, which is measured twice
def compile_step(size: Size, variant: Variant) -> tuple[Callable, Compiled, float]:
    """Return the function that initializes the state, the compiled step, and its compile time."""
    hp, mesh = size.hp, make_mesh(1)
    model = hp.model if variant.document_mask else replace(hp.model, document_separator=None)
    rules, init = rules_and_init(hp, variant.rule, model)
    graph = graph_of(
        model, Kernels(variant.attention, variant.loss, variant.fp8_head, variant.rematerialize)
    )
    tied = hp.schedule.ties_head(model, 0)
    step = make_train_step(graph, rules, mesh, hp.dtype, tied_head=tied)
    state = shapes_on(mesh, REPLICATED, jax.eval_shape(init, jax.random.key(0)))
    batch = shapes_on(mesh, BATCH, jax.ShapeDtypeStruct(batch_shape(hp, variant), jnp.int32))
    start = time.perf_counter()
    compiled = step.lower(state, batch, rates_of(hp, variant)).compile()
    return init, compiled, time.perf_counter() - start


def rates_of(hp: Hyperparameters, variant: Variant) -> Rates:
    """Return the rates of the first step, with the variant's targets."""
    return hp.schedule.rates(1)._replace(target_weights=variant.target_weights)


def batch_shape(hp: Hyperparameters, variant: Variant) -> tuple[int, int, int]:
    """Return the shape of a batch: micro-batches, rows, and T + 1 tokens."""
    R, T = variant.batch_size, hp.sequence_length
    return hp.total_batch_size // (R * T), R, T + 1


def start_training(size: Size, variant: Variant) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """Return `advance`, and `carry`: state and metrics after warm-up steps from a fixed seed."""
    init, step, _ = compile_step(size, variant)
    shape, rates = batch_shape(size.hp, variant), rates_of(size.hp, variant)
    batch = put(make_mesh(1), BATCH, shape, random_tokens(size.hp.model, shape).__getitem__)

    def advance(carry: PyTree) -> PyTree:
        return step(carry[0], batch, rates)

    carry = (init(jax.random.key(0)), None)
    for _ in range(WARM_UP):
        carry = advance(carry)
    return advance, carry


def measure_step(size: Size, steps: Figures, variant: Variant) -> Figures:
    """Measure time and memory of a step; Unmeasured if its loss is not that of the base in `steps`.

    `memory_GB` is what the compiler plans for this step. `peak_GB` is the most that the process
    has used so far, if the device reports it.
    """
    hp, base = size.hp, steps.get("base", {})
    advance, carry = start_training(size, variant)
    loss = float(carry[1]["loss"])
    expected = base.get("last_loss", loss)
    if variant.rule != "Adam" and not abs(loss - expected) < LOSS_TOLERANCE:  # also if it is NaN
        raise Unmeasured(
            f"After {WARM_UP} steps its loss is {loss:.2f}, the base's {expected:.2f}."
        )
    ms = median_ms(size, advance, carry)

    _, compiled, seconds = compile_step(size, variant)
    planned, device = compiled.memory_analysis(), jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    rate, flops = hp.total_batch_size / ms * 1e3, flops_per_token(hp.model, hp.sequence_length)
    return {
        "ms": ms,
        "tokens_per_s": rate,
        "mfu": utilization(rate, flops, device.device_kind, 1),
        "ratio": ms / base.get("ms", ms),
        "compile_s": seconds,  # or to load it from the cache
        "memory_GB": (planned.temp_size_in_bytes + planned.argument_size_in_bytes) / 1e9,
        "peak_GB": peak and peak / 1e9,
        "last_loss": loss,
        "variant": asdict(variant),
    }


def trace_steps(size: Size, variant: Variant, folder: Path) -> Figures:
    """Profile three steps."""
    advance, carry = start_training(size, variant)
    with jax.profiler.trace(str(folder)):
        return {"ms": median_ms(replace(size, calls=3, repeats=1), advance, carry)}
