"""Cross-entropy, held against float64 NumPy: the gradient against its finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.loss import cross_entropy, softcap

CAP = 6.0
V = 37


def numpy_losses(logits, targets, cap):
    capped = cap * np.tanh(np.asarray(logits, "f8") / cap)
    log_p = capped - np.log(np.exp(capped).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return np.where(targets < 0, 0.0, -chosen)


def numpy_gradient(logits, targets, cap, h=1e-5):
    """Of each token's loss by its own logits; tokens do not mix, so one id moves for all."""
    logits = np.asarray(logits, "f8")
    steps = h * np.eye(logits.shape[-1])
    rise = [
        numpy_losses(logits + step, targets, cap) - numpy_losses(logits - step, targets, cap)
        for step in steps
    ]
    return np.stack(rise, axis=-1) / (2 * h)


def some_logits(dtype, spread):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(spread * rng.standard_normal((3, 5, V)), dtype)
    targets = rng.integers(0, V, (3, 5))
    targets[0, 0] = 0  # the first id is an id, not a sign of absence
    targets[1, 2] = targets[2, 4] = -1
    targets[2, 0] = -100
    return logits, targets


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize(("cap", "spread"), [(CAP, 1.0), (CAP, 1000.0), (40.0, 20.0)])
def test_losses_and_gradients_equal_float64_and_its_finite_differences(
    cap, dtype, rounding, spread
):
    logits, targets = some_logits(dtype, spread)
    weights = np.random.default_rng(1).uniform(0.5, 2.0, targets.shape).astype("f4")

    @jax.jit
    def run(logits):
        losses, pullback = jax.vjp(lambda logits: cross_entropy(logits, targets, cap), logits)
        return losses, *pullback(jnp.asarray(weights))

    losses, gradient = run(logits)

    assert (losses.dtype, gradient.dtype) == (jnp.float32, logits.dtype)
    # bfloat16 rounds the logits given, and the gradient returned, but nothing on the way.
    np.testing.assert_allclose(losses, numpy_losses(logits, targets, cap), rtol=1e-5, atol=1e-5)
    expected = weights[..., None] * numpy_gradient(logits, targets, cap)
    np.testing.assert_allclose(np.asarray(gradient, "f8"), expected, rtol=rounding, atol=3e-6)


def test_a_token_without_a_target_costs_nothing_and_teaches_nothing():
    logits, targets = some_logits("float32", 3.0)
    losses = cross_entropy(logits, targets, CAP)
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets, CAP).sum())(logits)
    without = targets < 0
    assert without.sum() == 3
    assert not np.any(losses[without]) and not np.any(gradient[without])
    assert np.all(losses[~without]) and np.all(jnp.any(gradient[~without], axis=-1))


def test_softcap_bounds_logits_and_leaves_small_ones_alone():
    logits = jnp.asarray([-1e9, -0.01, 0.0, 0.01, 6.0, 1e9], "bfloat16")
    capped = softcap(logits, CAP)
    assert capped.dtype == jnp.float32
    exact = CAP * np.tanh(np.asarray(logits, "f8") / CAP)
    np.testing.assert_allclose(capped, exact, rtol=1e-6)
    np.testing.assert_allclose(capped[jnp.array([0, -1])], [-CAP, CAP])


def kept_for_the_backward_pass(loss):
    """Shapes and dtypes of what the forward pass hands to the backward pass of a small head."""
    hidden = jnp.ones((64, 16), "bfloat16")
    head = jnp.ones((16, 256), "bfloat16")
    targets = jnp.arange(64)
    _, pullback = jax.vjp(lambda hidden, head: loss(hidden @ head, targets), hidden, head)
    return {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pullback)}


def test_no_float32_copy_of_the_logits_is_kept_for_the_backward_pass():
    ours = kept_for_the_backward_pass(lambda logits, targets: cross_entropy(logits, targets, CAP))
    assert ("bfloat16", (64, 256)) in ours
    assert not any(dtype == "float32" and np.prod(shape) >= 64 * 256 for dtype, shape in ours)

    # The plain way does keep one: this test can see it.
    def plain(logits, targets):
        log_p = jax.nn.log_softmax(softcap(logits, CAP))
        return -jnp.take_along_axis(log_p, targets[:, None], axis=-1)

    assert ("float32", (64, 256)) in kept_for_the_backward_pass(plain)
