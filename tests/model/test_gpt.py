"""The model, compared with a second one in NumPy and with the formulas of its tricks."""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config import GPTConfig, Kernels
from nanogpt.model.context import Rows
from nanogpt.model.gpt import GPT, Attention, norm
from nanogpt.model.kernels.relu_squared import relu_squared
from nanogpt.model.parameters import compute_copy
from nanogpt.training.step import graph_of, init_params, param_shapes
from tests.conftest import like_the_speedrun
from tests.model.test_bigrams import bucket_of, signs_of


def alive(config, seed=0):
    """Return random parameters, so that none is at its initial zero."""
    shapes = param_shapes(config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, "f4"), shapes)


def build(config, params):
    return nnx.merge(graph_of(config), jax.tree.map(jnp.asarray, params))


def some_tokens(config, B, T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (B, T)))


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, "f8"), np.asarray(expected, "f8")
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# The whole forward pass a second time: float64, layer by layer, no shared code.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 2**-23)


def numpy_rotation(config):
    """Return the rotation speed of each pair of a head, and the scale of q·k, with YaRN."""
    pairs = config.head_size // 2
    turning = round(config.rope_fraction * pairs)
    speeds, scale = [0.0] * pairs, config.attention_scale
    for i in range(turning):
        speeds[i] = config.rope_base ** (-i / max(1, turning - 1))
        for old, new in pairwise(config.rotary_windows):
            often = min(max((old * speeds[i] / (2 * np.pi) - 1) / 31, 0), 1)
            speeds[i] *= often + (1 - often) * old / new
    for old, new in pairwise(config.rotary_windows):
        scale *= 0.2 * np.log(new / old) + 1
    return np.array(speeds), scale


def numpy_logits(config, params, tokens):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, "f8"), params)
    (B, T), L, N, H = tokens.shape, config.num_layers, config.num_heads, config.head_size
    count, late = config.value_embeddings, config.attention_source
    speeds, scale = numpy_rotation(config)
    begins = tokens == config.document_separator  # False where there is none
    begins[:, 0] = True

    def turned(x, places):  # a pair is a complex number, and a rotation a product with another
        turn = np.exp(-1j * places[:, :, None] * speeds)
        z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def softmax_attention(q, k, v, window, places, mates):
        """Each head sees the keys of its mates at earlier positions and at its own."""
        out = np.zeros_like(v)
        documents = np.cumsum(begins, axis=1)
        for b, t, n in np.ndindex(*q.shape[:3]):
            near = places[t, n] - places[:, mates[n]]  # [T, mates]
            seen = (near >= 0) & (near < (window or np.inf))
            seen &= (documents[b] == documents[b, t])[:, None]
            scores = np.where(seen, scale * k[b][:, mates[n]] @ q[b, t, n], -np.inf)
            weights = np.exp(scores) / np.exp(scores).sum()
            out[b, t, n] = np.einsum("tm,tmh->h", weights, v[b][:, mates[n]])
        return out

    def chosen(x, by, scale=0.1):
        """Return weights that each token chooses with a small MLP, each [B, T, 1]."""
        mlp = p["dynamic"][by]
        hidden = x @ mlp["up"]
        hidden = hidden * (0.5 + 0.5 * np.vectorize(erf)(hidden / np.sqrt(2)))  # GELU
        weights = (hidden @ mlp["down"] + mlp["bias"]) * scale
        return [weights[:, :, n, None] for n in range(weights.shape[-1])]

    x = p["embed"][tokens]
    if config.smear:
        gate = sigmoid(x[:, :, :12] @ p["smear"]["gate"])
        for t in reversed(range(T)):  # from the end, because each reads its neighbour's old value
            before = np.where(begins[:, t, None], 0, x[:, t - 1])
            x[:, t] += p["smear"]["share"] * gate[:, t] * before
    x0 = rms_norm(x)
    bigrams = np.zeros_like(x)
    if config.bigram_buckets:
        for b, t in np.ndindex(B, T):
            pair = int(tokens[b, t]), 0 if begins[b, t] else int(tokens[b, t - 1])
            row = p["bigram_embed"][bucket_of(*pair, config.bigram_buckets)]
            signs = 1 if config.bigram_width is None else signs_of(*pair, config.bigram_width)
            bigrams[b, t, : len(row)] = signs * row
    # What tokens choose for each layer, twice: numbers per head, then weights of the sums, ...
    with_attention = [layer for layer in range(L) if layer not in config.mlp_only]
    again, gates = max(1, ((late or 0) + 1) // 2), {}

    def choose(x, by, layers):
        numbers = iter(chosen(x, by, p["dynamic"]["gate_scale"]))
        layers = [layer for layer in layers if layer in with_attention]
        for name, some in (("exclusion", config.exclusive), ("gate", config.gated)):
            for layer in layers:
                if layer in some:
                    gates[name, layer] = np.concatenate([next(numbers) for _ in range(N)], axis=-1)
        for layer in layers:
            if layer != L - 1:
                gates["embedding", layer] = next(numbers)
                gates["bigram", layer] = next(numbers) if config.bigram_buckets else 0
        for number, (_, target) in enumerate(config.skips or ()):
            if (target < again) == (by == "early_gates"):
                gates["skip", number] = next(numbers)
        for layer in layers:
            if layer in config.composed:
                for name in ("given", "taken"):
                    gates[name, layer] = np.concatenate([next(numbers) for _ in range(N)], axis=-1)
        assert not [*numbers]

    if config.dynamic:
        choose(x0, "early_gates", range(again))
    else:
        gates |= {("embedding", layer): p["embedding_shares"][layer] for layer in range(L)}
        if config.bigram_buckets:
            gates |= {("bigram", layer): p["bigram_shares"][layer] for layer in range(L)}
    first = x0
    if late is not None and config.bigram_buckets:  # they are in the stream from the beginning
        first = x0 + gates["bigram", 0] * bigrams
    x, outputs, first_values, num_gates = first, [], None, 0
    # The last layers have the tables in turn, and the first ones all but the first table.
    tables = {layer: layer + 1 for layer in range(count - 1)}
    tables.update({L - count + table: table for table in range(count)})
    if config.value_layers:
        tables = dict(zip(config.value_layers, range(count), strict=True))
    for layer in range(L):
        if config.dynamic and layer == again:
            choose(x, "late_gates", range(layer, L))
        mirror = L - 1 - layer  # first to last, second to second to last, ...
        if config.skips is None and mirror < layer:
            x = x + p["skips"][layer - (L - L // 2)] * outputs[mirror]
        for number, (source, target) in enumerate(config.skips or ()):
            if target == layer:
                if config.dynamic:
                    gate = gates["skip", number]
                else:
                    gate = 2 * sigmoid(x0[:, :, :12] @ p["skip_gate"][number])
                x = x + sigmoid(p["skips"][number]) * gate * outputs[source]
        # What the sum of the layer consists of: shares of the stream, of the embedding, of the
        # bigrams and of the attention; and after attention, of the stream again and of the MLP.
        shares, more_values, halves = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 0.0, None
        if config.dynamic and layer == L - 1:
            weights = chosen(x, "last_layer")
            sources = first, outputs[late], x
            more_values = sum(w * source for w, source in zip(weights[:3], sources, strict=True))
            x = x + sum(w * source for w, source in zip(weights[3:6], sources, strict=True))
            halves, shares = weights[6:8], weights[8:]
        elif late is None:
            shares[0] = p["residual_shares"][layer]
        else:
            shares[0], shares[4] = p["residual_shares"][layer]
            shares[3], shares[5] = p["output_shares"][layer]
        if halves is None and layer in with_attention:
            shares[1] = gates["embedding", layer]
            if config.bigram_buckets and (late is None or layer > 0):
                shares[2] = gates["bigram", layer]

        if layer in with_attention:
            weights = {n: w[with_attention.index(layer)] for n, w in p["attention"].items()}
            stream = shares[0] * x + shares[1] * (x0 if halves is None else first)
            stream = stream + shares[2] * bigrams
            if late is None:
                read = rms_norm(stream)
            else:
                read = rms_norm(x if layer <= late else outputs[late])
            q, k, v = ((read @ matrix).reshape(B, T, N, H) for matrix in weights["qkv"])
            v = weights["own_share"] * v
            own, gate = None, weights.get("mixed_share")
            if layer in tables:
                own = p["value_embed"][tables[layer]][tokens]
            elif count == 0 and first_values is not None:
                own = first_values.reshape(B, T, N * H)
            if layer in tables and config.value_gate and halves is None:
                inputs = read[:, :, :12]
                if config.value_layers:
                    inputs = np.concatenate([read[:, :, :6], own[:, :, :6]], axis=-1)
                gate = 2 * sigmoid(inputs @ p["value_gate"][num_gates])[..., None]
                num_gates += 1
            if halves is not None:  # one for each half of the channels, also within a head
                gate = np.repeat(np.concatenate(halves, axis=-1), N * H // 2, axis=-1)
                gate = gate.reshape(B, T, N, H)
                v = v + more_values.reshape(B, T, N, H)
            if own is not None:
                v = v + gate * own.reshape(B, T, N, H)
            first_values = v if first_values is None else first_values
            # Paired heads take turns: tokens are two places apart, and the second head one behind.
            pairs = layer in config.paired_heads
            places = np.arange(T)[:, None] * (1 + pairs) + np.arange(N) % 2 * pairs
            mates = [[n - n % 2, n - n % 2 + 1] if pairs else [n] for n in range(N)]
            q, k = turned(rms_norm(q), places), turned(rms_norm(k), places)
            if layer in config.key_offset:
                for i in np.flatnonzero(speeds == 0):
                    for j in (i, i + H // 2):
                        last = np.roll(k[:, :, :, j], 1, axis=1)
                        k[:, :, :, j] = np.where(begins[:, :, None], 0, last)
            window = config.windows[layer % len(config.windows)] if config.windows else 0
            y = softmax_attention(q, k, v, window, places, mates)
            if layer in config.composed:  # each head attends where another does, one by one
                given, taken = gates["given", layer], gates["taken", layer]
                given = given / np.sqrt(np.mean(given**2, axis=-1, keepdims=True) + 1e-6)
                near = min(window or np.inf, config.composed_window)
                for n, other in np.ndindex(N, N):
                    q_k = (q[:, :, [other]], k[:, :, [other]])
                    looked = softmax_attention(*q_k, v[:, :, [n]], near, places[:, :1], [[0]])
                    y[:, :, n] += (taken[:, :, n] * given[:, :, other])[..., None] * looked[:, :, 0]
            if layer in config.exclusive:
                for b, t, n in np.ndindex(B, T, N):
                    direction = v[b, t, n] / np.linalg.norm(v[b, t, n])
                    share = np.tanh(gates["exclusion", layer][b, t, n])
                    y[b, t, n] -= share * np.dot(y[b, t, n], direction) * direction
            if layer in config.gated:
                y = y * gates["gate", layer][..., None]
            if config.attention_gate:
                y = y * sigmoid(read[:, :, :12] @ weights["gate"])[..., None]
            added = weights.get("out_share", 1) * (y.reshape(B, T, N * H) @ weights["out"])
            x = stream + shares[3] * added

        added = np.maximum(rms_norm(x) @ p["mlp"]["up"][layer], 0) ** 2 @ p["mlp"]["down"][layer]
        x = shares[4] * x + shares[5] * added
        outputs.append(x)
    if config.backout is not None:
        x = x - p["backout"] * outputs[config.backout]
    if config.dynamic:
        sources = [first, outputs[late], outputs[L - 2]]
        if config.value_layers:
            sources.append(p["value_embed"][0][tokens])
        if config.skips is None:
            sources += [outputs[L - 1 - layer] for layer in range(L - L // 2, L)]
        sources += [outputs[source] for source, _ in config.skips or ()]
        weights = chosen(x, "before_head")
        x = x + sum(w * source for w, source in zip(weights, sources, strict=True))
    z = rms_norm(x) @ p["head"]
    return config.softcap * np.tanh((z + config.logit_shift) * config.logit_scale / config.softcap)


EVERY_TRICK = GPTConfig(
    vocab_size=100,
    num_layers=5,
    num_heads=4,
    width=48,
    mlp_width=48,
    mlp_only=(3,),
    windows=(3, 300, 6),  # of paired heads one is odd and one even
    rotary_windows=(40, 100, 300),
    document_separator=4,
    value_embeddings=3,
    bigram_buckets=61,
    skips=((0, 3), (1, 3), (1, 4)),
    key_offset=(0, 4),
    paired_heads=(0, 2),
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
OVERLAPPING = GPTConfig(  # the first layer and the last two are all three that there are
    vocab_size=100,
    num_layers=3,
    num_heads=1,
    width=16,
    mlp_width=24,
    value_embeddings=2,
    value_gate=False,
)
SPEEDRUN = replace(  # in layers like the speedrun's; the first table is that of a late layer
    like_the_speedrun(),
    num_heads=4,
    width=48,
    mlp_width=48,
    bigram_width=48,
    windows=(3, 300, 6),
    rotary_windows=(40, 100, 300),
    document_separator=4,
    value_layers=(4, 1, 5),
    backout=4,
    softcap=4.0,
)
LATE = GPTConfig(  # the others are not gated, and the third layer has nothing to be late
    vocab_size=100,
    num_layers=4,
    num_heads=2,
    width=32,
    mlp_width=48,
    mlp_only=(2,),
    value_embeddings=2,
    value_layers=(3, 0),
    value_gate=False,
    bigram_buckets=61,
    bigram_width=7,
    attention_source=0,
    skips=((0, 1),),
)
DYNAMIC = GPTConfig(  # the last layer's values are mixed with those of the first, too
    vocab_size=100,
    num_layers=4,
    num_heads=3,
    width=24,
    mlp_width=16,
    value_embeddings=0,
    attention_source=1,
    dynamic=True,
    softcap=4.0,
)
ALL_CHOSEN = {"exclusive": (0, 3), "gated": (0, 1), "composed": (0, 3), "attention_source": 2}
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


B, T = 2, 14
WEIGHTS = (0.5, 2.0, 0.25)  # of the losses of the next tokens
LEARNING = (EVERY_TRICK, SPEEDRUN, DYNAMIC)  # together they have every trick


@cache
def compiled(config, rematerialize=False):
    """Return a program that several tests run: it gives the objective and other outputs of a model.

    For those in LEARNING also gradients, and the arrays that are stored for the backward pass.
    """

    def outputs(params, tokens, targets):
        model = nnx.merge(graph_of(config, Kernels(rematerialize=rematerialize)), params)
        features = model.features(tokens)
        model.features = lambda tokens: features  # not to compute them thrice
        objective, losses = model.loss(tokens, targets, WEIGHTS)
        return objective, (losses, features, model(tokens))

    def outputs_and_gradients(params, tokens, targets):
        of_params = partial(outputs, tokens=tokens, targets=targets)
        objective, pullback, others = jax.vjp(of_params, params, has_aux=True)
        return objective, others, *pullback(jnp.ones_like(objective)), jax.tree.leaves(pullback)

    return jax.jit(outputs_and_gradients if config in LEARNING else outputs)


@pytest.mark.parametrize(
    "config",
    [
        EVERY_TRICK,
        VALUE_RESIDUAL,
        OVERLAPPING,
        SPEEDRUN,
        LATE,
        replace(LATE, attention_source=None),
        DYNAMIC,
        replace(DYNAMIC, mlp_only=(2,), skips=((1, 3), (0, 2)), **ALL_CHOSEN),
        BARE,
    ],
    ids=[
        *("every trick", "value residual", "overlapping", "speedrun", "late", "not late"),
        *("dynamic", "all chosen", "bare"),
    ],
)
def test_logits_and_losses_equal_a_float64_model_in_numpy(config):
    params = alive(config)
    tokens, targets = (np.array(some_tokens(config, B, T, seed)) for seed in (0, 1))
    targets[1, 9] = -1
    if config.document_separator is not None:  # two documents in one row, three in the other
        tokens[:, 5] = tokens[1, 6] = config.document_separator
    expected = numpy_logits(config, params, tokens)
    log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    expected_objective, expected_loss = np.zeros((2, B, T))
    for b, t in np.ndindex(B, T):
        expected_loss[b, t] = -log_p[b, t, targets[b, t]] if targets[b, t] >= 0 else 0
        for weight, target in zip(WEIGHTS, targets[b, t:], strict=False):
            expected_objective[b, t] -= weight * log_p[b, t, target] if target >= 0 else 0

    objective, (losses, _, logits), *_ = compiled(config)(params, tokens, targets)
    assert logits.dtype == objective.dtype == losses.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=5e-4)
    np.testing.assert_allclose(losses, expected_loss, atol=5e-4)
    np.testing.assert_allclose(objective, expected_objective, atol=1e-3)


def test_layers_may_be_counted_from_the_last_one_backwards():
    backwards = replace(
        SPEEDRUN,
        mlp_only=(-4,),
        key_offset=(1, -1),
        paired_heads=(-6, -3),
        exclusive=(-5, 4),
        gated=(1, -1),
        composed=(-1,),
    )
    params, tokens = alive(SPEEDRUN), some_tokens(SPEEDRUN, B, T)
    programs = {
        str(jax.make_jaxpr(lambda params, c=config: build(c, params)(tokens))(params))
        for config in (SPEEDRUN, backwards)
    }
    assert len(programs) == 1


# Initialization


NEW = replace(EVERY_TRICK, residual_init=1.1)
TIED = replace(
    BARE,
    vocab_size=1000,
    num_layers=8,
    num_heads=1,
    width=16,
    attention_init=1.0,
    attention_out_init=0.3,
    tied_head=True,
)


@cache
def new_params(config):
    return jax.jit(partial(init_params, config))(jax.random.key(0))


def test_a_new_model_gives_every_padded_id_the_same_probability():
    tokens = some_tokens(NEW, B, T)
    _, (losses, _, logits), *_ = compiled(EVERY_TRICK)(new_params(NEW), tokens, tokens)
    assert logits.shape == (B, T, 128)
    np.testing.assert_allclose(losses, 4.8520, atol=6e-5)
    np.testing.assert_allclose(losses, np.log(128), rtol=1e-6)


def test_a_new_model_adds_nothing_to_the_stream_and_has_no_two_matrices_alike():
    params, tokens = new_params(NEW), some_tokens(NEW, B, T)
    _, (_, features, _), *_ = compiled(EVERY_TRICK)(params, tokens, tokens)
    # Every projection back to the stream starts at zero: the embedding passes through.
    x = np.asarray(params["embed"], "f8")[tokens]
    np.testing.assert_allclose(features, x / np.sqrt((x**2).mean(-1, keepdims=True)), atol=1e-5)
    for matrices in (params["attention"]["qkv"], params["mlp"]["up"]):
        flat = np.asarray(matrices).reshape(-1, *matrices.shape[-2:])
        assert len(np.unique(flat[:, 0, 0])) == len(flat)


def test_shares_and_gates_begin_as_in_the_speedrun():
    params = new_params(NEW)
    numbers = {
        "residual_shares": np.full(5, 1.1, "f4"),
        "embedding_shares": np.zeros(5),
        "bigram_shares": np.full(5, 0.1, "f4"),
        "bigram_embed": np.zeros((61, 48)),
        "value_embed": np.zeros((3, 128, 48)),
        "value_gate": np.zeros((4, 12, 4)),
        "skip_gate": np.zeros((3, 12, 1)),
        "skips": [-1.5] * 3,
        "backout": 0.5,
    }
    for name, expected in numbers.items():
        np.testing.assert_array_equal(params[name], expected, err_msg=name)
    params = jax.tree.map(np.asarray, params)
    assert params["attention"]["own_share"].tolist() == [0.5] * 4
    assert params["attention"]["out_share"].tolist() == [1.0] * 4
    assert not params["attention"]["gate"].any() and not params["smear"]["gate"].any()
    assert params["smear"]["share"] == 0

    # Of narrow bigrams, which have signs, and without gates.
    params = new_params(replace(NEW, bigram_width=5, value_gate=False, skips=None))
    assert params["bigram_embed"].shape == (61, 5)
    np.testing.assert_array_equal(params["bigram_shares"], np.full(5, 0.05, "f4"))
    assert params["attention"]["mixed_share"].tolist() == [0.5] * 4
    assert params["skips"].tolist() == [1.0] * 2
    assert "out_share" not in params["attention"]
    assert not {"value_gate", "skip_gate"} & params.keys()


def test_late_attentions_and_dynamic_connections_begin_as_in_the_speedrun():
    params = jax.tree.map(np.asarray, new_params(SPEEDRUN))
    numbers = {  # of all but the last layer
        "residual_shares": np.full((5, 2), 1.1**0.5, "f4"),
        "output_shares": np.ones((5, 2)),
        "bigram_embed": np.zeros((128, 48)),
        "value_gate": np.zeros((2, 12, 4)),
        "skips": [-1.5],
    }
    assert not {"embedding_shares", "bigram_shares", "skip_gate"} & params.keys()
    for name, expected in numbers.items():
        np.testing.assert_array_equal(params[name], expected, err_msg=name)
    assert "gate" not in params["attention"]
    params |= params["dynamic"]
    assert params["gate_scale"] == np.float32(0.1)
    sizes = {"last_layer": 14, "before_head": 5, "early_gates": 12, "late_gates": 21}
    for part, weights in sizes.items():
        assert not params[part]["down"].any() and params[part]["down"].shape == (64, weights)
    # Three sources of values and three of the stream, two gates, and the weights of all sums.
    last = [0] * 6 + [2, 2, 1.1**0.5, 0, 0.05, 1, 1.1**0.5, 1]
    np.testing.assert_allclose(0.1 * params["last_layer"]["bias"], last, rtol=1e-6)
    np.testing.assert_allclose(0.1 * params["before_head"]["bias"], [0, -0.5, 0, 0, 0], rtol=1e-6)
    tables = params["value_embed"]
    assert tables.shape == (3, 128, 48)
    assert np.std(tables, axis=(1, 2)) == pytest.approx(0.01, rel=0.06)
    assert len(np.unique(tables)) > 0.99 * tables.size


def test_first_matrices_are_uniform_and_those_of_attention_as_wide_as_the_model_says():
    params = jax.tree.map(np.asarray, new_params(TIED))
    for matrices, deviation in (
        (params["attention"]["qkv"], 1 / 4),
        (params["attention"]["out"], 0.3 / 4),
        (params["mlp"]["up"], 0.5 / 4),
    ):
        assert matrices.std() == pytest.approx(deviation, rel=0.03)
        assert 1.7 < abs(matrices).max() / deviation <= 3**0.5
    # No two matrices are alike but for their size.
    first = [
        *params["attention"]["qkv"][:, :, 0, 0].ravel(),
        *params["attention"]["out"][:, 0, 0] / 0.3,
    ]
    assert np.diff(np.sort(first)).min() > 1e-6


def test_a_tied_head_begins_as_the_embedding_and_both_are_small():
    tied, apart = (jax.tree.map(np.asarray, new_params(config)) for config in (TIED, NEW))
    np.testing.assert_array_equal(tied["head"], tied["embed"].T)
    assert tied["embed"].std() == pytest.approx(0.005, rel=0.02)
    assert apart["embed"].std() == pytest.approx(1, rel=0.02)
    assert not apart["head"].any()


# Causality


def influence(config):
    """For each token table: does position j (column) affect the output at position t (row)?

    No token is repeated, so a row of a table is looked up at one position only.
    """
    params = alive(config)
    tokens = np.random.default_rng(1).permutation(config.vocab_size)[:T]
    pairs = pairwise([0, *tokens.tolist()])
    found = [bucket_of(token, before, config.bigram_buckets) for before, token in pairs]
    assert len(set(found)) == T
    rows = {"embed": tokens, "value_embed": tokens, "bigram_embed": np.array(found)}
    # The model with its own tables, and then with one row of one table changed.
    tables = {name: np.repeat(params[name][None], 1 + len(rows) * T, axis=0) for name in rows}
    for number, (name, row) in enumerate(rows.items()):
        tables[name][1 + T * number + np.arange(T), ..., row, :] += 1
    # One row at a time: the bits of a product may depend on its position in the batch.
    logits = jax.jit(
        lambda tables: jax.lax.map(
            lambda own: build(config, params | own)(jnp.asarray(tokens[None]))[0], tables
        )
    )(tables)
    differs = np.any(logits[1:] != logits[0], axis=-1)
    return dict(zip(rows, differs.reshape(len(rows), T, T).swapaxes(1, 2), strict=True))


@pytest.mark.parametrize(
    ("how", "reach", "bigram_reach", "value_reach"),
    [
        # Only the embedding is smeared, and values that are looked up are in no key.
        (
            {"windows": (3, 2), "smear": True, "mlp_only": (1,), "key_offset": (0, 2)},
            *(1 + 3 + 0 + 3, 3 + 0 + 3, 2 + 0 + 3),
        ),
        # A token has two keys where heads are paired, and the first of them is its own place.
        ({"windows": (5, 2), "paired_heads": (0, 1)}, 2 + 1 + 4, 2 + 1 + 4, 2 + 1 + 4),
        # The second and the third layer both read what the first one put out.
        (
            {"windows": (2, 5), "bigram_width": 7, "attention_source": 0, "value_layers": (2, 0)},
            *(1 + 4, 1 + 4, 1 + 4),
        ),
        # In the values of the last one is also the stream, to which the second one has added.
        # Gates read their own token, and composed heads what the layer sees.
        (
            {"windows": (2, 5), "attention_source": 0, "dynamic": True, "exclusive": (0, 1, 2)}
            | {"gated": (0, 1, 2), "composed": (0, 2)},
            *(1 + 4 + 1, 1 + 4 + 1, 1 + 4 + 1),
        ),
    ],
)
def test_what_is_looked_up_reaches_exactly_the_positions_that_may_see_it(
    how, reach, bigram_reach, value_reach
):
    # A window of w lets a layer look w - 1 tokens back, a key that is of two tokens 1 more, and
    # layers add up.
    config = GPTConfig(
        vocab_size=100,
        num_layers=3,
        num_heads=2,
        width=16,
        mlp_width=32,
        value_embeddings=2,
        bigram_buckets=4096,
        **({"smear": False} | how),
    )
    back = np.arange(T)[:, None] - np.arange(T)[None, :]
    reaches = {"embed": reach, "bigram_embed": bigram_reach, "value_embed": value_reach}
    found = influence(config)
    assert found.keys() == reaches.keys()
    for name, furthest in reaches.items():
        np.testing.assert_array_equal(found[name], (back >= 0) & (back <= furthest), err_msg=name)


def logits_of(config, rows):
    """Return the logits of rows [n, T], one at a time: bits may depend on the place in a batch."""
    run, params = compiled(config), alive(config)
    both = (np.stack([row] * B) for row in rows)
    return np.stack([run(params, tokens, tokens)[1][-1][0] for tokens in both])


@pytest.mark.parametrize("config", [EVERY_TRICK, SPEEDRUN], ids=["every trick", "speedrun"])
def test_no_output_depends_on_a_later_token(config):
    # By changing tokens: bigram buckets depend on integers.
    tokens = 5 + np.array(some_tokens(config, 1, T)) % 90  # a single document
    changed = tokens + np.eye(T, dtype=int)  # row j has another token j
    logits = logits_of(config, np.concatenate([tokens, changed]))
    differs = np.any(logits[1:] != logits[0], axis=-1)
    np.testing.assert_array_equal(differs, np.triu(np.ones((T, T), bool)))


@pytest.mark.parametrize("config", [EVERY_TRICK, SPEEDRUN], ids=["every trick", "speedrun"])
def test_each_document_of_a_row_has_the_logits_that_it_has_alone(config):
    def logits(begin):
        """Return those of three documents in a row, and of each at the start of a row."""
        # A row may begin in the middle of a document.
        row = np.array([9, 16, 33, 2, begin, 7, 7, 50, 9, begin, 33, 2, 8, 61])
        first, second, third = logits_of(config, [np.roll(row, -start) for start in (0, 4, 9)])
        return first, np.concatenate([first[:4], second[:5], third[:5]])

    together, alone = logits(config.document_separator)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    # With another token instead of the separator they see each other.
    together, alone = logits(3)
    differs = abs(together - alone).max(axis=1) > 0.05
    assert differs.tolist() == [False] * 4 + [True] * 10


# The tricks one by one, compared with their formulas


def fixed(*shape, seed=0):
    """Return numbers near one, of both signs, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


@pytest.fixture
def run_on_values(monkeypatch):
    """Runs a model in which each query takes the value of its own token only.

    Returns its features, which layers had attention, and the values of each.
    """

    def run(config, params, tokens):
        layers, given = [], []

        def attend(q, k, v, layer):
            layers.append(layer)
            given.append(v.reshape(*tokens.shape, -1))
            return v

        monkeypatch.setattr(
            GPT, "attend", lambda self, past, layer, gates, *qkv: attend(*qkv, layer)
        )
        features, values = jax.jit(lambda params: (build(config, params).features(tokens), given))(
            params
        )
        return features, layers, values

    return run


def test_before_moves_everything_one_token_on_but_not_into_another_document():
    x, tokens = np.arange(1, 13).reshape(2, 3, 2), np.array([[8, 5, 9], [5, 7, 5]])
    for separator, kept in ((None, np.ones((2, 3))), (5, [[1, 0, 1], [1, 1, 0]])):
        config = replace(BARE, document_separator=separator)
        found = jax.jit(
            lambda tokens, *arrays, c=config: [
                Rows(c, tokens, "xla").before("a", x) for x in arrays
            ]
        )(tokens, x, x[..., 0])
        moved = np.array([[[0, 0], [1, 2], [3, 4]], [[0, 0], [7, 8], [9, 10]]])
        expected = moved * np.array(kept, int)[..., None]
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], expected[..., 0])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("values_gated", [True, False])
def test_attention_mixes_its_values_and_gates_what_each_head_takes(gated, values_gated):
    config = replace(
        BARE,
        num_heads=2,
        width=16,
        attention_gate=gated,
        value_embeddings=1,
        value_gate=values_gated,
    )
    x, mixed_in = fixed(2, 1, 3, 16)
    qkv, out, gate = fixed(3, 16, 16, seed=1), fixed(16, 16, seed=2), fixed(12, 2, seed=3)
    given_share = fixed(1, 3, 2, 1, seed=4) if values_gated else None

    def attend(q, k, v):  # any function of all three shows whether each is what it should be
        return v + 2 * q - 3 * k

    @jax.jit
    def run(x, mixed_in, given_share):
        layer = Attention(config, rngs=nnx.Rngs(0))
        layer.qkv, layer.out = nnx.Param(jnp.asarray(qkv)), nnx.Param(jnp.asarray(out))
        layer.own_share = nnx.Param(jnp.array(0.7))
        assert hasattr(layer, "gate") == gated
        assert hasattr(layer, "out_share") == values_gated != hasattr(layer, "mixed_share")
        if gated:
            layer.gate = nnx.Param(jnp.asarray(gate))
        if values_gated:
            layer.out_share = nnx.Param(jnp.array(1.4))
        else:
            layer.mixed_share = nnx.Param(jnp.array(-1.5))
        return layer(x, mixed_in, given_share, attend, "xla"), layer(x, None, None, attend, "xla")

    share = given_share.astype("f8") if values_gated else -1.5
    mixed_in_by_head = mixed_in.astype("f8").reshape(1, 3, 2, 8)
    for (added, values), mixed in zip(
        run(x, mixed_in, given_share), (share * mixed_in_by_head, 0), strict=True
    ):
        q, k, v = (each.reshape(1, 3, 2, 8) for each in x.astype("f8") @ qkv[:, None])
        v = 0.7 * v + mixed
        np.testing.assert_allclose(values, v.reshape(1, 3, 16), atol=1e-4)
        y = v + 2 * q - 3 * k
        if gated:
            opened = sigmoid(x[:, :, :12].astype("f8") @ gate)
            assert np.ptp(opened) > 0.3
            y = y * opened[..., None]
        expected = y.reshape(1, 3, 16) @ out * (1.4 if values_gated else 1)
        np.testing.assert_allclose(added, expected, atol=1e-3)


@jax.jit
def attention_by(shares, x, mixed_in, y):
    """Return the values of an attention with an output y [T, N, H], and what it makes of y.

    As it is, with these shares of exclusion, and with these gates.
    """
    layer = Attention(replace(BARE, num_heads=2, width=16), rngs=nnx.Rngs(0))
    layer.out = nnx.Param(jnp.eye(16))
    given = x[None], mixed_in[None], 1.0, lambda q, k, v: y[None], "xla"
    each = (
        layer(*given, exclusion, gate)
        for exclusion, gate in ((None, None), (shares[None], None), (None, shares[None]))
    )
    (plain, values), (exclusive, _), (gated, _) = each
    return [a[0].reshape(y.shape) for a in (values, plain, exclusive, gated)]


def exclusive_attention(shares, x, mixed_in, y):
    """Return what is left of an attention's output y [T, N, H], and its values [T, N, H].

    Of an attention that is not exclusive, all of it is left, and of a gated one as much as its gate
    says.
    """
    shares = np.broadcast_to(np.asarray(shares, "f4"), y.shape[:2])
    v, plain, exclusive, gated = attention_by(shares, x, mixed_in, y)
    np.testing.assert_allclose(plain, y, rtol=1e-6)
    np.testing.assert_allclose(gated, y * shares[..., None], rtol=1e-5)
    return np.asarray(exclusive, "f8"), np.asarray(v, "f8")


def test_exclusive_attention_takes_away_a_share_of_its_part_along_the_tokens_own_value():
    x, mixed_in = fixed(2, 5, 16)
    y = fixed(5, 2, 8, seed=1)
    shares = np.array([[0.6, -1.2], [0.3, 0.4], [-0.7, 2.0], [0.5, 0.9], [1.5, -0.3]])
    found, v = exclusive_attention(shares, x, mixed_in, y)
    for t, n in np.ndindex(5, 2):
        projection = np.outer(v[t, n], v[t, n]) / np.dot(v[t, n], v[t, n])
        expected = y[t, n] - np.tanh(shares[t, n]) * projection @ y[t, n]
        assert np.linalg.norm(expected - y[t, n]) > 0.01
        np.testing.assert_allclose(found[t, n], expected, atol=1e-5)


def test_with_a_large_share_the_output_is_orthogonal_to_the_tokens_own_value():
    x, mixed_in = fixed(2, 5, 16)
    y = fixed(5, 2, 8, seed=1)
    found, v = exclusive_attention((20.0, -20.0), x, mixed_in, y)
    along, before = (np.sum(each * v, axis=-1) for each in (found, y))
    assert abs(before).min() > 0.05
    np.testing.assert_allclose(along[:, 0], 0, atol=1e-5)
    np.testing.assert_allclose(along[:, 1], 2 * before[:, 1], rtol=1e-4)  # doubled instead
    # A token without a value has no such direction, and keeps its output.
    found, v = exclusive_attention((20.0, -20.0), 0 * x, 0 * mixed_in, y)
    assert not v.any()
    np.testing.assert_array_equal(found, y)


@pytest.mark.parametrize(
    ("num_layers", "count", "mlp_only", "tables"),
    [
        (11, 3, (6,), {0: 1, 1: 2, 8: 0, 9: 1, 10: 2}),
        (12, 3, (), {0: 1, 1: 2, 9: 0, 10: 1, 11: 2}),
        (5, 3, (1, -2), {0: 1, 2: 0, 4: 2}),
        (4, 2, (), {0: 1, 2: 0, 3: 1}),
        (3, 2, (), {0: 1, 1: 0, 2: 1}),
        (2, 2, (), {0: 0, 1: 1}),
        (3, 1, (), {2: 0}),
        (3, 1, (2,), {}),  # of a layer without values
        (3, 0, (), {}),
    ],
)
def test_the_last_layers_and_but_for_the_first_table_the_first_have_value_embeddings(
    num_layers, count, mlp_only, tables
):
    config = replace(BARE, num_layers=num_layers, value_embeddings=count, mlp_only=mlp_only)
    config.check()
    params, tokens = alive(config), some_tokens(config, B=1, T=4)
    assert all(leaf.size for leaf in jax.tree.leaves(params))
    found, gates = build(config, params).value_embeddings(tokens)
    assert config.value_tables == tables
    assert list(found) == sorted(tables)
    for layer, table in tables.items():
        np.testing.assert_array_equal(found[layer], params["value_embed"][table][tokens])
    assert list(gates) == sorted(tables)
    for number, layer in enumerate(gates):
        np.testing.assert_array_equal(gates[layer], params["value_gate"][number])


@pytest.mark.parametrize("dynamic", [True, False])
def test_named_layers_have_value_embeddings_of_their_own_in_the_order_they_are_named(dynamic):
    config = replace(
        BARE,
        num_layers=5,
        mlp_only=(2,),
        value_embeddings=3,
        value_layers=(4, 0, 3),
        attention_source=1,
        dynamic=dynamic,
    )
    config.check()
    params, tokens = alive(config), some_tokens(config, B=1, T=4)
    found, gates = build(config, params).value_embeddings(tokens)
    assert config.value_tables == {0: 1, 3: 2, 4: 0}
    assert list(found) == [0, 3, 4]
    for layer, table in config.value_tables.items():
        np.testing.assert_array_equal(found[layer], params["value_embed"][table][tokens])
    # Dynamic connections open the last one's.
    assert list(gates) == ([0, 3] if dynamic else [0, 3, 4])
    for number, layer in enumerate(gates):
        np.testing.assert_array_equal(gates[layer], params["value_gate"][number])


def test_without_value_embeddings_the_first_values_are_mixed_into_all_later_ones(run_on_values):
    config = replace(BARE, num_layers=4, mlp_only=(1,))
    params, tokens = alive(config), some_tokens(config, B=1, T=4)
    # Nothing is added to the stream: each layer reads the normalized embedding.
    params["attention"]["out"][:] = params["mlp"]["down"][:] = params["skips"][:] = 0
    params["residual_shares"][:], params["embedding_shares"][:] = 1, 0
    params["attention"]["own_share"] = np.array([0.8, 0.5, 1.1], "f4")
    params["attention"]["mixed_share"] = np.array([9, -0.6, 0.3], "f4")
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
    # The stream is mixed with the embedding in layers with attention only.
    params["residual_shares"][:], params["embedding_shares"][:] = (7, 1.2, 8), (5, 0.4, 6)
    params["skips"][:], params["backout"] = 0, 0.3
    found, layers, _ = run_on_values(config, params, tokens)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, "f8"), params)

    def mlp(x, layer):
        return np.maximum(rms_norm(x) @ p["mlp"]["up"][layer], 0) ** 2 @ p["mlp"]["down"][layer]

    x0 = rms_norm(p["embed"][tokens])
    x = x0 + mlp(x0, 0)
    x = 1.2 * x + 0.4 * x0
    value = p["attention"]["own_share"][0] * rms_norm(x) @ p["attention"]["qkv"][0, 2]
    x = x + value @ p["attention"]["out"][0]
    x = taken_back = x + mlp(x, 1)
    x = x + mlp(x, 2)
    assert layers == [1]
    assert "backout" not in alive(BARE)
    assert {len(leaf) for leaf in params["attention"].values()} == {1}
    np.testing.assert_allclose(found, rms_norm(x - 0.3 * taken_back), atol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_skips_lead_from_layer_to_layer_and_may_be_gated_by_what_the_first_layer_reads(gated):
    pairs = ((0, 2), (1, 2), (0, 3)) if gated else None
    config = replace(BARE, num_layers=4, mlp_only=(0, 1, 2), skips=pairs)
    params, tokens = alive(config), some_tokens(config, B=2, T=4)
    params["attention"]["out"][:] = 0
    params["residual_shares"][:], params["embedding_shares"][:] = 1, 0

    p = jax.tree.map(lambda leaf: np.asarray(leaf, "f8"), params)
    x = x0 = rms_norm(p["embed"][tokens])
    outputs = []
    for layer in range(4):
        for number, (source, target) in enumerate(pairs or ((1, 2), (0, 3))):
            if target == layer:
                share = p["skips"][number]
                if gated:
                    opened = 2 * sigmoid(x0[:, :, :12] @ p["skip_gate"][number][:, 0])
                    assert 0.01 < opened.min() < 0.8 and 1.2 < opened.max() < 1.99
                    share = opened[:, :, None] * sigmoid(share)
                x = x + share * outputs[source]
        read = rms_norm(x)
        x = x + np.maximum(read @ p["mlp"]["up"][layer], 0) ** 2 @ p["mlp"]["down"][layer]
        outputs.append(x)
    found = jax.jit(lambda params: build(config, params).features(tokens))(params)
    np.testing.assert_allclose(found, rms_norm(x), atol=1e-4)


def test_each_layer_reads_shares_of_the_stream_the_embedding_and_the_pairs_that_tokens_end():
    config = replace(BARE, num_layers=3, bigram_buckets=64, skips=())
    params = alive(config)
    # Nothing else is added to the stream: it is a sum of the embedding and of the pairs'.
    params["attention"]["out"][:] = params["mlp"]["down"][:] = 0
    params["residual_shares"][:] = 1.1, 0.5, -2
    params["embedding_shares"][:] = 0.25, 0, 3
    params["bigram_shares"][:] = 0.1, 10, 0.7
    tokens = np.array([[5, 9, 5]])
    x0 = rms_norm(params["embed"].astype("f8")[tokens])
    hashed = [  # the pairs (nothing, 5), (5, 9) and (9, 5)
        (0x9E3779B1 * token ^ 0x85EBCA77 * last) % 2**32 for last, token in ((0, 5), (5, 9), (9, 5))
    ]
    pairs = params["bigram_embed"].astype("f8")[[[(x ^ x >> 15) % 64 for x in hashed]]]
    expected = 1.35 * x0 + 0.1 * pairs
    expected = 0.5 * expected + 10 * pairs
    expected = -2 * expected + 3 * x0 + 0.7 * pairs
    found = jax.jit(lambda params: build(config, params).features(jnp.asarray(tokens)))(params)
    np.testing.assert_allclose(found, rms_norm(expected), atol=1e-5)


@cache
def seeing_attentions():
    """Return a program, and parameters: features, and what q, k and v each attention got.

    The model has dynamic connections, and late attentions from layer 4 on.
    """
    config = replace(like_the_speedrun(), num_layers=7, skips=())
    tokens, given, attend = some_tokens(config, B=1, T=6), {}, GPT.attend

    def seen(self, past, layer, gates, q, k, v):
        given[layer] = q, k, v
        return attend(self, past, layer, gates, q, k, v)

    @jax.jit
    def run(params):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GPT, "attend", seen)
            return build(config, params).features(tokens), given

    return run, alive(config)


def changed(params, name, layer, place=()):
    """Return the parameters with those of one layer changed."""
    new = jax.tree.map(np.copy, params)
    array = new
    for part in name.split("."):
        array = array[part]
    array[(layer, *place)] += 0.5
    return new


def same(one, other):
    return [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]


def test_late_attentions_do_not_see_what_layers_after_their_source_do_to_the_stream():
    run, params = seeing_attentions()
    features, before = run(params)
    assert list(before) == [0, 1, 3, 4, 5, 6]
    # Of the gates of layers 2 to 6, two exclude, four gate heads, and pairs weigh embeddings and
    # bigrams of layers 3, 4 and 5.
    for name, layer, place in (
        ("mlp.down", 4, ()),
        ("attention.out", 4, ()),  # of layer 5, the fifth with attention
        ("residual_shares", 4, ()),
        ("dynamic.late_gates.bias", 4 + 4, ()),
        ("dynamic.late_gates.bias", 4 + 3, ()),
        ("output_shares", 5, (1,)),
    ):
        now, after = run(changed(params, name, layer, place))
        assert abs(now - features).max() > 1e-3, name
        for late in (4, 5):
            assert same(after[late], before[late]) == [True] * 3, name
        # Into the values of dynamic connections goes the stream before them, too.
        assert same(after[6], before[6]) == [True, True, False], name
    # They all see what the source did last.
    _, after = run(changed(params, "mlp.down", 3))
    for late in (4, 5, 6):
        assert same(after[late], before[late]) == [False] * 3


def test_attentions_up_to_the_source_of_late_ones_read_the_stream_before_embeddings_are_added():
    run, params = seeing_attentions()
    features, before = run(params)
    for name, *place in (
        ("residual_shares", 1, 0),
        ("residual_shares", 1, 1),
        ("output_shares", 1, 0),
        # Two numbers exclude, two gate heads, two weigh the embeddings of layer 0, two of layer 1.
        ("dynamic.early_gates.bias", 6),
        ("dynamic.early_gates.bias", 7),
    ):
        now, after = run(changed(params, name, place[0], place[1:]))
        assert abs(now - features).max() > 1e-3, (name, place)
        assert same(after[1], before[1]) == [True] * 3, (name, place)
        assert same(after[3], before[3]) == [False] * 3, (name, place)


def test_with_late_attentions_the_stream_begins_with_the_first_share_of_the_bigrams():
    config = replace(LATE, num_layers=2, mlp_only=(), value_embeddings=0, value_layers=(), skips=())
    params, tokens = alive(config), some_tokens(config, B=1, T=6)
    # Nothing is added but embeddings.
    params["attention"]["out"][:] = params["mlp"]["down"][:] = 0
    params["residual_shares"][:] = [[2, 1.5], [0.5, -1]]
    params["embedding_shares"][:], params["bigram_shares"][:] = (0.3, 0.7), (0.4, 10)
    found = jax.jit(lambda params: build(config, params).features(tokens))(params)

    embedded = params["embed"].astype("f8")[tokens[0]]
    smear = sigmoid(embedded[:, :12] @ params["smear"]["gate"]) * params["smear"]["share"]
    embedded[1:] += smear[1:] * embedded[:-1].copy()
    pairs = [*pairwise([0, *tokens[0].tolist()])]
    bigrams = np.zeros((6, 32))
    for n, (before, token) in enumerate(pairs):
        row = params["bigram_embed"][bucket_of(token, before, 61)]
        bigrams[n, :7] = row * signs_of(token, before, 7)
    x0 = rms_norm(embedded)
    x = 1.5 * (2 * (x0 + 0.4 * bigrams) + 0.3 * x0)
    x = -(0.5 * x + 0.7 * x0 + 10 * bigrams)
    np.testing.assert_allclose(found[0], rms_norm(x), atol=1e-5)


def test_the_half_of_a_key_that_is_not_rotated_is_that_of_the_token_before():
    config = replace(
        BARE, num_layers=2, num_heads=2, width=16, key_offset=(1,), rope_base=10.0, windows=(3,)
    )
    tokens = some_tokens(config, B=1, T=5)
    q, k, v = fixed(3, 1, 5, 2, 8)
    found = jax.jit(
        lambda params, *qkv: [
            build(config, params).attend(Rows(config, tokens, "xla"), layer, {}, *qkv)
            for layer in range(2)
        ]
    )(alive(config), q, k, v)

    # Of 4 pairs (i, i + 4) two rotate, by 1 and 0.1 radians per token, and two do not.
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
    logits = jax.jit(build(config, params).logits)(features)
    np.testing.assert_allclose(logits + 11.5, published, atol=1e-4)


def test_the_tokens_after_the_next_are_scored_up_to_the_end_of_a_row():
    # All features are equal, so are the logits, and a loss depends only on its target.
    tokens, targets = np.zeros((1, 5), int), np.array([[7, 8, -1, 9, 10]])

    @jax.jit
    def run(params, tokens, targets):
        model = build(BARE, params)
        several = model.loss(tokens, targets, (1.0, 0.5, 0.25))
        return model(tokens)[0, 0], several, model.loss(tokens, targets)

    logits, (objective, losses), of_next = run(alive(BARE), tokens, targets)
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
    for each in (losses, *of_next):
        np.testing.assert_allclose(each[0], [cost[t] for t in targets[0].tolist()], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "idle"),
    [
        # In layers without attention, nothing is mixed into the stream.
        (EVERY_TRICK, {f"{x}_shares": [3] for x in ("residual", "embedding", "bigram")}),
        (SPEEDRUN, {"residual_shares": [(2, 0)], "output_shares": [(2, 0)]}),
        (
            DYNAMIC,
            {
                "attention.mixed_share": [0, 3],
                "dynamic.last_layer.down": [(0, 10)],
                "dynamic.last_layer.bias": [10],
            },
        ),
    ],
    ids=["every trick", "speedrun", "dynamic"],
)
def test_every_parameter_learns_but_shares_of_what_is_not_there(config, idle):
    tokens = some_tokens(config, B, T)
    *_, gradients, _ = compiled(config)(alive(config), tokens, tokens)
    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.device_get(gradients)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # Every share and gate, and each output of every matrix and table; an MLP's neuron may not.
        if gradient.ndim > 1 and not name.endswith("_shares"):
            within = (-2, -1) if name.startswith("mlp") else -2
            gradient = gradient.any(axis=within, keepdims=True)
        places = [[*np.ravel(place)] for place in idle.get(name, [])]
        assert np.argwhere(gradient == 0).tolist() == places, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_relu_squared_is_that_of_its_formula_and_keeps_one_array(dtype):
    rng = np.random.default_rng(0)
    x, above = rng.standard_normal((2, 500)).astype(dtype)
    out, pullback = jax.vjp(jax.jit(relu_squared), x)
    exact = np.maximum(np.asarray(x, "f8"), 0)
    rounding = {"float32": 3e-7, "bfloat16": 2**-7}[dtype]
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, "f8"), exact**2, rtol=rounding)
    (gradient,) = pullback(above)
    assert gradient.dtype == dtype
    expected = 2 * exact * np.asarray(above, "f8")
    np.testing.assert_allclose(np.asarray(gradient, "f8"), expected, rtol=3 * rounding)
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)] == [(500,)]


@pytest.mark.parametrize("config", [EVERY_TRICK, DYNAMIC], ids=["every trick", "dynamic"])
def test_layers_computed_again_have_the_same_losses_and_gradients_and_keep_less(config):
    params, tokens = alive(config), some_tokens(config, B, T)
    (found, *_, gradients, kept), (again_found, *_, again_gradients, again) = (
        run(params, tokens, tokens) for run in (compiled(config), compiled(config, True))
    )
    np.testing.assert_allclose(again_found, found, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (gradients, again_gradients)), strict=True):
        assert relative_error(other, one) < 1e-5
    # No scores, a number per query and key, are stored for the backward pass.

    def scores(kept):
        return [each for each in kept if sum(n in (T, 2 * T) for n in each.shape) == 2]

    assert len(scores(kept)) >= config.num_attentions
    assert not scores(again)


def test_norm_gives_a_mean_square_of_one_to_all_but_the_smallest():
    x = np.random.default_rng(0).standard_normal((6, 64))
    x = (x * [[0], [1e-4], [1e-3], [1], [9], [1e4]]).astype("f4")
    mean_square = np.mean(np.square(x, dtype="f8"), axis=-1)
    found = np.mean(np.square(jax.jit(norm)(x)), axis=-1)
    np.testing.assert_allclose(found, mean_square / (mean_square + 2**-23), rtol=1e-4)
    assert found[1] < 0.2 and (found[3:] > 0.999).all()


# Precision


@pytest.mark.parametrize("config", [EVERY_TRICK, SPEEDRUN], ids=["every trick", "speedrun"])
def test_in_bfloat16_the_model_agrees_with_float32_to_the_accuracy_of_bfloat16(config):
    params, tokens = alive(config), some_tokens(config, B, T)
    if config.dynamic:  # near their beginning: if the stream nearly cancels, errors grow
        new = dict(new_params(config)["dynamic"])
        for name in ("last_layer", "before_head", "early_gates", "late_gates"):
            new[name] = new[name] | {"down": 0.2 * params["dynamic"][name]["down"]}
        params["dynamic"] = new

    @jax.jit
    def run(params):
        model = build(config, compute_copy(params, "bfloat16"))
        features = model.features(tokens)
        return features, model.logits(features)

    _, (_, *exact), *_ = compiled(config)(params, tokens, tokens)
    rough = run(params)
    assert [array.dtype for array in rough] == ["bfloat16", "float32"]
    for found, expected in zip(rough, exact, strict=True):
        # bfloat16 rounds to 8 bits, 0.4%: the error is a few of these, but not zero.
        assert 2e-3 < relative_error(found, expected) < 0.03


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    # In bfloat16 a sum of 2048 equal terms stops growing at a few hundred.
    tokens, one = np.zeros((8, 256), int), np.full((8, 256), -1)
    one[0, 0] = 0

    @jax.jit
    def gradient(params, tokens, targets):
        def loss(params):
            return build(BARE, compute_copy(params, "bfloat16")).loss(tokens, targets)[0].sum()

        return jax.grad(loss)(params)["embed"]

    # They are equal because the features of equal tokens are.
    exact, rough = (gradient(alive(BARE), tokens, targets) for targets in (one, tokens))
    assert rough.dtype == jnp.float32
    assert relative_error(rough, 2048 * exact) < 0.05
