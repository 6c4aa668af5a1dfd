"""Rotary positions, compared with complex numbers and with YaRN written out pair by pair."""

from itertools import pairwise
from math import log, pi

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.config import GPTConfig
from nanogpt.model.rotary import rotary, rotation, turned


def model(H=16, **how):
    return GPTConfig(num_heads=2, width=2 * H, **how)


# Speeds


def test_half_of_the_pairs_turn_the_fastest_by_one_radian_per_token_and_the_rest_stand_still():
    speed, scale = rotation(model(rope_base=1000.0, attention_scale=0.12))
    np.testing.assert_allclose(speed, [1, 0.1, 0.01, 0.001, 0, 0, 0, 0], rtol=1e-12)
    assert scale == 0.12


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, [0] * 8),
        (0.125, [1] + [0] * 7),
        (0.375, [1, 1 / 20, 1 / 400] + [0] * 5),
        (1.0, 400 ** -(np.arange(8) / 7)),
    ],
)
def test_a_fraction_of_the_pairs_turns(fraction, expected):
    speed, _ = rotation(model(rope_base=400.0, rope_fraction=fraction))
    np.testing.assert_allclose(speed, expected, rtol=1e-12)


# Wider windows


def yarn(config, windows):
    """Return speeds and scale after these longest windows, one pair and one change at a time.

    The formulas are those of modded-nanogpt.
    """
    pairs = config.head_size // 2
    turning = round(config.rope_fraction * pairs)
    speeds = [config.rope_base ** (-i / (turning - 1)) for i in range(turning)]
    scale = config.attention_scale
    for old, new in pairwise(windows):
        for i, speed in enumerate(speeds):
            rotations = old * speed / (2 * pi)
            weight = min(max((rotations - 1) / (32 - 1), 0), 1)
            speeds[i] = speed * (old / new + weight * (1 - old / new))
        scale *= 0.2 * log(new / old) + 1
    return speeds + [0] * (pairs - turning), scale


@pytest.mark.parametrize(
    "windows", [(384, 896), (384, 896, 1408, 2048), (128, 768, 512), (8, 24), (4096, 4097)]
)
def test_rotations_and_scale_follow_the_longest_window_from_stage_to_stage(windows):
    config = model(H=32, rotary_windows=windows)
    speed, scale = rotation(config)
    expected_speed, expected_scale = yarn(config, windows)
    np.testing.assert_allclose(speed, expected_speed, rtol=1e-12)
    assert scale == pytest.approx(expected_scale, rel=1e-12)
    assert (speed != rotation(model(H=32))[0]).any()


@pytest.mark.parametrize(
    ("turns", "factor"), [(40, 1), (32, 1), (24.25, 0.875), (16.5, 0.75), (1, 0.5), (0.01, 0.5)]
)
def test_a_window_twice_as_long_halves_the_speed_of_what_turned_less_than_once(turns, factor):
    # Two pairs rotate, one by a radian per token, one by 1 / base: this often in a window of 256.
    base = 256 / (2 * pi * turns)
    speed, scale = rotation(model(rotary_windows=(256, 512), rope_base=base, rope_fraction=2 / 8))
    np.testing.assert_allclose(speed, [1, factor / base, 0, 0, 0, 0, 0, 0], rtol=1e-12)
    assert scale == pytest.approx(0.12 * 1.138629436, rel=1e-9)  # 1 + 0.2 ln 2


@pytest.mark.parametrize("rotary_windows", [(300,), (300, 300, 300)])
def test_windows_that_stay_as_long_change_neither_rotations_nor_scale(rotary_windows):
    plain, stayed = model(), model(rotary_windows=rotary_windows)
    np.testing.assert_allclose(rotation(stayed)[0], rotation(plain)[0], rtol=1e-15)
    assert rotation(stayed)[1] == rotation(plain)[1]


def test_the_windows_in_use_do_not_change_rotations():
    # A model can be used with longer windows than in training.
    trained, used = (
        model(windows=windows, rotary_windows=(128, 256)) for windows in ((256,), (512, 0))
    )
    np.testing.assert_array_equal(rotation(used)[0], rotation(trained)[0])
    assert rotation(used)[1] == rotation(trained)[1]


# The rotation itself


def rotated(x, speed, tpu=False):
    """Return x with all of its positions rotated, one by one."""
    T = x.shape[1]
    angles = jax.jit(lambda: turned(jnp.arange(T)[None], T, speed)[:, :, None])
    return np.asarray(jax.jit(lambda x: rotary(x, angles(), tpu))(x))


@pytest.mark.parametrize("count", [1, 200, 256, 257, 70_000, 2**31])
def test_angles_are_those_of_a_product_in_float64_however_far_the_place_is(count):
    speed = np.array([1.0, 0.3, 0.0002, 0])
    places = np.unique(np.linspace(0, count - 1, 50).astype(int))
    found = jax.jit(lambda places: turned(places, count, speed))(np.array([places, places[::-1]]))
    assert found.dtype == "float32"
    expected = np.exp(1j * places[:, None] * speed)
    np.testing.assert_allclose(np.exp(1j * np.asarray(found[0], "f8")), expected, atol=5e-6)
    np.testing.assert_array_equal(found[1], found[0, ::-1])


@pytest.mark.parametrize("tpu", [False, True])
def test_rotary_multiplies_pairs_as_complex_numbers_with_those_of_the_unit_circle(tpu):
    H, T, speed = 16, 9, np.array([1.0, 0.3, 0.07, 0.002, 0, 0, 0, 0])
    x = np.random.default_rng(0).standard_normal((2, T, 3, H)).astype("f4")
    turned = rotated(x, speed, tpu)
    assert turned.dtype == np.float32
    z, found = (a[..., : H // 2] + 1j * a[..., H // 2 :] for a in (x.astype("f8"), turned))
    circle = np.exp(-1j * np.outer(np.arange(T), speed))[:, None]
    np.testing.assert_allclose(found, z * circle, atol=1e-6)
    np.testing.assert_array_equal(found[..., 4:], z[..., 4:])  # unrotated ones: bit for bit
    np.testing.assert_array_equal(found[:, 0], z[:, 0])


@pytest.mark.parametrize("tpu", [False, True])
def test_heads_have_the_places_of_a_token_in_turn(tpu):
    x = np.random.default_rng(0).standard_normal((1, 5, 6, 8)).astype("f4")
    angle = np.outer(np.arange(10), [1.0, 0.3, 0.07, 0.0]).reshape(1, 5, 2, 4).astype("f4")
    turned = jax.jit(rotary, static_argnums=2)(x, angle, tpu)
    z, found = (a[..., :4] + 1j * a[..., 4:] for a in (x, np.asarray(turned)))
    for head in range(6):
        expected = z[:, :, head] * np.exp(-1j * angle[:, :, head % 2])
        np.testing.assert_allclose(found[:, :, head], expected, atol=1e-6)


def test_positions_are_exact_far_into_a_row_though_the_model_computes_in_bfloat16():
    # Angles must not be rounded: at position 4095 those in bfloat16 would be off by up to 16.
    T, speed = 4096, np.array([1.0, 0.01])
    x = np.tile(np.array([1, 1, 0, 0], "bfloat16"), (1, T, 1, 1))
    turned = rotated(x, speed)[0, :, 0].astype("float32")
    angle = np.outer(np.arange(T), speed)
    np.testing.assert_allclose(turned, np.hstack([np.cos(angle), -np.sin(angle)]), atol=0.01)


def test_a_score_depends_on_the_distance_of_query_and_key_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 16)).astype("f4")
    speed, _ = rotation(model(rope_base=50.0))
    both = np.tile(np.stack([q, k]), (1, 12, 1, 1))
    turned_q, turned_k = rotated(both, speed)[0].swapaxes(0, 1)
    scores = turned_q @ turned_k.T
    for distance in range(-11, 12):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.ptp(scores[0]) > 0.5  # and it does depend on the distance
