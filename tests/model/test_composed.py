"""Composed heads, compared with a loop over tokens and heads in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.model.composed import shared_nearby

SCALE = 0.4
jitted = jax.jit(shared_nearby, static_argnums=(4, 5))


def some(B, T, N, H):
    """Return q, k and v, and the weights given and taken."""
    rng = np.random.default_rng(0)
    return *rng.standard_normal((3, B, T, N, H), "f4"), *rng.standard_normal((2, B, T, N), "f4")


def added_by_others(q, k, v, documents, window, given, taken):
    """Return what each head adds: head by head, with the weights of a softmax over what it sees."""
    q, k, v, given, taken = (np.asarray(x, "f8") for x in (q, k, v, given, taken))
    given = given / np.sqrt(np.mean(given**2, axis=-1, keepdims=True) + 1e-6)
    added = np.zeros_like(v)
    for b, t, h in np.ndindex(*v.shape[:3]):
        seen = [
            s for s in range(max(0, t - window + 1), t + 1) if documents[b, s] == documents[b, t]
        ]
        for g in range(v.shape[2]):
            scores = np.exp([SCALE * q[b, t, g] @ k[b, s, g] for s in seen])
            mean = scores / scores.sum() @ v[b, seen, h]
            added[b, t, h] += taken[b, t, h] * given[b, t, g] * mean
    return added


@pytest.mark.parametrize(("T", "window"), [(37, 7), (16, 1), (5, 112), (33, 33)])
def test_a_head_adds_its_values_where_each_head_attends(T, window):
    q, k, v, given, taken = some(2, T, 3, 4)
    documents = np.cumsum(np.random.default_rng(1).random((2, T)) < 0.1, axis=1)
    found = jitted(q, k, v, documents, window, SCALE, given, taken)
    expected = added_by_others(q, k, v, documents, window, given, taken)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_only_the_ratios_of_the_weights_given_count():
    q, k, v, given, taken = some(2, 37, 3, 4)
    documents = np.zeros((2, 37), int)
    one, other = (jitted(q, k, v, documents, 7, SCALE, factor * given, taken) for factor in (1, 50))
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_weights_are_summed_in_float32():
    arrays = some(1, 64, 4, 8)
    documents = np.zeros((1, 64), int)
    q, k, v, given, taken = (jnp.asarray(x, "bfloat16") for x in arrays)
    # Not as one program, in which XLA may leave out roundings.
    found = shared_nearby(q, k, v, documents, 16, SCALE, given, taken)
    assert found.dtype == "bfloat16"
    expected = added_by_others(q, k, v, documents, 16, given, taken)
    error = np.linalg.norm(np.asarray(found, "f8") - expected) / np.linalg.norm(expected)
    assert error < 0.006  # three roundings to 8 bits, of 0.2% each on average


def test_no_scores_are_kept_for_the_backward_pass():
    q, k, v, given, taken = some(1, 64, 3, 4)
    documents = np.zeros((1, 64), int)

    def pullback(*arrays):
        def added(q, k, v, given, taken):
            return shared_nearby(q, k, v, documents, 16, SCALE, given, taken)

        return jax.vjp(added, *arrays)[1]

    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(pullback, q, k, v, given, taken))]
    assert max(np.prod(shape) for shape in shapes) == q.size  # scores would be 32 for each query
