"""Dynamic connections, compared with their formulas in NumPy, and with a model without them."""

from dataclasses import replace
from functools import partial
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config import GPTConfig
from nanogpt.model.connections import (
    Connections,
    LastLayer,
    before_head,
    initial_gates,
    mixed,
)
from nanogpt.training.step import graph_of, init_params, param_shapes
from tests.conftest import like_the_speedrun

B, T, D = 2, 3, 16
SMALL = GPTConfig(num_layers=3, num_heads=2, width=D, attention_source=0, dynamic=True, skips=())


def fixed(*shape, seed=0):
    """Return numbers near one, of both signs, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "f4")


def alive(make):
    """Return connections with random parameters, and these as float64."""
    connections = nnx.eval_shape(lambda: make(jax.random.key(0)))
    shapes = {name: getattr(connections, name).shape for name in ("up", "down", "bias")}
    params = {name: 0.5 * fixed(*shape) for name, shape in shapes.items()}
    for name, value in params.items():
        setattr(connections, name, nnx.Param(value))
    return connections, {name: np.asarray(value, "f8") for name, value in params.items()}


def weights_of(p, x):
    """Return the weights of each token: 0.1 (gelu(x up) down + bias), one array [B, T, 1] each."""
    z = np.asarray(x, "f8") @ p["up"]
    hidden = z * (1 + np.vectorize(erf)(z / 2**0.5)) / 2
    return np.moveaxis(0.1 * (hidden @ p["down"] + p["bias"]), -1, 0)[..., None]


def test_the_weights_of_a_token_are_those_of_a_small_mlp_of_its_own_stream():
    connections, p = alive(partial(Connections, D, [0.0] * 5))
    assert p["up"].shape == (D, 64)
    x, run = 2 * fixed(B, T, D, seed=1), jax.jit(lambda x: connections(x))
    found, changed = run(x), np.array(x)
    expected = weights_of(p, x)
    assert np.ptp(expected, axis=(1, 2)).min() > 0.5  # they differ between tokens
    np.testing.assert_allclose(np.moveaxis(found, -1, 0)[..., None], expected, atol=1e-5)
    # Another token has no part in them.
    changed[0, 1] += 1
    elsewhere = np.not_equal(run(changed), found)
    assert elsewhere.any(axis=-1).tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_connections_give_every_token_the_same_first_weights(dtype):
    first = [0.0, -0.5, 2.0, 1.1**0.5]
    new = nnx.jit(lambda: Connections(64, first, jax.random.key(0)))()
    up = np.asarray(new.up[...], "f8")  # uniform, at most 1 / sqrt(64)
    for name in ("up", "down", "bias"):
        setattr(new, name, nnx.Param(getattr(new, name)[...].astype(dtype)))
    found = jax.jit(lambda x: new(x))(1000 * fixed(B, T, 64).astype(dtype))
    assert (found.shape, found.dtype) == ((B, T, 4), dtype)
    rounding = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(found.astype("f4"), np.broadcast_to(first, (B, T, 4)), rtol=rounding)
    assert 0.99 < 8 * abs(up).max() <= 1
    assert up.std() == pytest.approx(3**-0.5 / 8, rel=0.03)


def test_sources_are_added_up_each_with_its_weight_for_each_token():
    weights, sources = fixed(B, T, 3), [fixed(B, T, D, seed=seed) for seed in (1, 2, 3)]
    expected = np.einsum("btn,nbtd->btd", *(np.asarray(x, "f8") for x in (weights, sources)))
    np.testing.assert_allclose(jax.jit(mixed)(weights, *sources), expected, atol=1e-5)


@pytest.mark.parametrize("with_values", [True, False])
def test_the_last_layer_weighs_its_values_its_stream_and_all_that_it_adds_to_it(with_values):
    layer, p = alive(partial(LastLayer, SMALL))
    x, x0, late, values = (fixed(B, T, D, seed=seed) for seed in range(1, 5))
    given = x, x0, late, values if with_values else None
    found, added, stream = jax.jit(lambda *given: layer.weigh(*given))(*given)
    w = weights_of(p, x)
    assert len(w) == 14
    x, x0, late, values = (np.asarray(each, "f8") for each in (x, x0, late, values))
    expected = w[0] * x0 + w[1] * late + w[2] * x
    if with_values:  # the first half of the channels has a gate, and the second another
        expected[:, :, :8] += w[6] * values[:, :, :8]
        expected[:, :, 8:] += w[7] * values[:, :, 8:]
    np.testing.assert_allclose(added, expected, atol=1e-5)
    np.testing.assert_allclose(stream, x + w[3] * x0 + w[4] * late + w[5] * x, atol=1e-5)
    names = ("stream", "embedding", "bigram", "attention", "stream_again", "mlp")
    for name, weight in zip(names, w[8:], strict=True):
        np.testing.assert_allclose(getattr(found, name), weight, atol=1e-5, err_msg=name)


def test_a_new_last_layer_weighs_all_as_the_other_layers_do_at_first():
    x, x0, late, values = (fixed(B, T, D, seed=seed) for seed in range(1, 5))
    config = replace(SMALL, residual_init=1.21)
    run = jax.jit(lambda *given: LastLayer(config, jax.random.key(0)).weigh(*given))
    weights, added, stream = run(x, x0, late, values)
    first = {"stream": 1.1, "embedding": 0, "bigram": 0.05, "attention": 1, "stream_again": 1.1}
    for name, expected in (first | {"mlp": 1}).items():
        np.testing.assert_allclose(getattr(weights, name), expected, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(added, 2 * values, rtol=1e-6)
    np.testing.assert_array_equal(stream, x)


@pytest.mark.parametrize(
    ("how", "sources"),
    [
        ({}, 3),
        ({"value_embeddings": 2, "value_layers": (0, 1)}, 4),  # only the first table is one
        ({"skips": ((0, 1), (0, 2))}, 5),
        ({"skips": None}, 4),  # from layer 0 to 2
        ({"skips": ((0, 1),), "value_embeddings": 1, "value_layers": (2,)}, 5),
    ],
)
def test_before_the_head_half_of_what_late_attentions_read_is_taken_back_at_first(how, sources):
    config = replace(SMALL, **({"value_embeddings": 0} | how))
    config.check()
    found = before_head(config, jax.random.key(0))(fixed(B, T, D))
    expected = [0.0, -0.5] + [0.0] * (sources - 2)
    np.testing.assert_allclose(found, np.broadcast_to(expected, (B, T, sources)), rtol=1e-6)


@pytest.mark.parametrize("source", [0, 4])
def test_new_connections_change_nothing_in_a_model_but_take_back_half_of_what_was_read(source):
    config = replace(like_the_speedrun(), attention_source=source, gated=())
    config.check()
    connections = jax.jit(lambda key: init_params(config, key)["dynamic"])(jax.random.key(0))
    random = np.random.default_rng(0)
    shapes = {name: of for name, of in param_shapes(config).items() if name != "dynamic"}
    others = jax.tree.map(lambda p: 0.3 * random.standard_normal(p.shape).astype("f4"), shapes)
    tokens = jnp.asarray(random.integers(0, 100, (2, 7)))

    def features(config):
        return jax.jit(lambda params: nnx.merge(graph_of(config), params).features(tokens))

    # Without them, the last layer has shares of its own, here those that they begin with, and the
    # gates of its value embedding, half open, give all of it instead of twice as much. All layers
    # have shares of the embeddings. The skip's gate, half open, gives twice as much.
    plain = others | {"backout": np.float32(0.5)}
    for name, its in {
        "residual_shares": [1.1**0.5] * 2,
        "output_shares": [1.0, 1.0],
        "value_gate": np.zeros((12, 2)),
    }.items():
        plain[name] = np.concatenate([others[name], np.float32([its])])
    plain["embedding_shares"], plain["bigram_shares"] = np.zeros(6, "f4"), np.full(6, 0.05, "f4")
    plain["value_embed"] = others["value_embed"] * np.float32([1, 1, 2])[:, None, None]
    half = 0.5 / (1 + np.exp(-others["skips"]))
    plain["skips"], plain["skip_gate"] = np.log(half / (1 - half)), np.zeros((1, 12, 1), "f4")
    none = dict.fromkeys(("exclusive", "composed"), ())
    without = features(replace(config, dynamic=False, backout=source, **none))
    expected = without(plain)
    found = features(config)(others | {"dynamic": connections})
    np.testing.assert_allclose(found, expected, atol=1e-4)
    nothing_taken_back = without(plain | {"backout": np.float32(0)})
    assert abs(nothing_taken_back - expected).max() > 0.02


def test_layers_have_the_gates_that_they_use():
    config = replace(
        SMALL,
        num_layers=5,
        num_heads=3,
        width=24,
        mlp_only=(1,),
        exclusive=(0, 1),
        gated=(4,),
        composed=(2,),
        skips=((0, 1), (0, 4)),
    )
    first = {  # layer 1 has no attention, and the last one connections
        ("exclusion", 0): (3, 0.0),
        ("embedding", 0): (1, 0.0),
        ("embedding", 2): (1, 0.0),
        ("skip", 0): (1, 0.5),
        ("given", 2): (3, 1.0),
        ("taken", 2): (3, 0.0),
    }
    assert initial_gates(config, range(3)) == first
    bigrams = replace(config, bigram_buckets=8)
    with_bigrams = first | {("bigram", 0): (1, 0.05), ("bigram", 2): (1, 0.05)}
    assert initial_gates(bigrams, range(3)) == with_bigrams
    assert initial_gates(config, range(4, 5)) == {("gate", 4): (3, 0.25), ("skip", 1): (1, 0.5)}
