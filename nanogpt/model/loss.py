"""The head and its cross-entropy as one function, with gradients written by hand.

The logits are the largest array of a training step (a micro-batch of 65,536 tokens times 50,304
ids is 6.6 GB in bfloat16). So they are stored once, in the dtype of the features; whatever reads
them computes in float32, and no float32 copy of them is ever stored.

Whoever reads the logits of a token can write their gradient too. What the backward pass adds is
one factor per token, g, the gradient by the token's loss (times bound / width of the soft cap), and
that can wait for the products:

    features [BT, D] @ head [D, V] -> logits [BT, V] -> losses [BT]      BT = B T tokens
    dlogits   = (p - onehot) (1 - tanh²)                              as if g were 1
    dfeatures = g (dlogits @ headᵀ)
    dhead     = (g features)ᵀ @ dlogits

A token may have K targets, the ids one place ahead, two, and so on, with a weight for each
(multi-token prediction: Gloeckle et al., arXiv:2404.19737; from the same logits, so without
parameters of its own: modded-nanogpt, 2025-12). Then p - onehot becomes the sum of that over k,
weighted, and the pass over the logits stays one: p times the weights of all targets that there are
is exp(logit - offset), and the one-hots are comparisons.

`kernel` says who makes losses and dlogits. "xla": the forward pass reads the logits once, and the
backward pass once more, to write dlogits. "pallas": one kernel for NVIDIA GPUs does both in the
forward pass. It fetches a row from memory once, and writes dlogits over it while the row is in the
cache, as Liger Kernel (arXiv:2410.10989) and modded-nanogpt (2026-01-24) do.

`fp8` has the three products multiply 8-bit floats (arXiv:2209.05433), with fixed scales
(modded-nanogpt, 2025-01-13).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from nanogpt.config import LossKernel

# 8-bit floats: e4m3, up to 448, for features and weights; e5m2, up to 57344, for gradients. Values
# are scaled to fit; by powers of two, which are exact to undo.
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FEATURE_SCALE = 2.0**4  # RMS-normalised, so within ±sqrt(D): 443 after scaling if D is 768
HEAD_SCALE = 2.0**8  # weights saturate at 1.75, and have all their digits down to 6e-5
GRADIENT_SCALE = 2.0**14  # dlogits lie within ±1, as weights add up to 1; all digits to 4e-9

# A program of the kernel is one row: 512 threads take CHUNK ids at a time, 32 each, which is four
# loads of 16 bytes. Their registers let two programs onto a multiprocessor. That is enough to hide
# the wait for memory, and so few rows (264 of 100 kB on an H100) that the cache keeps them all
# until they are read again.
CHUNK, WARPS = 16384, 16
# Pallas addresses arrays of up to 4 GiB by signed 32-bit numbers: too few for more 8-bit elements.
MAX_8BIT_ELEMENTS = 2**31


class Softcap(NamedTuple):
    """bound * tanh((logit + shift) / width), which keeps logits within ±bound.

    Gemma 2 (arXiv:2408.00118) has bound = width and no shift. (11.5, 15.0, 5.0) is the
    23 * sigmoid((logit + 5) / 7.5) of modded-nanogpt (2026-01), less 11.5, which no softmax sees.
    """

    bound: float
    width: float
    shift: float


def softcap(logits: Float[Array, "... V"], cap: Softcap) -> Float[Array, "... V"]:
    """The capped logits, float32."""
    return cap.bound * _tanh(logits, cap)


def _tanh(logits, cap, tanh=jnp.tanh):
    x = logits.astype(jnp.float32) * (1 / cap.width)
    # Triton would not leave out the addition of a zero.
    return tanh(x + cap.shift / cap.width if cap.shift else x)


def linear_cross_entropy(
    features: Float[Array, "... D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "... K"],
    cap: Softcap,
    *,
    weights: tuple[float, ...] = (1.0,),
    kernel: LossKernel = "xla",
    fp8: bool = False,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The objective and the loss of each token, in nats, as float32.

    A loss is -log softmax(softcap(features @ head))[target]. The objective is the weighted sum of
    the losses of the K targets. The loss returned is that of the first target, for the log: no
    gradient comes from it. By weights of (1.0,) they are the same number.

    Args:
        features: what the head reads, bfloat16 or float32. `fp8` wants them RMS-normalised.
        head: of the dtype of the features, to which the logits are rounded too.
        targets: the ids that were next, the nearest first; a negative one says that there is none:
            its loss and its gradients are zero.
        cap: of the logits; its bound is at most 40. Because they lie within ±bound,
            exp(logit - bound) neither overflows nor vanishes, and the usual pass over V for the
            maximum is saved.
        weights: of the K targets.
        kernel: who computes losses that are differentiated; others always come from XLA, as do
            those of "pallas" where there is no NVIDIA GPU.
        fp8: whether to multiply 8-bit floats. They are fast on a GPU from Hopper on.

    Raises:
        ValueError: weights that are not K positive numbers.
    """
    D, V = head.shape
    *shape, K = targets.shape
    if len(weights) != K or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"weights must be {K} positive numbers, one per target of a token, not {weights}."
        )
    total = sum(weights)
    shares = tuple(weight / total for weight in weights)
    parts = 1 + targets.size // K * V // MAX_8BIT_ELEMENTS if kernel == "pallas" and fp8 else 1
    feature_parts = jnp.array_split(features.reshape(-1, D), parts)
    target_parts = jnp.array_split(targets.reshape(-1, K), parts)
    pairs = [
        _objective_and_loss(rows, head, chosen, cap, shares, kernel, fp8)
        for rows, chosen in zip(feature_parts, target_parts, strict=True)
    ]
    objective, loss = (jnp.concatenate(each).reshape(shape) for each in zip(*pairs, strict=True))
    return total * objective, loss


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _objective_and_loss(features, head, targets, cap, weights, kernel, fp8):
    """Both [BT], of features [BT, D], head [D, V], targets [BT, K] and weights that add up to 1."""
    return _forward(features, head, targets, cap, weights, "xla", fp8)[0]


def _forward(features, head, targets, cap, weights, kernel, fp8):
    if fp8:
        logits = _dot(_e4m3(features, FEATURE_SCALE), _e4m3(head, HEAD_SCALE), 1, 0, features.dtype)
        logits = logits * (1 / (FEATURE_SCALE * HEAD_SCALE))
    else:
        logits = _dot(features, head, 1, 0, features.dtype)
    if kernel == "pallas":
        one, two = (partial(passes, cap, weights, fp8) for passes in (_one_pass, _two_passes))
        losses, dlogits = jax.lax.platform_dependent(logits, targets, cuda=one, default=two)
        residuals = features, head, targets, dlogits, None
    else:
        losses, offset = _losses_and_offset(logits, targets, cap, weights)
        residuals = features, head, targets, logits, offset
    objective = jnp.sum(losses * jnp.array(weights, jnp.float32), axis=-1)
    return (objective, losses[:, 0]), residuals


def _backward(cap, weights, kernel, fp8, residuals, gradients):
    features, head, targets, dlogits, offset = residuals
    if offset is not None:  # so far they are logits
        dlogits = _dlogits(dlogits, offset, targets, cap, weights, fp8)
    objective_gradient, _ = gradients
    g = (cap.bound / cap.width) * objective_gradient[:, None]
    if fp8:
        # HIGHEST, or Hopper adds up with 14 bits: enough for logits, not for sums over all tokens.
        dot = partial(_dot, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)
        largest = jnp.max(jnp.abs(g), initial=jnp.finfo(jnp.float32).tiny)
        weighted = _e4m3(features * (g / largest), FEATURE_SCALE)
        dfeatures = dot(dlogits, _e4m3(head, HEAD_SCALE), 1, 1)
        dfeatures = dfeatures * (g / (GRADIENT_SCALE * HEAD_SCALE))
        dhead = dot(weighted, dlogits, 0, 0) * (largest / (FEATURE_SCALE * GRADIENT_SCALE))
    else:
        dfeatures = g * _dot(dlogits, head, 1, 1, jnp.float32)
        dhead = _dot((g * features).astype(features.dtype), dlogits, 0, 0, head.dtype)
    return dfeatures.astype(features.dtype), dhead.astype(head.dtype), None


_objective_and_loss.defvjp(_forward, _backward)


def _dot(a, b, axis_of_a, axis_of_b, dtype, precision=None):
    """The product of two matrices, summed in float32 over these axes of theirs, as `dtype`.

    The product is told its dtype, rather than cast: some of XLA's choices cannot cast on the way.
    """
    axes = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision, preferred_element_type=dtype)


def _e4m3(x, scale):
    """x * scale in 8 bits. What is too large saturates: without the clip it would become NaN."""
    largest = float(jnp.finfo(E4M3).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -largest, largest).astype(E4M3)


def _losses_and_offset(logits, targets, cap, weights):
    """Losses [BT, K], and offsets [BT] by which exp(capped logits - offset) is weight * p."""
    exps = jnp.exp(softcap(logits, cap) - cap.bound)
    log_normaliser = cap.bound + jnp.log(jnp.sum(exps, axis=-1))
    # Only the targets' logits are gathered. A second reduction over V would make the compiler keep
    # what it shares with the first, the capped logits, in float32.
    target_logits = jnp.take_along_axis(logits, jnp.maximum(targets, 0), axis=-1)
    losses = jnp.where(targets >= 0, log_normaliser[:, None] - softcap(target_logits, cap), 0.0)
    return losses, log_normaliser - _log_weight(targets.T, weights)


def _log_weight(targets, weights):
    """Of the targets that there are; without any it is -inf, with which exp makes p zero."""
    pairs = zip(targets, weights, strict=True)
    return jnp.log(sum(weight * (target >= 0) for target, weight in pairs))


def _dlogits(logits, offset, targets, cap, weights, fp8):
    # The barrier makes XLA compute tanh again from the logits instead of storing it in float32.
    logits = jax.lax.optimization_barrier(logits)
    ids = jnp.arange(logits.shape[1])
    return _chain_rule(logits, offset[:, None], ids, targets.T[..., None], cap, weights, fp8)


def _chain_rule(logits, offset, ids, targets, cap, weights, fp8, tanh=jnp.tanh, exp=jnp.exp):
    """The gradient of the objective by the logits of these ids, but for bound / width.

    In the dtype of the logits, or scaled to e5m2. `targets` are K arrays.
    """
    t = _tanh(logits, cap, tanh)
    gradient = exp(cap.bound * t - offset)
    for target, weight in zip(targets, weights, strict=True):
        # By comparison: that fuses into the same pass, as a scatter would not.
        gradient -= weight * (ids == target)
    gradient *= 1.0 - t * t
    return (gradient * GRADIENT_SCALE).astype(E5M2) if fp8 else gradient.astype(logits.dtype)


def _two_passes(cap, weights, fp8, logits, targets):
    """What the kernel computes, where there is no kernel."""
    losses, offset = _losses_and_offset(logits, targets, cap, weights)
    return losses, _dlogits(logits, offset, targets, cap, weights, fp8)


def _one_pass(cap, weights, fp8, logits, targets, interpret=False):
    """Losses [BT, K], and dlogits [BT, V] over the logits, or beside them if 8 bits wide."""
    from jax.experimental.pallas import triton as plgpu  # on use, should JAX drop it one day

    (BT, V), K = logits.shape, targets.shape[1]
    # Inside jax.shard_map a result says over which devices it varies.
    array = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(logits).manual_axis_type)
    # The tanh instruction of the GPU errs by 2^-11, a quarter of what bfloat16 logits are rounded
    # by, and replaces about twenty. With those, arithmetic would take longer than memory does.
    fast = logits.dtype == jnp.bfloat16 and not interpret
    tanh = plgpu.approx_tanh if fast else jnp.tanh
    of_targets, of_ids = (pl.BlockSpec((None, size), lambda i: (i, 0)) for size in (K, V))
    return pl.pallas_call(
        partial(_kernel, cap=cap, weights=weights, fp8=fp8, chunk=CHUNK, tanh=tanh),
        grid=(BT,),
        in_specs=[of_ids, of_targets],
        out_specs=[of_targets, of_ids],
        out_shape=[array((BT, K), jnp.float32), array((BT, V), E5M2 if fp8 else logits.dtype)],
        input_output_aliases={} if fp8 else {0: 1},
        compiler_params=None if interpret else plgpu.CompilerParams(WARPS, num_stages=1),
        interpret=interpret,
        name="cross_entropy",
    )(logits, targets)


def _kernel(logits_ref, targets_ref, losses_ref, dlogits_ref, *, cap, weights, fp8, chunk, tanh):
    """One row: logits [V] and targets [K] to losses [K] and dlogits [V]."""

    def exp(x):  # half the instructions of jnp.exp, which also mends the last bit
        return jnp.exp2(x * 1.4426950408889634)

    def capped(at):
        return cap.bound * _tanh(logits_ref[at], cap, tanh)

    spans, start = [], 0  # which make up V; the size of what Triton reads is a power of two
    while rest := logits_ref.shape[0] - start:
        spans.append(pl.ds(start, min(chunk, 1 << (rest.bit_length() - 1))))
        start += spans[-1].size

    # Read before the threads meet, after which one of them may overwrite it.
    targets = [targets_ref[k] for k in range(len(weights))]
    target_logits = [jnp.sum(capped(pl.ds(jnp.maximum(t, 0), 1))) for t in targets]  # of 1 number
    sums = {}  # by size: adding vectors first, the threads meet once per size, not once per span
    for span in spans:
        sums[span.size] = sums.get(span.size, 0.0) + exp(capped(span) - cap.bound)
    log_normaliser = cap.bound + jnp.log(sum(jnp.sum(terms) for terms in sums.values()))
    for k, (target, target_logit) in enumerate(zip(targets, target_logits, strict=True)):
        losses_ref[k] = jnp.where(target >= 0, log_normaliser - target_logit, 0.0)

    offset = log_normaliser - _log_weight(targets, weights)
    for span in reversed(spans):  # what was read last is the surest to be in the cache
        ids = span.start + jnp.arange(span.size)
        dlogits_ref[span] = _chain_rule(
            logits_ref[span], offset, ids, targets, cap, weights, fp8, tanh, exp
        )
