"""Losses and the gradient of the logits in one pass over them: a Pallas kernel for NVIDIA GPUs.

Each row is loaded from memory once, and overwritten by its gradient while it is in the cache, as in
Liger Kernel (arXiv:2410.10989) and modded-nanogpt (2026-01-24). The plain form is `_two_passes` in
nanogpt/model/loss.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from nanogpt.model.kernels.fp8 import E5M2, to_e5m2
from nanogpt.model.softcap import Softcap, softcap_tanh

# One program per row: 512 threads process CHUNK ids at a time, 32 each, which is four loads of 16
# bytes. Registers suffice for two programs per multiprocessor. That is enough to hide the memory
# latency, and so few rows (264 of 100 kB on an H100) that all stay in the cache until they are read
# again.
CHUNK, WARPS = 16384, 16
# Pallas addresses arrays of up to 4 GiB with signed 32-bit integers, too small for more elements.
MAX_8BIT_ELEMENTS = 2**31


def in_parts(run: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """Split the rows of `run(features, head, targets, ...)` to respect MAX_8BIT_ELEMENTS."""

    def run_in_parts(features, head, targets, *how):
        parts = 1 + len(targets) * head.shape[1] // MAX_8BIT_ELEMENTS
        rows = (jnp.array_split(x, parts) for x in (features, targets))
        pairs = [run(x, head, y, *how) for x, y in zip(*rows, strict=True)]
        objectives, losses = zip(*pairs, strict=True)
        return jnp.concatenate(objectives), jnp.concatenate(losses)

    return run_in_parts


def one_pass(
    logits: Float[Array, "BT V"],
    targets: Int[Array, "BT K"],
    weights: Float[Array, "K"],
    cap: Softcap,
    fp8: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "BT K"], Float[Array, "BT V"]]:
    """Return losses, float32, and dlogits, which overwrite the logits unless they are FP8."""
    from jax.experimental.pallas import triton as plgpu  # imported here in case JAX drops it

    (BT, V), K = logits.shape, targets.shape[1]
    # Inside jax.shard_map, results must declare over which mesh axes they vary.
    array = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(logits).manual_axis_type)
    # The GPU's tanh instruction has an error of 2^-11, a quarter of the rounding of bfloat16
    # logits, and replaces about twenty instructions, with which the kernel would be compute-bound.
    fast = logits.dtype == jnp.bfloat16 and not interpret
    tanh = plgpu.approx_tanh if fast else jnp.tanh
    of_targets, of_ids = (pl.BlockSpec((None, size), lambda i: (i, 0)) for size in (K, V))
    of_weights = pl.BlockSpec((K,), lambda i: (0,))
    dtype = E5M2 if fp8 else logits.dtype
    return pl.pallas_call(
        partial(_kernel, cap=cap, fp8=fp8, chunk=CHUNK, tanh=tanh),
        grid=(BT,),
        in_specs=[of_ids, of_targets, of_weights],
        out_specs=[of_targets, of_ids],
        out_shape=[array((BT, K), jnp.float32), array((BT, V), dtype)],
        input_output_aliases={} if fp8 else {0: 1},
        compiler_params=None if interpret else plgpu.CompilerParams(WARPS, num_stages=1),
        interpret=interpret,
        name="cross_entropy",
    )(logits, targets, weights)


def _kernel(
    logits_ref, targets_ref, weights_ref, losses_ref, dlogits_ref, *, cap, fp8, chunk, tanh
):
    """Compute losses [K] and dlogits [V] of one row from logits [V] and targets [K]."""

    def exp(x):  # half the instructions of jnp.exp, which also corrects the last bit
        return jnp.exp2(x * 1.4426950408889634)

    def tanh_at(span):
        return softcap_tanh(logits_ref[span], cap, tanh)

    spans, start = [], 0  # spans cover V; Triton loads need sizes that are powers of two
    while rest := logits_ref.shape[0] - start:
        spans.append(pl.ds(start, min(chunk, 1 << (rest.bit_length() - 1))))
        start += spans[-1].size

    # Read before the threads synchronize; after that, another may already overwrite them.
    K = targets_ref.shape[0]
    targets, weights = ([ref[k] for k in range(K)] for ref in (targets_ref, weights_ref))
    first = [pl.ds(jnp.maximum(target, 0), 1) for target in targets]
    target_logits = [jnp.sum(cap.bound * tanh_at(span)) for span in first]  # one element each
    # Add vectors of equal size first: threads then synchronize once per size, not per span.
    sums: dict[int, Any] = {}
    for span in spans:
        sums[span.size] = sums.get(span.size, 0.0) + exp(cap.bound * tanh_at(span) - cap.bound)
    log_normalizer = cap.bound + jnp.log(sum(jnp.sum(terms) for terms in sums.values()))
    for k, (target, target_logit) in enumerate(zip(targets, target_logits, strict=True)):
        losses_ref[k] = jnp.where(target >= 0, log_normalizer - target_logit, 0.0)

    weighted = zip(targets, weights, strict=True)
    offset = log_normalizer - jnp.log(sum(weight * (target >= 0) for target, weight in weighted))
    for span in reversed(spans):  # the last ones read are the most likely to be in the cache
        ids, t = span.start + jnp.arange(span.size), tanh_at(span)
        gradient = exp(cap.bound * t - offset)
        for target, weight in zip(targets, weights, strict=True):
            gradient -= weight * (ids == target)
        gradient *= 1.0 - t * t
        dlogits_ref[span] = to_e5m2(gradient) if fp8 else gradient.astype(dlogits_ref.dtype)
