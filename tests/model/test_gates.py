"""Gates, compared with their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.model.gates import Smear, opened, value_share

B, T, D, N = 2, 5, 20, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def fixed(*shape, seed=0):
    """Return numbers near one, of both signs, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "f4")


def channels_read(function, *inputs):
    """Return which channels of each input [B, T, C] the result depends on.

    Each token may depend on its own channels only.
    """
    every = range(len(inputs))
    read = []
    jacobians = jax.jit(jax.jacobian(lambda *x: function(*x)[:, :, :, 0], every))
    for jacobian in jacobians(*inputs):
        by_token = np.abs(jacobian).max(axis=2).reshape(B * T, B * T, -1)
        own = np.eye(B * T, dtype=bool)
        assert not by_token[~own].any()
        each = by_token[own] != 0
        assert (each == each[0]).all()
        read.append(np.flatnonzero(each[0]).tolist())
    return read


def test_a_gate_opens_with_the_sigmoid_of_its_channels_in_each_head():
    x, gate = fixed(B, T, D), fixed(12, N, seed=1)
    found = jax.jit(opened)(x, gate)
    expected = sigmoid(np.asarray(x, "f8")[:, :, :12] @ gate)
    assert expected.min() < 0.05 and expected.max() > 0.95
    np.testing.assert_allclose(found, expected[..., None], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_weights_of_zero_every_gate_is_half_open_and_that_of_a_value_is_one(dtype):
    x, values = (fixed(B, T, D, seed=seed).astype(dtype) for seed in (0, 1))
    zero, share = jnp.zeros((12, N), dtype), jax.jit(value_share, static_argnums=3)
    each = jax.jit(opened)(x, zero), *(share(x, values, zero, read) for read in (True, False))
    for found, value in zip(each, (0.5, 1, 1), strict=True):
        assert found.dtype == dtype
        assert (np.asarray(found, "f4") == value).all()


def test_each_gate_reads_only_its_channels():
    x, values, gate = fixed(B, T, D), fixed(B, T, D, seed=1), fixed(12, N, seed=2)
    dozen, half = [*range(12)], [*range(6)]
    assert channels_read(lambda x: opened(x, gate), x) == [dozen]
    assert channels_read(lambda x: opened(x, gate[:7]), x) == [[*range(7)]]
    for read_values, channels in ((False, [dozen, []]), (True, [half, half])):
        found = channels_read(lambda *x, r=read_values: value_share(*x, gate, r), x, values)
        assert found == channels


@pytest.mark.parametrize("read_values", [True, False])
def test_the_share_of_a_value_is_twice_its_gate_which_may_read_half_of_it(read_values):
    x, values, gate = fixed(B, T, D), fixed(B, T, D, seed=1), fixed(12, N, seed=2)
    found = jax.jit(value_share, static_argnums=3)(x, values, gate, read_values)
    expected = np.zeros((B, T, N, 1))
    for b, t, n in np.ndindex(B, T, N):
        read = [*x[b, t, :6], *values[b, t, :6]] if read_values else x[b, t, :12]
        expected[b, t, n] = 2 * sigmoid(np.dot(np.array(read, "f8"), gate[:, n]))
    assert expected.min() < 0.1 and expected.max() > 1.9
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_smear_adds_a_gated_share_of_the_token_before():
    smear, x = nnx.eval_shape(Smear), np.asarray(fixed(2, 5, 16))
    gate, share = fixed(12, 1, seed=1), 0.6
    smear.gate, smear.share = nnx.Param(gate), nnx.Param(jnp.float32(share))
    expected = np.array(x, "f8")
    for b, t in np.ndindex(2, 5):
        opened = sigmoid(np.dot(np.asarray(x[b, t, :12], "f8"), gate[:, 0]))
        assert 0.01 < opened < 0.99
        expected[b, t] += share * opened * (x[b, t - 1] if t else 0)
    before = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    found = jax.jit(lambda *given: smear(*given))(x, before)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_new_smear_adds_nothing():
    x, before = fixed(B, T, D), fixed(B, T, D, seed=1)
    found = jax.jit(lambda *given: Smear()(*given))(x, before)
    np.testing.assert_array_equal(found, x)
