"""Muon, compared with the papers' formulas in NumPy, and with singular value decompositions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from nanogpt.devices.mesh import REPLICATED, make_mesh
from nanogpt.optim.muon import POLAR_EXPRESS, SAFETY, orthogonalize, scale_by_muon

SHAPES = {"qkv": (5, 3, 16, 16), "out": (5, 16, 16), "up": (5, 16, 40), "down": (5, 40, 16)}
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5  # Muon's former method: one quintic, five times


def gradients_at(step, scale=1.0):
    """Return random gradients in which some rows and columns are much larger than others."""
    rng = np.random.default_rng(step)
    uneven = {
        name: rng.standard_normal(shape) * np.geomspace(0.3, 3, shape[-1])
        for name, shape in SHAPES.items()
    }
    return {name: (scale * gradient).astype("f4") for name, gradient in uneven.items()}


def composed(polynomials, s):
    """Return a singular value after a sequence of odd quintics."""
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return s


def orthogonalized(matrices):
    """Keep the singular vectors, and apply the published polynomials to the singular values."""
    u, s, vt = np.linalg.svd(np.asarray(matrices, "f8"), full_matrices=False)
    s = composed(POLAR_EXPRESS, s / (1.02 * np.linalg.norm(s, axis=-1, keepdims=True)))
    return u * s[..., None, :] @ vt


def matrix_with(singular_values, I, O):  # noqa: E741
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (I, O))
    S = np.zeros((I, O))
    np.fill_diagonal(S, singular_values)
    return u @ S @ v.T


# Orthogonalization


def nearest_quintic(low, high):
    """Return a, b, c of the odd quintic with the smallest maximum distance from one on [low, high].

    It deviates equally at both ends and at its two extrema, with alternating signs (Remez).
    """
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(50):
        s = np.array([low, *inner, high])
        equations = np.stack([s, s**3, s**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(equations, np.ones(4))
        inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a])))
    return np.array([a, b, c])


def test_each_polynomial_is_the_best_for_what_the_one_before_it_left():
    low, high, derived = 1e-3, 1.0, []
    for step in range(5):
        # The paper's cushion: very small singular values are not raised at the expense of others,
        # but the remaining range of the polynomial is centred on one again.
        quintic = nearest_quintic(max(low, 0.02 * high), high)
        quintic *= 2 / (composed([quintic], low) + composed([quintic], high))
        if step < 4:  # p(s / 1.02): its safety factor
            quintic /= 1.02 ** np.array([1, 3, 5])
        derived.append(quintic)
        low = composed([quintic], low)
        high = 2 - low
    np.testing.assert_allclose(derived, POLAR_EXPRESS, rtol=1e-9)


def test_singular_values_from_a_thousandth_come_nearer_to_one_than_by_jordans_quintic():
    s = np.geomspace(1e-3, 1, 100_001)
    ours, jordans = composed(POLAR_EXPRESS, s / SAFETY), composed(JORDAN, s)
    assert ours.min() > 0.84 and ours.max() < 1.15
    assert jordans.min() < 0.5 and jordans.max() > 1.2


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((16, 16), 0.1), ((16, 40), 1e3), ((2, 3, 40, 16), 1.0), ((4, 1, 7), 1.0), ((9, 1), 1.0)],
)
def test_singular_vectors_stay_and_singular_values_follow_the_published_polynomials(shape, scale):
    x = scale * np.random.default_rng(0).standard_normal(shape, "f4")
    np.testing.assert_allclose(jax.jit(orthogonalize)(x), orthogonalized(x), atol=1e-3)


@pytest.mark.parametrize(("I", "O"), [(24, 24), (24, 60), (60, 24)])
def test_a_matrix_comes_near_the_orthogonal_factor_of_its_decomposition(I, O):  # noqa: E741
    x = matrix_with(np.geomspace(0.02, 1.0, 24), I, O).astype("f4")
    u, _, vt = np.linalg.svd(x.astype("f8"), full_matrices=False)
    rest = np.linalg.svd(jax.jit(orthogonalize)(x) - u @ vt, compute_uv=False)
    assert rest.max() < 0.15


def test_zero_stays_zero():
    np.testing.assert_array_equal(jax.jit(orthogonalize)(np.zeros((2, 8, 8), "f4")), 0)


def test_bfloat16_comes_close_to_float32():
    x = np.random.default_rng(0).standard_normal((6, 32, 48)).astype("f4")
    exact, rough = jax.jit(lambda x: (orthogonalize(x), orthogonalize(x, jnp.bfloat16)))(x)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-2 < error < 0.1  # twenty roundings of 0.4%, but not zero


# Momentum and neurons


muon = scale_by_muon(neuron_decay=0.9)
init, update = jax.jit(muon.init), jax.jit(muon.update)  # one program for all momenta


def normalized_by_neuron(update, mean_square):
    """Return a matrix after NorMuon, neuron by neuron; updates the list `mean_square` in place."""
    rows, columns = update.shape
    neurons = list(update) if rows > columns else list(update.T)
    for j, neuron in enumerate(neurons):
        mean_square[j] = 0.9 * mean_square[j] + 0.1 * np.mean(neuron**2)
        neurons[j] = neuron / np.sqrt(mean_square[j])
    result = np.array(neurons) if rows > columns else np.array(neurons).T
    return result * np.linalg.norm(update) / np.linalg.norm(result)


def test_updates_are_nesterovs_momentum_orthogonalized_and_normalized_by_neuron():
    decays = [0.5, 0.6, 0.9, 0.9]
    state = init(gradients_at(0))
    mean = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    neurons = {name: np.zeros((*shape[:-2], max(shape[-2:]))) for name, shape in SHAPES.items()}
    for step, decay in enumerate(decays):
        gradients = gradients_at(step)
        updates, state = update(gradients, state, momentum=decay)
        for name, (*stack, _, _) in SHAPES.items():
            gradient = gradients[name].astype("f8")
            mean[name] = decay * mean[name] + (1 - decay) * gradient
            expected = orthogonalized(decay * mean[name] + (1 - decay) * gradient)
            for index in np.ndindex(*stack):
                expected[index] = normalized_by_neuron(expected[index], neurons[name][index])
            np.testing.assert_allclose(updates[name], expected, atol=3e-3, err_msg=name)
            np.testing.assert_allclose(state.momentum[name], mean[name], atol=1e-6, err_msg=name)
    assert update._cache_size() == 1


def test_without_a_gradient_nothing_moves_and_the_first_one_moves_by_the_usual_norm():
    state = init(gradients_at(0))
    # Training starts like this before projections that are initially zero.
    zeros = jax.tree.map(np.zeros_like, gradients_at(0))
    for _ in range(2):
        updates, state = update(zeros, state, momentum=0.9)
        for name in SHAPES:
            np.testing.assert_array_equal(updates[name], 0, err_msg=name)

    updates, _ = update(gradients_at(0), state, momentum=0.9)
    for name in SHAPES:
        alone = orthogonalized(gradients_at(0)[name])
        norms = (np.linalg.norm(x, axis=(-2, -1)) for x in (updates[name], alone))
        np.testing.assert_allclose(*norms, rtol=2e-3, err_msg=name)


def test_a_neuron_without_a_gradient_stays_and_the_others_move():
    gradients = gradients_at(0)
    gradients["up"][..., 7] = 0  # an output
    gradients["down"][..., 7, :] = 0  # an input
    updates, _ = update(gradients, init(gradients), momentum=0.9)
    for neurons in (np.asarray(updates["up"]).mT, np.asarray(updates["down"])):
        sizes = np.linalg.norm(neurons, axis=-1)
        np.testing.assert_allclose(sizes[:, 7], 0, atol=1e-3)
        # After the first step all are of the same size.
        np.testing.assert_allclose(np.delete(sizes, 7, axis=1), sizes[:, :1] * np.ones(39), 1e-3)


# Sharing over devices


@pytest.mark.parametrize(
    ("devices", "dtype", "head_groups"), [(3, "float32", 4), (8, "bfloat16", 1)]
)
def test_devices_share_the_work_and_give_the_updates_of_one_to_the_bit(dtype, devices, head_groups):
    def run(mesh):
        muon = scale_by_muon(head_groups=head_groups, dtype=jnp.dtype(dtype), mesh=mesh)
        everywhere = NamedSharding(mesh or make_mesh(1), REPLICATED)
        update = jax.jit(muon.update)
        state = jax.jit(muon.init, out_shardings=everywhere)(gradients_at(0))
        for step in range(2):
            gradients = jax.device_put(gradients_at(step), everywhere)
            updates, state = update(gradients, state, momentum=0.9)
        return updates, state

    alone, shared = run(None), run(make_mesh(devices))
    jax.tree.map(np.testing.assert_array_equal, shared, alone)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(shared))


def test_each_of_eight_devices_has_an_eighth_of_the_groups():
    muon = scale_by_muon(mesh=make_mesh(8))
    stack = {"qkv": jax.ShapeDtypeStruct((96, 24, 24), jnp.float32)}
    state = jax.eval_shape(muon.init, stack)
    program = jax.jit(muon.update).lower(stack, state, momentum=0.9).compile().as_text()
    # 96 matrices are 12 groups of 8: at most two per device, in one loop of two iterations.
    assert "f32[2,8,24,24]" in program
    assert '"known_trip_count":{"n":"2"}' in program


def test_what_devices_gather_does_not_grow_with_their_number():
    muon = scale_by_muon(mesh=make_mesh(8))
    stack = {"qkv": jax.ShapeDtypeStruct((20, 24, 24), jnp.float32)}
    state = jax.eval_shape(muon.init, stack)
    program = jax.jit(muon.update).lower(stack, state, momentum=0.9).compile().as_text()
    # 20 matrices are 3 groups of 8: four devices compute and gather four, and four do the same.
    (gathered,) = re.findall(r"= f32\[(\d+),8,24,24\]\S* all-gather\(", program)
    assert int(gathered) == 4
    assert "replica_groups={{0,1,2,3},{4,5,6,7}}" in program or "[2,4]<=[8]" in program
