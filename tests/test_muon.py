"""Muon, held against Optax's own, against singular value decompositions, and against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from nanogpt.mesh import REPLICATED, make_mesh
from nanogpt.muon import orthogonalize, scale_by_muon

SHAPES = {"qkv": (5, 3, 16, 16), "out": (5, 16, 16), "up": (5, 16, 40), "down": (5, 40, 16)}


def gradients_at(step, scale=1.0):
    rng = np.random.default_rng(step)
    return {name: scale * rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}


def published_polynomial(s):
    """Where Newton-Schulz takes a singular value: Jordan's quintic, five times over."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def orthogonalized(matrices):
    """The same singular vectors, and the singular values through the published polynomial."""
    u, s, vt = np.linalg.svd(np.asarray(matrices, "f8"), full_matrices=False)
    s = published_polynomial(s / np.linalg.norm(s, axis=-1, keepdims=True))
    return u * s[..., None, :] @ vt


def matrix_with(singular_values, I, O):  # noqa: E741
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (I, O))
    S = np.zeros((I, O))
    np.fill_diagonal(S, singular_values)
    return u @ S @ v.T


# Orthogonalisation


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((16, 16), 1e-3), ((16, 40), 1e3), ((2, 3, 40, 16), 1.0), ((4, 1, 7), 1.0), ((9, 1), 1.0)],
)
def test_singular_vectors_stay_and_singular_values_follow_the_published_polynomial(shape, scale):
    x = scale * np.random.default_rng(0).standard_normal(shape, "f4")
    np.testing.assert_allclose(jax.jit(orthogonalize)(x), orthogonalized(x), atol=2e-4)


@pytest.mark.parametrize(("I", "O"), [(24, 24), (24, 60), (60, 24)])
def test_singular_values_of_a_well_conditioned_matrix_come_near_one(I, O):  # noqa: E741
    x = matrix_with(np.linspace(1.0, 10.0, 24), I, O).astype("f4")
    s = np.linalg.svd(jax.jit(orthogonalize)(x), compute_uv=False)
    assert s.min() > 0.68 and s.max() < 1.14


def test_zero_stays_zero():
    np.testing.assert_array_equal(orthogonalize(jnp.zeros((2, 8, 8))), 0)


def test_bfloat16_comes_close_to_float32():
    x = np.random.default_rng(0).standard_normal((6, 32, 48)).astype("f4")
    exact, rough = jax.jit(lambda x: (orthogonalize(x), orthogonalize(x, jnp.bfloat16)))(x)
    assert rough.dtype == jnp.float32
    error = jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)
    assert 1e-2 < error < 0.1  # twenty roundings of 0.4 %, and not none


# Momentum


def test_momentum_is_nesterovs_and_its_decay_follows_the_schedule():
    decays = [0.5, 0.6, 0.9, 0.9]
    muon = scale_by_muon(lambda count: jnp.array(decays)[count])
    params = gradients_at(99)
    state, update = muon.init(params), jax.jit(muon.update)
    mean = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step, decay in enumerate(decays):
        gradients = gradients_at(step)
        updates, state = update(gradients, state)
        for name, (*_, inputs, outputs) in SHAPES.items():
            gradient = gradients[name].astype("f8")
            mean[name] = decay * mean[name] + (1 - decay) * gradient
            ahead = decay * mean[name] + (1 - decay) * gradient
            expected = max(1, outputs / inputs) ** 0.5 * orthogonalized(ahead)
            np.testing.assert_allclose(updates[name], expected, atol=5e-4, err_msg=name)
            np.testing.assert_allclose(state.momentum[name], mean[name], atol=1e-6, err_msg=name)
        assert state.count == step + 1


def test_the_first_and_the_late_updates_equal_those_of_optax():
    # Optax corrects its momentum for its start from zero. That cancels in the first update, whose
    # scale Newton-Schulz takes out, and has died away when 0.5**40 has.
    last_two = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    theirs = optax.contrib.muon(
        learning_rate=1.0, beta=0.5, muon_weight_dimension_numbers=dict.fromkeys(SHAPES, last_two)
    )
    ours = optax.chain(scale_by_muon(lambda count: 0.5), optax.scale(-1.0))
    params = gradients_at(99)

    def updates_of(muon):
        update, state = jax.jit(muon.update), muon.init(params)
        for step in range(40):
            updates, state = update(gradients_at(step), state, params)
            if step in (0, 39):
                yield updates

    for found, expected in zip(updates_of(ours), updates_of(theirs), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)


# Sharing over devices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_devices_share_the_work_and_give_the_update_of_one_to_the_bit(dtype, devices):
    mesh = make_mesh(devices)

    def run(mesh):
        muon = scale_by_muon(lambda count: 0.9, jnp.dtype(dtype), mesh)
        gradients = jax.device_put(gradients_at(0), NamedSharding(mesh or make_mesh(1), REPLICATED))
        state = jax.jit(muon.init)(gradients)
        return jax.jit(muon.update)(gradients, state)

    (alone, state_alone), (shared, state_shared) = run(None), run(mesh)
    for name in SHAPES:
        np.testing.assert_array_equal(shared[name], alone[name], err_msg=name)
        np.testing.assert_array_equal(state_shared.momentum[name], state_alone.momentum[name])
        assert shared[name].sharding.is_fully_replicated


def test_each_of_eight_devices_has_an_eighth_of_the_groups():
    muon = scale_by_muon(lambda count: 0.9, mesh=make_mesh(8))
    stack = {"qkv": jax.ShapeDtypeStruct((96, 24, 24), jnp.float32)}
    state = jax.eval_shape(muon.init, stack)
    program = jax.jit(muon.update).lower(stack, state).compile().as_text()
    # 96 matrices are 12 groups of 8: at most two for each device, in one loop of two turns.
    assert "f32[2,8,24,24]" in program
    assert '"known_trip_count":{"n":"2"}' in program
