"""The model, held against a second one in NumPy and against what its tricks promise."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config import GPTConfig, Kernels
from nanogpt.model.context import Rows
from nanogpt.model.gpt import (
    GPT,
    Attention,
    Smear,
    bigram_bucket,
    norm,
    relu_squared,
)
from nanogpt.model.parameters import compute_copy
from nanogpt.training.step import graph_of, init_params


def alive(config, seed=0):
    """Random parameters, so that nothing stands at the zero it starts from."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, "f4"), shapes)


def build(config, params):
    return nnx.merge(graph_of(config), jax.tree.map(jnp.asarray, params))


def some_tokens(config, B, T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (B, T)))


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, "f8"), np.asarray(expected, "f8")
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# The whole forward pass, a second time: float64, one layer after another, nothing shared.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def numpy_rotation(config):
    """Speed of each pair of a head, and the scale of q·k, with YaRN pair by pair."""
    pairs = config.head_size // 2
    turning = round(config.rope_fraction * pairs)
    speeds, scale = [0.0] * pairs, config.attention_scale
    lengths = [*config.earlier_windows, max(config.windows, default=0)]
    for i in range(turning):
        speeds[i] = config.rope_base ** (-i / max(1, turning - 1))
        for old, new in pairwise(lengths):
            often = min(max((old * speeds[i] / (2 * np.pi) - 1) / 31, 0), 1)
            speeds[i] *= often + (1 - often) * old / new
    for old, new in pairwise(lengths):
        scale *= 0.2 * np.log(new / old) + 1
    return np.array(speeds), scale


def numpy_logits(config, params, tokens):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, "f8"), params)
    (B, T), L, N, H = tokens.shape, config.num_layers, config.num_heads, config.head_size
    count = config.value_embeddings
    speeds, scale = numpy_rotation(config)

    def turned(x, places):  # a pair is a complex number, and a turn a product with another
        turn = np.exp(-1j * places[:, :, None] * speeds)
        z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def softmax_attention(q, k, v, window, places, mates):
        """Each head sees the keys of its mates at places before its own, and at its own."""
        out = np.zeros_like(v)
        documents = np.cumsum(tokens == config.document_separator, axis=1)
        for b, t, n in np.ndindex(B, T, N):
            near = places[t, n] - places[:, mates[n]]  # [T, mates]
            seen = (near >= 0) & (near < (window * len(mates[n]) or np.inf))
            seen &= (documents[b] == documents[b, t])[:, None]
            scores = np.where(seen, scale * k[b][:, mates[n]] @ q[b, t, n], -np.inf)
            weights = np.exp(scores) / np.exp(scores).sum()
            out[b, t, n] = np.einsum("tm,tmh->h", weights, v[b][:, mates[n]])
        return out

    x = p["embed"][tokens]
    if config.bigram_buckets:
        for b, row in enumerate(tokens.tolist()):
            for t, (last, token) in enumerate(zip([0, *row], row, strict=False)):
                mixed = (token * 0x9E3779B1 % 2**32) ^ (last * 0x85EBCA77 % 2**32)
                bucket = (mixed ^ (mixed >> 15)) % config.bigram_buckets
                x[b, t] += p["bigram_embed"][bucket]
    if config.smear:
        gate = sigmoid(x[:, :, :12] @ p["smear"]["gate"])
        for t in reversed(range(1, T)):  # from the end, as each reads what its neighbour was
            x[:, t] += p["smear"]["share"] * gate[:, t] * x[:, t - 1]
    x0 = x = rms_norm(x)
    outputs, first_values = [], None
    with_attention = [layer for layer in range(L) if layer not in config.mlp_only]
    for layer in range(L):
        mirror = L - 1 - layer  # the first layer returns in the last, the second before it, ...
        if mirror < layer:
            x = x + p["skips"][layer - (L - L // 2)] * outputs[mirror]
        a, b = p["shortcuts"][layer]
        x = a * x + b * x0

        if layer in with_attention:
            weights = {n: w[with_attention.index(layer)] for n, w in p["attention"].items()}
            read = rms_norm(x)
            q, k, v = ((read @ matrix).reshape(B, T, N, H) for matrix in weights["qkv"])
            v = weights["value_mix"][0] * v
            if layer < count or layer >= L - count:
                table = p["value_embed"][layer if layer < count else layer - (L - count)]
                v = v + weights["value_mix"][1] * table[tokens].reshape(B, T, N, H)
            elif count == 0 and first_values is not None:
                v = v + weights["value_mix"][1] * first_values
            first_values = v if first_values is None else first_values
            # Paired heads take turns: tokens are two places apart, and the second head one behind.
            pairs = layer in config.paired_heads
            places = np.arange(T)[:, None] * (1 + pairs) + np.arange(N) % 2 * pairs
            mates = [[n - n % 2, n - n % 2 + 1] if pairs else [n] for n in range(N)]
            q, k = turned(rms_norm(q), places), turned(rms_norm(k), places)
            if layer in config.key_offset:
                for i in np.flatnonzero(speeds == 0):
                    for j in (i, i + H // 2):
                        k[:, :, :, j] = np.pad(k[:, :-1, :, j], ((0, 0), (1, 0), (0, 0)))
            window = config.windows[layer % len(config.windows)] if config.windows else 0
            y = softmax_attention(q, k, v, window, places, mates)
            if config.attention_gate:
                y = y * sigmoid(read[:, :, :12] @ weights["gate"])[..., None]
            x = x + y.reshape(B, T, N * H) @ weights["out"]

        x = x + np.maximum(rms_norm(x) @ p["mlp"]["up"][layer], 0) ** 2 @ p["mlp"]["down"][layer]
        outputs.append(x)
    if config.backout is not None:
        x = x - p["backout"] * outputs[config.backout]
    z = rms_norm(x) @ p["head"]
    return config.softcap * np.tanh((z + config.logit_shift) * config.logit_scale / config.softcap)


EVERY_TRICK = GPTConfig(
    vocab_size=100,
    num_layers=5,
    num_heads=4,
    width=48,
    mlp_width=48,
    mlp_only=(0, 3),
    windows=(3, 300, 6),
    earlier_windows=(40, 100),
    document_separator=4,  # in the middle of the first row
    value_embeddings=2,
    bigram_buckets=61,
    key_offset=(1, 4),
    paired_heads=(2, 4),
    backout=2,
    attention_scale=0.3,
    rope_base=40.0,
    rope_fraction=0.75,
    softcap=4.0,
    logit_scale=0.7,
    logit_shift=1.5,
)
VALUE_RESIDUAL = GPTConfig(  # the first layer that has values is the second
    vocab_size=100,
    num_layers=4,
    num_heads=2,
    width=32,
    mlp_width=48,
    mlp_only=(0,),
    windows=(3, 0, 6),
    value_embeddings=0,
    smear=False,
    key_offset=(2,),
    backout=3,
    rope_fraction=0.0,
)
OVERLAPPING = GPTConfig(  # the first two layers and the last two are three in all
    vocab_size=100, num_layers=3, num_heads=1, width=16, mlp_width=24, value_embeddings=2
)
BARE = GPTConfig(
    vocab_size=128,
    num_layers=1,
    num_heads=3,
    width=24,
    mlp_width=8,
    value_embeddings=0,
    smear=False,
    attention_gate=False,
)


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (EVERY_TRICK, (1.0, 0.5, 0.25)),
        (VALUE_RESIDUAL, (1.0,)),
        (OVERLAPPING, (0.5, 2.0)),
        (BARE, (1.0,)),
    ],
    ids=["every trick", "value residual", "overlapping", "bare"],
)
def test_logits_and_losses_equal_a_float64_model_in_numpy(config, weights):
    params, (B, T) = alive(config), (2, 13)
    tokens, targets = (np.array(some_tokens(config, B, T, seed)) for seed in (0, 1))
    targets[1, 9] = -1
    expected = numpy_logits(config, params, tokens)
    log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    expected_objective, expected_loss = np.zeros((2, B, T))
    for b, t in np.ndindex(B, T):
        expected_loss[b, t] = -log_p[b, t, targets[b, t]] if targets[b, t] >= 0 else 0
        for weight, target in zip(weights, targets[b, t:], strict=False):
            expected_objective[b, t] -= weight * log_p[b, t, target] if target >= 0 else 0

    model = build(config, params)
    logits, (objective, losses) = jax.jit(
        lambda tokens, targets: (model(tokens), model.loss(tokens, targets, weights))
    )(tokens, targets)

    assert logits.dtype == objective.dtype == losses.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(losses, expected_loss, atol=1e-4)
    np.testing.assert_allclose(objective, expected_objective, atol=2e-4)


def test_layers_may_be_counted_from_the_last_one_backwards():
    backwards = replace(EVERY_TRICK, mlp_only=(-5, 3), key_offset=(-4, -1), paired_heads=(2, -1))
    tokens, params = some_tokens(EVERY_TRICK, 1, 9), alive(EVERY_TRICK)
    expected, found = (build(c, params)(tokens) for c in (EVERY_TRICK, backwards))
    np.testing.assert_array_equal(found, expected)


# Initialisation


@pytest.mark.parametrize(
    ("vocab_size", "padded", "first_loss"), [(100, 128, 4.8520), (50257, 50304, 10.8258)]
)
def test_a_new_model_gives_every_padded_id_the_same_probability(vocab_size, padded, first_loss):
    config = GPTConfig(
        vocab_size, num_layers=2, num_heads=1, width=12, mlp_width=8, value_embeddings=1
    )
    tokens = some_tokens(config, B=2, T=5)

    @jax.jit
    def new():
        model = GPT(config, rngs=nnx.Rngs(0))
        return model(tokens), model.loss(tokens, tokens)

    logits, (objective, losses) = new()
    assert logits.shape == (2, 5, padded)
    np.testing.assert_array_equal(objective, losses)
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
    assert params["backout"] == 0.5
    for matrices in (params["attention"]["qkv"], params["mlp"]["up"]):
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
    tokens = jnp.asarray(np.random.default_rng(1).permutation(config.vocab_size)[:T][None])
    rows = {"embed": tokens[0], "value_embed": tokens[0]}
    if config.bigram_buckets:
        rows["bigram_embed"] = np.asarray(
            bigram_bucket(tokens, jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1], config.bigram_buckets)
        )[0]
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


@pytest.mark.parametrize(
    ("how", "reach", "value_reach"),
    [
        ({}, T, T),
        ({"windows": (5, 2)}, 4 + 1 + 4, 4 + 1 + 4),
        # Value embeddings are neither smeared, nor are they in the keys of the layer they come to.
        ({"windows": (3, 2), "smear": True, "mlp_only": (1,)}, 1 + 2 + 0 + 2, 2 + 0 + 2),
        ({"windows": (3, 2), "key_offset": (0, 1)}, 3 + 2 + 2, 2 + 2 + 2),
    ],
)
def test_the_gradient_reaches_exactly_the_positions_that_may_be_seen(how, reach, value_reach):
    # A window of w lets a layer look w - 1 tokens back, a key that is of two tokens 1 more, and
    # layers add up.
    config = GPTConfig(
        vocab_size=100,
        num_layers=3,
        num_heads=2,
        width=16,
        mlp_width=32,
        value_embeddings=1,
        bigram_buckets=4096,
        **({"smear": False} | how),
    )
    back = np.arange(T)[:, None] - np.arange(T)[None, :]
    for name, reached in influence(config).items():
        furthest = value_reach if name == "value_embed" else reach
        np.testing.assert_array_equal(reached, (back >= 0) & (back <= furthest), err_msg=name)


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


# The tricks one by one, each by its formula


def fixed(*shape, seed=0):
    """Numbers near one, of both signs, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


@pytest.fixture
def run_on_values(monkeypatch):
    """Runs a model whose queries each take the value of their own token, and look no further.

    Returns its features, which layers had attention, and the values of each.
    """

    def run(config, params, tokens):
        layers, given = [], []

        def attend(q, k, v, layer):
            layers.append(layer)
            given.append(v.reshape(*tokens.shape, -1))
            return v

        monkeypatch.setattr(GPT, "attend", lambda self, past, layer, *qkv: attend(*qkv, layer))
        features, values = jax.jit(lambda: (build(config, params).features(tokens), given))()
        return features, layers, values

    return run


def test_before_moves_everything_one_token_on():
    x = jnp.arange(12).reshape(2, 3, 2)
    before = partial(Rows.before, None, "any")
    assert before(x).tolist() == [
        [[0, 0], [0, 1], [2, 3]],
        [[0, 0], [6, 7], [8, 9]],
    ]
    assert before(x[..., 0]).tolist() == [[0, 0, 2], [0, 6, 8]]


def test_smear_adds_a_gated_share_of_the_token_before():
    smear, x = Smear(), fixed(2, 5, 16)
    gate, share = fixed(12, 1, seed=1), 0.6
    smear.gate, smear.share = nnx.Param(jnp.asarray(gate)), nnx.Param(jnp.float32(share))
    expected = x.astype("f8")
    for b, t in np.ndindex(2, 5):
        opened = sigmoid(np.dot(x[b, t, :12].astype("f8"), gate[:, 0]))
        assert 0.01 < opened < 0.99
        expected[b, t] += share * opened * (x[b, t - 1] if t else 0)
    before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    np.testing.assert_allclose(smear(jnp.asarray(x), before), expected, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_attention_mixes_its_values_and_gates_what_each_head_takes(gated):
    config = replace(BARE, num_heads=2, width=16, attention_gate=gated)
    x, mixed_in = fixed(2, 1, 3, 16)
    qkv, out, gate = fixed(3, 16, 16, seed=1), fixed(16, 16, seed=2), fixed(12, 2, seed=3)

    def attend(q, k, v):  # any function of all three shows whether each is what it should be
        return v + 2 * q - 3 * k

    @jax.jit
    def run(x, mixed_in):
        layer = Attention(config, rngs=nnx.Rngs(0))
        layer.qkv, layer.out = nnx.Param(jnp.asarray(qkv)), nnx.Param(jnp.asarray(out))
        layer.value_mix = nnx.Param(jnp.array([0.7, -1.5]))
        assert hasattr(layer, "gate") == gated
        if gated:
            layer.gate = nnx.Param(jnp.asarray(gate))
        return layer(x, mixed_in, attend), layer(x, None, attend)

    for (added, values), mixed in zip(
        run(x, mixed_in), (-1.5 * mixed_in.astype("f8"), 0), strict=True
    ):
        q, k, v = x.astype("f8") @ qkv[:, None]
        v = 0.7 * v + mixed
        np.testing.assert_allclose(values, v, atol=1e-4)
        y = (v + 2 * q - 3 * k).reshape(1, 3, 2, 8)
        if gated:
            opened = sigmoid(x[:, :, :12].astype("f8") @ gate)
            assert np.ptp(opened) > 0.3
            y = y * opened[..., None]
        np.testing.assert_allclose(added, y.reshape(1, 3, 16) @ out, atol=1e-3)


@pytest.mark.parametrize(
    ("num_layers", "count", "tables"),
    [
        (12, 3, [0, 1, 2, *[None] * 6, 0, 1, 2]),
        (4, 2, [0, 1, 0, 1]),
        (3, 2, [0, 1, 1]),
        (2, 2, [0, 1]),
        (3, 1, [0, None, 0]),
        (3, 0, [None] * 3),
    ],
)
def test_the_first_and_again_the_last_layers_have_value_embeddings(num_layers, count, tables):
    config = replace(BARE, num_layers=num_layers, value_embeddings=count)
    params, tokens = alive(config), some_tokens(config, B=1, T=4)
    found = build(config, params).value_embeddings(tokens)
    assert len(found) == num_layers
    for mixed_in, table in zip(found, tables, strict=True):
        if table is None:
            assert mixed_in is None
        else:
            np.testing.assert_array_equal(mixed_in, params["value_embed"][table][tokens])


def test_without_value_embeddings_the_first_values_are_mixed_into_all_later_ones(run_on_values):
    config = replace(BARE, num_layers=4, mlp_only=(1,))
    params, tokens = alive(config), some_tokens(config, B=1, T=4)
    # Nothing is added to the stream: each layer reads the normalised embedding.
    params["attention"]["out"][:] = params["mlp"]["down"][:] = params["skips"][:] = 0
    params["shortcuts"][:] = [1, 0]
    params["attention"]["value_mix"] = np.array([[0.8, 9], [0.5, -0.6], [1.1, 0.3]], "f4")
    _, layers, values = run_on_values(config, params, tokens)

    read = rms_norm(params["embed"][tokens].astype("f8"))
    own = [read @ qkv[2] for qkv in params["attention"]["qkv"].astype("f8")]
    first = 0.8 * own[0]
    expected = [first, 0.5 * own[1] - 0.6 * first, 1.1 * own[2] + 0.3 * first]
    assert layers == [0, 2, 3]
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_layers_without_attention_are_mlps_and_what_a_layer_gave_is_taken_back(run_on_values):
    config = replace(BARE, num_layers=3, mlp_only=(0, 2), backout=1)
    params, tokens = alive(config), some_tokens(config, B=1, T=4)
    params["shortcuts"][:], params["skips"][:], params["backout"] = [1, 0], 0, 0.3
    found, layers, _ = run_on_values(config, params, tokens)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, "f8"), params)

    def mlp(x, layer):
        return np.maximum(rms_norm(x) @ p["mlp"]["up"][layer], 0) ** 2 @ p["mlp"]["down"][layer]

    x = rms_norm(p["embed"][tokens])
    x = x + mlp(x, 0)
    value = p["attention"]["value_mix"][0, 0] * rms_norm(x) @ p["attention"]["qkv"][0, 2]
    x = x + value @ p["attention"]["out"][0]
    x = taken_back = x + mlp(x, 1)
    x = x + mlp(x, 2)
    assert layers == [1]
    assert "backout" not in alive(BARE)
    assert {len(leaf) for leaf in params["attention"].values()} == {1}
    np.testing.assert_allclose(found, rms_norm(x - 0.3 * taken_back), atol=1e-4)


def test_the_half_of_a_key_that_is_not_rotated_is_that_of_the_token_before():
    config = replace(
        BARE, num_layers=2, num_heads=2, width=16, key_offset=(1,), rope_base=10.0, windows=(3,)
    )
    tokens = some_tokens(config, B=1, T=5)
    q, k, v = fixed(3, 1, 5, 2, 8)
    model, past = build(config, alive(config)), Rows(config, tokens, "xla")
    found = jax.jit(
        lambda: [model.attend(past, layer, *map(jnp.asarray, (q, k, v))) for layer in range(2)]
    )()

    # Of 4 pairs (i, i + 4) two turn, by 1 and 0.1 radians per token, and two stand still.
    turn = np.exp(-1j * np.outer(np.arange(5), [1, 0.1, 0, 0]))[:, None]
    turned_q, turned_k = (rms_norm(x.astype("f8")) for x in (q, k))
    turned_q, turned_k = ((x[..., :4] + 1j * x[..., 4:]) * turn for x in (turned_q, turned_k))
    for got, moved in zip(found, (False, True), strict=True):
        expected = np.zeros((1, 5, 2, 8))
        for t, n in np.ndindex(5, 2):
            seen = range(max(0, t - 2), t + 1)
            keys = np.zeros((5, 4), complex)
            for s in seen:
                keys[s] = turned_k[0, s, n]
                if moved:
                    keys[s, 2:] = turned_k[0, s - 1, n, 2:] if s else 0
            scores = [0.12 * (keys[s] * turned_q[0, t, n].conj()).real.sum() for s in seen]
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[0, t, n] = weights @ v[0, list(seen), n]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_logits_are_those_of_a_rescaled_sigmoid_but_for_a_constant():
    # modded-nanogpt's 23 * sigmoid((z + 5) / 7.5) is 11.5 * tanh((z + 5) / 15) + 11.5.
    config = replace(BARE, softcap=11.5, logit_scale=11.5 / 15, logit_shift=5.0)
    params, features = alive(config), 5 * fixed(4, 24)
    z = features.astype("f8") @ params["head"]
    assert z.min() < -20 and z.max() > 20
    published = 23 * sigmoid((z + 5) / 7.5)
    logits = build(config, params).logits(jnp.asarray(features))
    np.testing.assert_allclose(logits + 11.5, published, atol=1e-4)


def test_the_tokens_after_the_next_are_scored_up_to_the_end_of_a_row():
    # All features are alike: so are the logits, and a loss is that of its target alone.
    params, tokens = alive(BARE), jnp.zeros((1, 5), int)
    targets = jnp.array([[7, 8, -1, 9, 10]])
    model = build(BARE, params)
    logits, (objective, losses) = jax.jit(
        lambda: (model(tokens)[0, 0], model.loss(tokens, targets, (1.0, 0.5, 0.25)))
    )()
    logits = np.asarray(logits, "f8")
    cost = dict(enumerate(np.log(np.exp(logits).sum()) - logits)) | {-1: 0.0}
    expected = [
        cost[7] + 0.5 * cost[8],  # the third is unknown
        cost[8] + 0.25 * cost[9],
        0.5 * cost[9] + 0.25 * cost[10],
        cost[9] + 0.5 * cost[10],
        cost[10],
    ]
    np.testing.assert_allclose(objective[0], expected, atol=1e-5)
    np.testing.assert_allclose(losses[0], [cost[t] for t in targets[0].tolist()], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "with_something_mixed_in"),
    [
        (EVERY_TRICK, [True, False, True]),  # of the layers 1, 2 and 4
        (VALUE_RESIDUAL, [False, True, True]),
    ],
)
def test_every_parameter_learns_but_shares_of_what_is_not_there(config, with_something_mixed_in):
    params, tokens = alive(config), some_tokens(config, B=2, T=T)
    gradients = jax.jit(
        jax.grad(lambda params: build(config, params).loss(tokens, tokens)[0].mean())
    )(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.any(gradient), jax.tree_util.keystr(path)
    own, mixed_in = (gradients["attention"]["value_mix"] != 0).T
    assert own.all()
    assert mixed_in.tolist() == with_something_mixed_in


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


@pytest.mark.parametrize("config", [EVERY_TRICK, VALUE_RESIDUAL])
def test_layers_computed_again_have_the_same_losses_and_gradients_and_keep_less(config):
    params, tokens = alive(config), some_tokens(config, B=2, T=T)

    def loss(again, params):
        graph = graph_of(config, Kernels(rematerialize=again))
        return nnx.merge(graph, params).loss(tokens, tokens)[0].mean()

    (kept, (found, gradients)), (again, (again_found, again_gradients)) = (
        (
            jax.eval_shape(lambda p, r=rematerialize: jax.vjp(partial(loss, r), p)[1], params),
            jax.jit(jax.value_and_grad(partial(loss, rematerialize)))(params),
        )
        for rematerialize in (False, True)
    )
    assert again_found == pytest.approx(float(found), rel=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (gradients, again_gradients)), strict=True):
        assert relative_error(other, one) < 1e-5
    # No scores, a number per query and key, wait for the backward pass.

    def scores(pullback):
        shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
        return [shape for shape in shapes if sum(n in (T, 2 * T) for n in shape) == 2]

    assert len(scores(kept)) >= config.num_attentions
    assert not scores(again)


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
    tokens = jnp.zeros((8, 256), int)
    params = alive(BARE)

    @partial(jax.jit, static_argnums=0)
    def gradient(dtype, params):
        def loss(params):
            return build(BARE, compute_copy(params, dtype)).loss(tokens, tokens)[0].sum()

        return jax.grad(loss)(params)["embed"]

    exact, rough = gradient("float32", params), gradient("bfloat16", params)
    assert rough.dtype == jnp.float32
    assert relative_error(rough, exact) < 0.05
