"""Decoding with a cache, compared with full passes over the text, and with the softmax."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

import nanogpt.model.gpt
from nanogpt.config import GPTConfig
from nanogpt.inference.generate import CHUNK, generate
from nanogpt.inference.sampling import Sampling
from nanogpt.model.context import Cache, Next, Prompts
from nanogpt.model.rotary import rotation
from nanogpt.training.step import graph_of, param_shapes
from tests.conftest import like_the_speedrun, with_every_trick

CONTEXT = 20  # between the windows of 8 and 24 that the layers have in turn
PROMPTS = ([99, 3, 41, 7, 7, 20, 64, 5], [4], [8, 9, *[1, 2, 3, 7, 5] * 4])  # the last is cut
TOKENS = 40  # not a multiple of CHUNK
GREEDY = Sampling(temperature=0)
# The weights are large, so logits of the same text, summed in another order, differ by up to 2e-4.
CLOSE = 1e-3

# Each accesses earlier tokens differently; the first two have no layer without a window.
MODELS = {
    "every trick": replace(with_every_trick(), document_separator=7),
    "the speedrun": replace(like_the_speedrun(), document_separator=7),
    "dense": replace(
        with_every_trick(),
        **{"windows": (), "rotary_windows": (), "value_embeddings": 0, "mlp_only": ()},
        skips=None,
    ),
}


def made_up(config):
    """Return a model's graph and parameters, none of them zero as some are before training."""
    random = np.random.default_rng(0)
    shapes = param_shapes(config)
    arrays = jax.tree.map(lambda p: np.float32(random.normal(0, 0.3, p.shape)), shapes)
    return graph_of(config), jax.device_put(arrays)


@cache
def trained(name):
    """Return those of a model with this name."""
    return made_up(MODELS[name])


def written(graph, params, prompts, num_tokens=TOKENS, **how):
    """Return all that is reported about the tokens, over all chunks."""
    how = {"context": CONTEXT, "sampling": GREEDY, "alternatives": 100} | how
    chunks = list(generate(graph, params, prompts, num_tokens=num_tokens, **how))
    assert [len(chunk.tokens) for chunk in chunks[:-1]] == [CHUNK] * (len(chunks) - 1)
    return tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))


@cache
def whole_pass(name):
    """Return a function from parameters and tokens to logits, by the training forward pass.

    Windows are at most CONTEXT tokens; rotations are those of training.
    """
    config = MODELS[name]
    turns = rotation(config)
    keys = [CONTEXT * (1 + (layer in config.paired_heads)) for layer in range(config.num_layers)]
    windows = [min(config.window(layer) or most, most) for layer, most in enumerate(keys)]
    limited = graph_of(replace(config, windows=tuple(windows)))

    @jax.jit
    def logits(params, tokens):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nanogpt.model.gpt, "rotation", lambda _: turns)
            return nnx.merge(limited, params)(tokens[None])[0]

    return logits


def last_logits(name, params, text):
    """Return the logits of the token after a text."""
    row = np.zeros(64, np.int32)  # later tokens do not change what a token sees
    row[: len(text)] = text
    return np.asarray(whole_pass(name)(params, row), "f8")[len(text) - 1]


def next_probabilities(name, text):
    return softmax(last_logits(name, trained(name)[1], text)[:100])


@pytest.mark.parametrize("name", MODELS)
def test_each_token_is_predicted_as_by_a_whole_pass_for_prompts_of_any_length_and_past_the_context(
    name,
):
    tokens, probabilities, likeliest, theirs = written(
        *trained(name), PROMPTS, sampling=Sampling(2.0)
    )
    assert tokens.shape == probabilities.shape == (TOKENS, len(PROMPTS))
    assert likeliest.shape == theirs.shape == (TOKENS, len(PROMPTS), 100)
    for number, prompt in enumerate(PROMPTS):
        text = prompt[-CONTEXT:]
        for step in range(TOKENS):
            expected = np.log(next_probabilities(name, text))  # logits, up to a common constant
            assert np.ptp(expected) > 3
            token, order = tokens[step, number], likeliest[step, number]
            assert sorted(order) == list(range(100))
            assert np.log(probabilities[step, number]) == pytest.approx(expected[token], abs=CLOSE)
            np.testing.assert_allclose(np.log(theirs[step, number]), expected[order], atol=CLOSE)
            assert (np.diff(theirs[step, number]) <= 0).all()
            text = [*text, token]
    assert len(set(tokens.ravel().tolist())) >= 30  # a few repeated tokens would prove little


def test_a_greedy_text_is_that_of_whole_passes():
    tokens, *_ = written(*trained("dense"), PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        text = prompt[-CONTEXT:]
        for _ in range(TOKENS):
            text = [*text, int(next_probabilities("dense", text).argmax())]
        assert tokens[:, number].tolist() == text[-TOKENS:]
    assert len(set(tokens.ravel().tolist())) >= 5


@pytest.mark.parametrize(
    ("make", "windows", "paired"),
    [  # of paired heads and others, odd, even and none, and shorter than what composed heads share
        (with_every_trick, (2, 1, 0, 5), (0, 2, 3)),
        (like_the_speedrun, (5, 0, 1, 6, 4, 3), (0, 3)),
    ],
)
def test_tokens_one_by_one_see_of_their_document_what_they_see_in_whole_rows(make, windows, paired):
    how = {"windows": windows, "rotary_windows": (), "paired_heads": paired}
    config = replace(make(), document_separator=7, **how)  # keys are offset in two layers
    graph, params = made_up(config)
    texts = np.array(
        [
            [3, 41, 7, 64, 5, 7, 7, 20, 9, 3, 3, 12, 7, 50, 2, 8],
            [7, 9, 30, 30, 11, 64, 7, 5, 70, 2, 7, 98, 5, 41, 2, 1],
            [9, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3, 4, 5, 6, 8],
        ]
    )
    lengths = np.array([5, 7, 1])  # before a document, at its first token, and within one

    @jax.jit
    def read(rows):
        model, past = nnx.merge(graph, params), Prompts(config, rows[:, :7])
        features = model.features(rows[:, :7], past)
        return model.features(rows), features, past.cache(jnp.array(lengths), 16)

    @jax.jit
    def go_on(cache, tokens):
        past = Next(config, cache, tokens, 16)
        return nnx.merge(graph, params).features(tokens[:, None], past)[:, 0], past.cache

    whole, features, cache = jax.tree.map(np.asarray, read(texts))
    np.testing.assert_allclose(features, whole[:, :7], atol=CLOSE)
    every = np.arange(3)
    for step in range(9):
        here = lengths + step
        features, cache = go_on(cache, texts[every, here])
        np.testing.assert_allclose(features, whole[every, here], atol=CLOSE, err_msg=step)
    assert cache.position.tolist() == [14, 16, 10]
    assert cache.reach.tolist() == [2, 6, 10]  # this many tokens of the last document


def test_logits_from_the_cache_are_those_of_a_whole_pass_at_positions_in_the_thousands():
    # In float32 the product of speed and position would be off by 1e-4 there, and scores by more.
    config = GPTConfig(
        40, num_layers=2, num_heads=2, width=32, mlp_width=16, rope_base=64.0, paired_heads=(1,)
    )
    config = replace(config, windows=(64,), value_embeddings=0)
    graph, params = made_up(config)
    params["head"] = 5 * np.asarray(params["head"])
    prompt = np.random.default_rng(1).integers(0, 40, 2100).tolist()
    tokens, probabilities, *_ = written(graph, params, [prompt], context=4096)
    text = np.array([*prompt, *tokens[:, 0].tolist()])
    logits = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, text[None])
    expected = softmax(np.asarray(logits)[0, len(prompt) - 1 : -1, :40], axis=1)
    np.testing.assert_array_equal(tokens[:, 0], expected.argmax(axis=1))
    np.testing.assert_allclose(probabilities[:, 0], expected.max(axis=1), atol=1e-4)
    assert np.ptp(expected) > 0.5


def test_angles_are_exact_however_long_a_text_is():
    speed, _ = rotation(MODELS["dense"])
    position = np.array([0, 7, 2**10, 2**20, 10**9, 2**31 // 2 - 1])
    paired = replace(MODELS["dense"], paired_heads=(0,))

    @jax.jit
    def angles(position):
        old = Cache(position, 0 * position, jnp.int32(0), {}, {}, {})
        return Next(paired, old, 0 * position, CONTEXT).angles(0, speed)[:, 0]

    angle = np.asarray(angles(position))
    places = 2 * position[:, None] + np.arange(2)
    expected = places[:, :, None] * speed
    np.testing.assert_allclose(np.cos(angle), np.cos(expected), atol=5e-6)
    np.testing.assert_allclose(np.sin(angle), np.sin(expected), atol=5e-6)


def test_in_bfloat16_the_probabilities_are_nearly_those_of_float32():
    exact, rough = (
        written(*trained("every trick"), PROMPTS, num_tokens=1, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    # Both list all tokens; sort them by id.
    exact, rough = (np.take_along_axis(x[3], np.argsort(x[2]), -1) for x in (exact, rough))
    assert 1e-4 < abs(exact - rough).max() < 0.1
    np.testing.assert_allclose(rough.sum(-1), 1, atol=0.01)


def test_the_ids_that_only_pad_the_vocabulary_never_appear():
    graph, params = trained("dense")
    # Of two opposite columns one always has a positive logit: far above all others here.
    head, padding = np.array(params["head"]), np.where(np.arange(28) < 10, 1000, -1000)
    head[:, 100:] = padding * np.random.default_rng(2).normal(size=(len(head), 1))
    params = params | {"head": head}
    assert last_logits("dense", params, PROMPTS[0]).argmax() >= 100
    for how in ({}, {"top_k": 128}, {"top_p": 0.99}):
        for temperature in (0.0, 1.0, 100.0):
            sampling = Sampling(temperature, **how)
            tokens, _, likeliest, _ = written(
                graph, params, PROMPTS, sampling=sampling, alternatives=200
            )
            assert 0 <= tokens.min() <= tokens.max() < 100
            assert likeliest.shape[2] == 100
            assert 0 <= likeliest.min() <= likeliest.max() < 100


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_likeliest_of_one_is_the_likeliest_of_all_at_any_temperature(limit):
    greedy, *_ = written(*trained("dense"), PROMPTS)
    hot, *_ = written(*trained("dense"), PROMPTS, sampling=Sampling(9.0, **limit))
    np.testing.assert_array_equal(hot, greedy)


def test_a_seed_gives_one_text_and_another_seed_another():
    texts = [
        written(*trained("dense"), PROMPTS, sampling=Sampling(seed=seed))[0].T.tolist()
        for seed in (0, 0, 1, 2**32 - 1)
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for batch in texts[1:] for text in batch}) == 9


def test_greedy_text_does_not_depend_on_the_seed():
    texts = [
        written(*trained("dense"), PROMPTS, sampling=Sampling(0.0, seed=seed))[0].tolist()
        for seed in (0, 1)
    ]
    assert texts[0] == texts[1]


@cache
def indifferent():
    """Return a model to which all tokens are alike, and the logits after each of them."""
    shape = {"num_layers": 1, "num_heads": 1, "width": 12, "mlp_width": 8}
    graph, params = made_up(GPTConfig(5, **shape, value_embeddings=0, smear=False))
    embed, head = (np.array(params[name]) for name in ("embed", "head"))
    head[:] = np.random.default_rng(3).normal(0, 0.2, head.shape)
    params |= {"embed": 0 * embed + embed[0], "head": head}
    logits = jax.jit(lambda p, tokens: nnx.merge(graph, p)(tokens))(params, np.array([[0]]))
    return graph, params, np.asarray(logits, "f8")[0, 0, :5]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(2.0, top_k=2),
        Sampling(1.0, top_p=0.7),
        Sampling(2.0, top_k=4, top_p=0.8),
    ],
)
def test_tokens_are_drawn_as_often_as_the_softmax_of_their_logits_says(sampling):
    graph, params, logits = indifferent()
    odds = np.exp(logits / sampling.temperature)
    order = np.argsort(-odds)
    odds[order[sampling.top_k or 5 :]] = 0
    kept, total = 0, 0.0
    while total < sampling.top_p - 1e-9 and kept < 5:  # the fewest that reach it
        total += odds[order[kept]] / odds.sum()
        kept += 1
    odds[order[kept:]] = 0
    expected = odds / odds.sum()

    rows, steps = 50, 80
    tokens, probabilities, *_ = written(
        graph, params, [[0]] * rows, num_tokens=steps, context=2, sampling=sampling
    )
    drawn = np.bincount(tokens.ravel(), minlength=5) / tokens.size
    deviation = np.sqrt(expected * (1 - expected) / tokens.size)
    assert (abs(drawn - expected) <= 4 * deviation).all()
    assert (expected > 0.05).sum() >= 2
    # The reported probabilities are the model's own, independent of the sampling.
    own = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(probabilities, own[tokens], atol=1e-5)


def test_samples_of_one_prompt_differ_and_none_depends_on_how_many_there_are_or_how_long():
    graph, params, _ = indifferent()
    many, one = (
        written(graph, params, [[0]] * rows, steps, context=2, sampling=Sampling(1.0))[0].T.tolist()
        for rows, steps in ((50, 80), (1, 20))
    )
    assert len(set(map(tuple, many))) == 50
    assert one[0] == many[0][:20]


def test_programs_are_shared_by_prompts_and_texts_of_nearly_the_same_length():
    from nanogpt.inference.generate import _read, _write

    graph, params, _ = indifferent()
    written(graph, params, [[1] * 9], num_tokens=5, context=64)
    before = _read._cache_size(), _write._cache_size()
    for length, num_tokens in ((10, 6), (16, 16), (12, 20)):
        sampling = Sampling(0.3 * length, seed=length)
        written(graph, params, [[1] * length], num_tokens, context=64, sampling=sampling)
    # The texts of 28 and 32 tokens share a cache of 32.
    assert (_read._cache_size(), _write._cache_size()) == (before[0] + 1, before[1] + 1)
