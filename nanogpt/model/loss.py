"""The head and its cross-entropy as one function, with gradients written by hand.

The logits are the largest array of a training step: a micro-batch of 65,536 tokens times 50,304
ids is 6.6 GB in bfloat16. So they are stored once, in the dtype of the features. Everything that
reads them computes in float32, but a float32 copy of them is never stored.

    features [BT, D] @ head [D, V] -> logits [BT, V] -> losses [BT, K]       BT = B T tokens
    dlogits   = (p - onehot) (1 - tanh²)                            as if g were 1
    dfeatures = g (dlogits @ headᵀ)
    dhead     = (g features)ᵀ @ dlogits

g is one factor per token: the gradient with respect to its objective, times bound / width of the
soft cap. It is applied only in the last two products, so one pass over the logits can compute both
losses and dlogits, as the kernel in nanogpt/model/kernels/cross_entropy.py does.

A token may have K targets, the next id, the one after it, and so on, with a weight for each
(multi-token prediction: Gloeckle et al., arXiv:2404.19737; from the same logits, without extra
parameters: modded-nanogpt, 2025-12). Then p - onehot becomes its weighted sum over k.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from nanogpt.config import LossKernel
from nanogpt.model.kernels.cross_entropy import in_parts, one_pass
from nanogpt.model.kernels.fp8 import fp8_gradients, fp8_logits, to_e5m2
from nanogpt.model.softcap import Softcap, softcap, softcap_tanh


def linear_cross_entropy(
    features: Float[Array, "*BT D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "*BT K"],
    cap: Softcap,
    *,
    weights: Sequence[float | Float[Array, ""]] = (1.0,),
    kernel: LossKernel = "xla",
    fp8: bool = False,
    impossible: UInt8[Array, "*BT V8"] | None = None,
) -> tuple[Float[Array, "*BT"], Float[Array, "*BT"]]:
    """Return the objective and the loss of each token, in nats, as float32.

    The objective is the weighted sum of the losses, -log softmax(softcap(features @ head))[target],
    of K targets. The loss returned is the first target's, for logging: it is not differentiated.

    Args:
        features: bfloat16 or float32; must be RMS-normalized for `fp8`.
        head: in the dtype of the features, to which the logits are also rounded.
        targets: the next ids, the nearest first. A negative target is missing and has zero loss.
        weights: one per target of a token, not all of them zero.
        cap: soft cap with a bound of at most 40, so that exp(logit - bound) neither overflows nor
            underflows, which saves the usual pass over V for the maximum.
        kernel: "pallas" reads the logits once per step instead of twice, on NVIDIA GPUs; other
            devices, and losses that are not differentiated, use XLA.
        fp8: whether to multiply in 8-bit floats; see nanogpt/model/kernels/fp8.py.
        impossible: a bit for each id without probability, in validation; see data/canonical.py.

    Raises ValueError if there are not K weights.
    """
    *shape, K = targets.shape
    if len(weights) != K:
        raise ValueError(f"weights must be {K} numbers, one per target of a token, not {weights}.")
    given = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    total = given.sum()
    run = in_parts(_objective_and_loss) if kernel == "pallas" and fp8 else _objective_and_loss
    features, targets = features.reshape(-1, len(head)), targets.reshape(-1, K)
    if impossible is None:
        objective, loss = run(features, head, targets, given / total, cap, fp8, kernel)
    else:
        mask = impossible.reshape(len(targets), -1)
        objective, loss = _forward(features, head, targets, given / total, cap, fp8, "xla", mask)[0]
    return total * objective.reshape(shape), loss.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _objective_and_loss(features, head, targets, weights, cap, fp8, kernel):
    """Return both [BT], for features [BT, D], targets [BT, K] and weights [K] that sum to 1."""
    return _forward(features, head, targets, weights, cap, fp8, "xla")[0]


def _forward(features, head, targets, weights, cap, fp8, kernel, mask=None):
    if fp8:
        logits = fp8_logits(features, head)
    else:
        logits = _product("td,dv->tv", features, head, features.dtype)
    if kernel == "pallas":
        one, two = (partial(passes, cap=cap, fp8=fp8) for passes in (one_pass, _two_passes))
        losses, kept = jax.lax.platform_dependent(logits, targets, weights, cuda=one, default=two)
        offset = None  # `kept` is already dlogits
    else:
        kept, (losses, offset) = logits, _losses_and_offset(logits, targets, weights, cap, mask)
    objective = jnp.sum(losses * weights, axis=-1)
    return (objective, losses[:, 0]), (features, head, targets, weights, kept, offset)


def _backward(cap, fp8, kernel, residuals, gradients):
    features, head, targets, weights, kept, offset = residuals
    dlogits = kept if offset is None else _dlogits(kept, offset, targets, weights, cap, fp8)
    g = (cap.bound / cap.width) * gradients[0][:, None]
    if fp8:
        dfeatures, dhead = fp8_gradients(features, head, dlogits, g)
    else:
        dfeatures = g * _product("tv,dv->td", dlogits, head, jnp.float32)
        dhead = _product("td,tv->dv", (g * features).astype(features.dtype), dlogits, head.dtype)
    return dfeatures.astype(features.dtype), dhead.astype(head.dtype), None, None


_objective_and_loss.defvjp(_forward, _backward)


def _product(formula, a, b, dtype):
    """Multiply with output in `dtype`; some of XLA's matmul kernels cannot fuse a later cast."""
    return jnp.einsum(formula, a, b, preferred_element_type=dtype)


def _two_passes(logits, targets, weights, cap, fp8):
    """Compute the kernel's results on devices that lack the kernel."""
    losses, offset = _losses_and_offset(logits, targets, weights, cap)
    return losses, _dlogits(logits, offset, targets, weights, cap, fp8)


def _losses_and_offset(logits, targets, weights, cap, mask=None):
    """Return losses [BT, K], and offsets [BT] such that exp(capped logits - offset) = weight p."""
    terms = jnp.exp(softcap(logits, cap) - cap.bound)
    if mask is not None:
        terms *= 1 - jnp.unpackbits(mask, axis=-1, bitorder="little")
    log_normalizer = cap.bound + jnp.log(jnp.sum(terms, axis=-1))
    # Gather the targets' logits. A second reduction over V instead would make the compiler store
    # what both reductions read, the capped logits, in float32.
    target_logits = jnp.take_along_axis(logits, jnp.maximum(targets, 0), axis=-1)
    losses = jnp.where(targets >= 0, log_normalizer[:, None] - softcap(target_logits, cap), 0.0)
    # The summed weight of the targets that exist; without any, its log is -inf and p becomes zero.
    weight = sum(w * (target >= 0) for target, w in zip(targets.T, weights, strict=True))
    return losses, log_normalizer - jnp.log(weight)


def _dlogits(logits, offset, targets, weights, cap, fp8):
    """Return the gradient of the objective with respect to the logits, without the factor g."""
    # The barrier makes XLA recompute tanh from the logits instead of storing it in float32.
    tanh = softcap_tanh(jax.lax.optimization_barrier(logits), cap)
    gradient = jnp.exp(cap.bound * tanh - offset[:, None])
    for target, weight in zip(targets.T, weights, strict=True):
        # A comparison fuses into the same pass; a scatter would not.
        gradient -= weight * (jnp.arange(logits.shape[1]) == target[:, None])
    gradient *= 1.0 - tanh * tanh
    return to_e5m2(gradient) if fp8 else gradient.astype(logits.dtype)
