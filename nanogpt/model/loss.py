"""The head and its cross-entropy as one function, with gradients written by hand.

The logits are the largest array of a training step: a micro-batch of 65,536 tokens times 50,304
ids is 6.6 GB in bfloat16. So they are stored once, in the dtype of the features. Whatever reads
them computes in float32, and no float32 copy of them is ever stored.

    features [BT, D] @ head [D, V] -> logits [BT, V] -> losses [BT, K]       BT = B T tokens
    dlogits   = (p - onehot) (1 - tanh²)                            as if g were 1
    dfeatures = g (dlogits @ headᵀ)
    dhead     = (g features)ᵀ @ dlogits

g is one factor per token: the gradient with respect to its loss, times bound / width of the soft
cap. It can wait for the products, so whoever reads a token's logits can write their gradient, too,
as the kernel in nanogpt/model/kernels/cross_entropy.py does.

A token may have K targets, the ids one place ahead, two, and so on, with a weight for each
(multi-token prediction: Gloeckle et al., arXiv:2404.19737; from the same logits, so without
parameters of its own: modded-nanogpt, 2025-12). Then p - onehot becomes its weighted sum over k.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
) -> tuple[Float[Array, "*BT"], Float[Array, "*BT"]]:
    """The objective and the loss of each token, in nats, as float32.

    A loss is -log softmax(softcap(features @ head))[target]. The objective is the weighted sum of
    the losses of the K targets. The loss returned is that of the first target, for the log: no
    gradient comes from it. With weights of (1.0,) they are the same number.

    Args:
        features: bfloat16 or float32; for `fp8` they must be RMS-normalized.
        head: in the dtype of the features, to which the logits are rounded, too.
        targets: the next ids, the nearest first. A negative one is missing, and costs nothing.
        weights: one per target of a token, not all of them zero.
        cap: bounds the logits, by at most 40: so exp(logit - bound) neither overflows nor
            vanishes, and the usual pass over V for the maximum is saved.
        kernel: "pallas" reads the logits once per step instead of twice, on NVIDIA GPUs; other
            devices, and losses that are not differentiated, use XLA.
        fp8: whether to multiply 8-bit floats; see nanogpt/model/kernels/fp8.py.

    Raises:
        ValueError: there are not K weights.
    """
    *shape, K = targets.shape
    if len(weights) != K:
        raise ValueError(f"weights must be {K} numbers, one per target of a token, not {weights}.")
    given = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    total = given.sum()
    run = in_parts(_objective_and_loss) if kernel == "pallas" and fp8 else _objective_and_loss
    features, targets = features.reshape(-1, len(head)), targets.reshape(-1, K)
    objective, loss = run(features, head, targets, given / total, cap, fp8, kernel)
    return total * objective.reshape(shape), loss.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _objective_and_loss(features, head, targets, weights, cap, fp8, kernel):
    """Both [BT], of features [BT, D], targets [BT, K] and weights [K] that add up to 1."""
    return _forward(features, head, targets, weights, cap, fp8, "xla")[0]


def _forward(features, head, targets, weights, cap, fp8, kernel):
    if fp8:
        logits = fp8_logits(features, head)
    else:
        logits = _product("td,dv->tv", features, head, features.dtype)
    if kernel == "pallas":
        one, two = (partial(passes, cap=cap, fp8=fp8) for passes in (one_pass, _two_passes))
        losses, kept = jax.lax.platform_dependent(logits, targets, weights, cuda=one, default=two)
        offset = None  # for what is kept is dlogits already
    else:
        kept, (losses, offset) = logits, _losses_and_offset(logits, targets, weights, cap)
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
    """Told its dtype rather than cast: some of XLA's choices for a product cannot cast."""
    return jnp.einsum(formula, a, b, preferred_element_type=dtype)


def _two_passes(logits, targets, weights, cap, fp8):
    """What the kernel computes, where there is no kernel."""
    losses, offset = _losses_and_offset(logits, targets, weights, cap)
    return losses, _dlogits(logits, offset, targets, weights, cap, fp8)


def _losses_and_offset(logits, targets, weights, cap):
    """Losses [BT, K], and offsets [BT] by which exp(capped logits - offset) is weight * p."""
    sums = jnp.sum(jnp.exp(softcap(logits, cap) - cap.bound), axis=-1)
    log_normalizer = cap.bound + jnp.log(sums)
    # Only the targets' logits are gathered. A second reduction over V would make the compiler keep
    # what it shares with the first, the capped logits, in float32.
    target_logits = jnp.take_along_axis(logits, jnp.maximum(targets, 0), axis=-1)
    losses = jnp.where(targets >= 0, log_normalizer[:, None] - softcap(target_logits, cap), 0.0)
    # The weight of the targets that are there; its log is -inf if none is, and exp makes p zero.
    weight = sum(w * (target >= 0) for target, w in zip(targets.T, weights, strict=True))
    return losses, log_normalizer - jnp.log(weight)


def _dlogits(logits, offset, targets, weights, cap, fp8):
    """The gradient of the objective with respect to the logits, but for g."""
    # The barrier makes XLA compute tanh again from the logits instead of storing it in float32.
    tanh = softcap_tanh(jax.lax.optimization_barrier(logits), cap)
    gradient = jnp.exp(cap.bound * tanh - offset[:, None])
    for target, weight in zip(targets.T, weights, strict=True):
        # By comparison: that fuses into the same pass, as a scatter would not.
        gradient -= weight * (jnp.arange(logits.shape[1]) == target[:, None])
    gradient *= 1.0 - tanh * tanh
    return to_e5m2(gradient) if fp8 else gradient.astype(logits.dtype)
