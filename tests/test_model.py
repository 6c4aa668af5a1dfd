"""The model, held against a second one in NumPy and against what its tricks promise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config import GPTConfig
from nanogpt.model import GPT, bigram_bucket, compute_copy, norm, relu_squared, rotary
from nanogpt.step import graph_of, init_params


def alive(config, seed=0):
    """Random parameters, so that nothing stands at the zero it starts from."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, "f4"), shapes)


def build(config, params):
    return nnx.merge(graph_of(config), jax.tree.map(jnp.asarray, params))


def some_tokens(config, B, T, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T))


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, "f8"), np.asarray(expected, "f8")
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# The whole forward pass, a second time: float64, one layer after another, nothing shared.


def numpy_logits(config, params, tokens):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, "f8"), params)
    (B, T), L, N, H = tokens.shape, config.num_layers, config.num_heads, config.head_size
    count = config.value_embeddings

    def rms_norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def turned(x):  # a pair is a complex number, and a turn a product with another
        still = H // 4
        speeds = [config.rope_base ** (-i / max(1, still - 1)) for i in range(still)] + [0] * still
        turn = np.exp(-1j * np.outer(np.arange(T), speeds))[:, None]
        z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def softmax_attention(q, k, v, window):
        out = np.zeros_like(v)
        for b in range(B):
            for n in range(N):
                document = 0
                for t in range(T):
                    document = t if tokens[b, t] == config.document_separator else document
                    first = document if not window else max(document, t + 1 - window)
                    scores = config.attention_scale * k[b, first : t + 1, n] @ q[b, t, n]
                    weights = np.exp(scores) / np.exp(scores).sum()
                    out[b, t, n] = weights @ v[b, first : t + 1, n]
        return out

    x = p["embed"][tokens]
    if config.bigram_buckets:
        for b, row in enumerate(tokens.tolist()):
            for t, (before, token) in enumerate(zip([0, *row], row, strict=False)):
                mixed = (token * 0x9E3779B1 % 2**32) ^ (before * 0x85EBCA77 % 2**32)
                bucket = (mixed ^ (mixed >> 15)) % config.bigram_buckets
                x[b, t] += p["bigram_embed"][bucket]
    x0 = x = rms_norm(x)
    outputs = []
    for layer in range(L):
        mirror = L - 1 - layer  # the first layer returns in the last, the second before it, ...
        if mirror < layer:
            x = x + p["skips"][layer - (L - L // 2)] * outputs[mirror]
        a, b = p["blocks"]["shortcut"][layer]
        x = a * x + b * x0

        weights = {name: leaf[layer] for name, leaf in p["blocks"]["attention"].items()}
        q, k, v = ((rms_norm(x) @ matrix).reshape(B, T, N, H) for matrix in weights["qkv"])
        v = weights["value_mix"][0] * v
        if layer < count or layer >= L - count:
            table = p["value_embed"][layer if layer < count else layer - (L - count)]
            v = v + weights["value_mix"][1] * table[tokens].reshape(B, T, N, H)
        window = config.windows[layer % len(config.windows)] if config.windows else 0
        y = softmax_attention(turned(rms_norm(q)), turned(rms_norm(k)), v, window)
        x = x + y.reshape(B, T, N * H) @ weights["out"]

        up, down = p["blocks"]["mlp"]["up"][layer], p["blocks"]["mlp"]["down"][layer]
        x = x + np.maximum(rms_norm(x) @ up, 0) ** 2 @ down
        outputs.append(x)
    return config.softcap * np.tanh(rms_norm(x) @ p["head"] / config.softcap)


EVERY_TRICK = GPTConfig(
    vocab_size=100,
    num_layers=5,
    num_heads=2,
    width=32,
    mlp_width=48,
    windows=(3, 0, 6),
    document_separator=4,  # in the middle of the first row
    value_embeddings=2,
    bigram_buckets=61,
    attention_scale=0.3,
    rope_base=40.0,
    softcap=4.0,
)
OVERLAPPING = GPTConfig(  # the first two layers and the last two are three in all
    vocab_size=100, num_layers=3, num_heads=1, width=16, mlp_width=24, value_embeddings=2
)
BARE = GPTConfig(
    vocab_size=128, num_layers=1, num_heads=3, width=24, mlp_width=8, value_embeddings=0
)


@pytest.mark.parametrize(
    "config", [EVERY_TRICK, OVERLAPPING, BARE], ids=["every trick", "overlapping", "bare"]
)
def test_logits_and_losses_equal_a_float64_model_in_numpy(config):
    params, tokens = alive(config), some_tokens(config, B=2, T=13)
    targets = some_tokens(config, B=2, T=13, seed=1)
    expected = numpy_logits(config, params, tokens)
    log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    expected_loss = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]

    model = build(config, params)
    logits, losses = jax.jit(lambda: (model(tokens), model.loss(tokens, targets)))()

    assert logits.dtype == losses.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(losses, expected_loss, atol=1e-4)


# Initialisation


@pytest.mark.parametrize(
    ("vocab_size", "padded", "first_loss"), [(100, 128, 4.8520), (50257, 50304, 10.8258)]
)
def test_a_new_model_gives_every_padded_id_the_same_probability(vocab_size, padded, first_loss):
    config = GPTConfig(
        vocab_size, num_layers=2, num_heads=1, width=8, mlp_width=8, value_embeddings=1
    )
    tokens = some_tokens(config, B=2, T=5)

    @jax.jit
    def new():
        model = GPT(config, rngs=nnx.Rngs(0))
        return model(tokens), model.loss(tokens, tokens)

    logits, losses = new()
    assert logits.shape == (2, 5, padded)
    np.testing.assert_allclose(losses, first_loss, atol=6e-5)
    np.testing.assert_allclose(losses, np.log(padded), rtol=1e-6)


def test_a_new_model_adds_nothing_to_the_stream_and_has_no_two_matrices_alike(tiny):
    tokens = some_tokens(tiny, B=1, T=9)

    @jax.jit
    def new(key):
        params = init_params(tiny, key)
        return params, nnx.merge(graph_of(tiny), params).features(tokens)

    params, features = new(jax.random.key(0))
    # Every projection back into the stream starts at zero: the embedding passes through.
    x = np.asarray(params["embed"], "f8")[tokens]
    np.testing.assert_allclose(features, x / np.sqrt((x**2).mean(-1, keepdims=True)), atol=1e-5)
    for matrices in (params["blocks"]["attention"]["qkv"], params["blocks"]["mlp"]["up"]):
        flat = np.asarray(matrices).reshape(-1, *matrices.shape[-2:])
        assert len(np.unique(flat[:, 0, 0])) == len(flat)
        assert flat.std() == pytest.approx(0.5 / tiny.width**0.5, rel=0.03)


# Causality


T = 14


def influence(config):
    """For each token table: does position j (column) move the output of position t (row)?

    No token comes twice, so that the gradient of a row of a table is the gradient of the one
    position that looks it up.
    """
    params = alive(config)
    tokens = np.random.default_rng(1).permutation(config.vocab_size)[:T][None]
    rows = {"embed": tokens[0], "value_embed": tokens[0]}
    if config.bigram_buckets:
        rows["bigram_embed"] = np.asarray(bigram_bucket(tokens, config.bigram_buckets))[0]
        assert len(set(rows["bigram_embed"].tolist())) == T
    probe = np.random.default_rng(2).standard_normal(config.padded_vocab_size).astype("f4")

    @jax.jacrev
    def gradients(tables):
        return build(config, params | tables)(tokens)[0] @ probe

    found = jax.jit(gradients)({name: params[name] for name in rows})
    return {
        # value_embed has an axis of tables before the one of tokens
        name: np.asarray(jnp.abs(found[name]).max(axis=-1))
        .reshape(T, -1, params[name].shape[-2])
        .max(axis=1)[:, row]
        != 0
        for name, row in rows.items()
    }


@pytest.mark.parametrize(("windows", "reach"), [((), T), ((5, 2), 4 + 1 + 4)])
def test_the_gradient_reaches_exactly_the_positions_that_the_windows_let_see(windows, reach):
    # A window of w lets a layer look w - 1 tokens back, and layers add up.
    config = GPTConfig(
        vocab_size=100,
        num_layers=3,
        num_heads=2,
        width=16,
        mlp_width=32,
        windows=windows,
        value_embeddings=1,
        bigram_buckets=4096,
    )
    back = np.arange(T)[:, None] - np.arange(T)[None, :]
    for name, reached in influence(config).items():
        np.testing.assert_array_equal(reached, (back >= 0) & (back <= reach), err_msg=name)


def test_no_output_depends_on_a_later_token(tiny):
    # In full, not by gradient: bigram buckets are chosen by integers, which have none.
    tokens = some_tokens(tiny, B=1, T=T)
    changed = (tokens + np.eye(T, dtype=int)) % tiny.vocab_size  # row j has another token j
    model = build(tiny, alive(tiny))
    # One row at a time: the bits of a product may depend on where in a batch it stands.
    logits = jax.jit(lambda rows: jax.lax.map(lambda row: model(row[None])[0], rows))(
        np.concatenate([tokens, changed])
    )
    differs = np.asarray(jnp.any(logits[1:] != logits[0], axis=-1))
    np.testing.assert_array_equal(differs, np.triu(np.ones((T, T), bool)))


# Rotary positions


def test_rotary_turns_the_first_half_of_the_pairs_and_leaves_the_rest():
    H, base = 16, 100.0
    x = np.random.default_rng(0).standard_normal((1, 9, 2, H)).astype("f4")
    z, turned = (a[..., : H // 2] + 1j * a[..., H // 2 :] for a in (x, np.asarray(rotary(x, base))))
    np.testing.assert_array_equal(turned[..., H // 4 :], z[..., H // 4 :])
    np.testing.assert_array_equal(turned[:, 0], z[:, 0])
    np.testing.assert_allclose(np.abs(turned), np.abs(z), rtol=1e-5)
    # The fastest pair turns by one radian per token, the slowest by 1 / base, the others between.
    step = (turned[:, 1] / z[:, 1])[..., : H // 4]
    np.testing.assert_allclose(
        -np.angle(step), np.tile([1, 0.2154, 0.0464, 0.01], (1, 2, 1)), atol=1e-4
    )


def test_a_score_depends_on_the_distance_of_query_and_key_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 16)).astype("f4")
    everywhere = [np.tile(x, (1, 12, 1, 1)) for x in (q, k)]
    turned_q, turned_k = (np.asarray(rotary(x, 50.0))[0, :, 0] for x in everywhere)
    scores = turned_q @ turned_k.T
    for distance in range(-11, 12):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.ptp(scores[0]) > 0.5  # and it does depend on the distance


# The other tricks


def test_every_parameter_learns_but_value_mixes_of_layers_without_a_value_embedding():
    config = EVERY_TRICK
    params, tokens = alive(config), some_tokens(config, B=2, T=T)
    gradients = jax.jit(jax.grad(lambda params: build(config, params).loss(tokens, tokens).mean()))(
        params
    )
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.any(gradient), jax.tree_util.keystr(path)
    own, embedding = (gradients["blocks"]["attention"]["value_mix"] != 0).T
    assert own.all()
    assert embedding.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_relu_squared_is_that_of_its_formula_and_keeps_one_array(dtype):
    rng = np.random.default_rng(0)
    x, above = (jnp.asarray(rng.standard_normal(500), dtype) for _ in range(2))
    out, pullback = jax.vjp(relu_squared, x)
    exact = np.maximum(np.asarray(x, "f8"), 0)
    rounding = {"float32": 3e-7, "bfloat16": 2**-7}[dtype]
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, "f8"), exact**2, rtol=rounding)
    (gradient,) = pullback(above)
    assert gradient.dtype == dtype
    expected = 2 * exact * np.asarray(above, "f8")
    np.testing.assert_allclose(np.asarray(gradient, "f8"), expected, rtol=3 * rounding)
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)] == [(500,)]


def test_norm_gives_a_mean_square_of_one_whatever_the_scale():
    x = np.random.default_rng(0).standard_normal((5, 64)).astype("f4") * [
        [1e-2],
        [1],
        [9],
        [1e4],
        [0],
    ]
    mean_square = np.mean(np.square(norm(jnp.asarray(x, "f4"))), axis=-1)
    np.testing.assert_allclose(mean_square, [0.99, 1, 1, 1, 0], atol=0.02)


# Precision


def test_in_bfloat16_the_model_agrees_with_float32_to_the_accuracy_of_bfloat16():
    config = EVERY_TRICK
    params, tokens = alive(config), some_tokens(config, B=2, T=T)

    @partial(jax.jit, static_argnums=0)
    def run(dtype, params):
        model = build(config, compute_copy(params, dtype))
        return model.features(tokens), model(tokens)

    exact, rough = run("float32", params), run("bfloat16", params)
    assert [array.dtype for array in rough] == ["bfloat16", "float32"]
    for found, expected in zip(rough, exact, strict=True):
        # bfloat16 rounds to 8 bits, 0.4 %: the error is a few of these, and it is not none.
        assert 2e-3 < relative_error(found, expected) < 0.03


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    # In bfloat16 a sum of 2048 terms like each other stops growing at some hundreds.
    tokens = np.zeros((8, 256), int)
    params = alive(BARE)

    @partial(jax.jit, static_argnums=0)
    def gradient(dtype, params):
        def loss(params):
            return build(BARE, compute_copy(params, dtype)).loss(tokens, tokens).sum()

        return jax.grad(loss)(params)["embed"]

    exact, rough = gradient("float32", params), gradient("bfloat16", params)
    assert rough.dtype == jnp.float32
    assert relative_error(rough, exact) < 0.05
