"""Decoding, held against a loop that runs the model on the text so far, and against its softmax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config import GPTConfig
from nanogpt.generate import generate
from nanogpt.step import graph_of, init_params

CONTEXT = 10  # more than the window of 8 that `tiny` has in every other layer
PROMPT = [99, 3, 41, 7, 7, 20, 64, 5]
TOKENS = 20  # one number in most tests: another would mean another compilation


@pytest.fixture
def model(tiny):
    """Its graph and its parameters, none of which is zero as it would be before training."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(tiny, jax.random.key(0)))
    params = jax.tree.map(lambda p: jnp.float32(random.normal(0, 0.4, p.shape)), shapes)
    return graph_of(tiny), params


@partial(jax.jit, static_argnums=0)
def all_logits(graph, params, tokens):
    return nnx.merge(graph, params)(tokens[None])[0]


def last_logits(graph, params, tokens):
    """The logits after `tokens`, by a model that is given those and nothing else."""
    return np.asarray(all_logits(graph, params, jnp.array(tokens))[-1])


@pytest.mark.parametrize("prompt", [PROMPT, list(range(CONTEXT)), list(range(17))])
def test_greedy_text_is_that_of_a_plain_loop_before_and_past_the_context(model, prompt):
    text = list(prompt)
    for _ in range(TOKENS):
        text.append(int(last_logits(*model, text[-CONTEXT:])[:100].argmax()))
    expected = text[len(prompt) :]
    assert len(set(expected)) >= 5  # a model that repeats one token would prove little
    tokens = generate(*model, prompt, num_tokens=TOKENS, context=CONTEXT, temperature=0)
    assert tokens.tolist() == expected


def test_the_ids_that_only_pad_the_vocabulary_never_appear(model):
    graph, params = model
    # Of two opposite columns one always has a positive logit: far above all others here.
    column = 1000 * jax.random.normal(jax.random.key(2), params["head"].shape[:1])
    params["head"] = params["head"].at[:, 100:].set(column[:, None]).at[:, 110:].multiply(-1)
    assert last_logits(graph, params, PROMPT).argmax() >= 100
    for top_k in (None, 128):
        for temperature in (0.0, 1.0, 100.0):
            tokens = generate(
                graph,
                params,
                PROMPT,
                num_tokens=TOKENS,
                context=CONTEXT,
                temperature=temperature,
                top_k=top_k,
            )
            assert tokens.shape == (TOKENS,)
            assert 0 <= tokens.min() <= tokens.max() < 100


def test_the_likeliest_of_one_is_the_likeliest_of_all_at_any_temperature(model):
    greedy = generate(*model, PROMPT, num_tokens=TOKENS, context=CONTEXT, temperature=0)
    hot = generate(*model, PROMPT, num_tokens=TOKENS, context=CONTEXT, temperature=9.0, top_k=1)
    assert hot.tolist() == greedy.tolist()


def test_a_seed_gives_one_text_and_another_seed_another(model):
    texts = [
        generate(*model, PROMPT, num_tokens=TOKENS, context=CONTEXT, seed=seed).tolist()
        for seed in (0, 0, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert len(set(map(tuple, texts))) == 3


def test_greedy_text_does_not_depend_on_the_seed(model):
    texts = [
        generate(*model, PROMPT, num_tokens=TOKENS, context=CONTEXT, temperature=0, seed=seed)
        for seed in (0, 1)
    ]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 2)])
def test_tokens_are_drawn_as_often_as_the_softmax_of_their_logits_says(temperature, top_k):
    config = GPTConfig(5, num_layers=1, num_heads=1, width=12, mlp_width=8, value_embeddings=0)
    graph, params = graph_of(config), jax.jit(partial(init_params, config))(jax.random.key(0))
    # All tokens look alike to this model, so that every draw is from the same distribution.
    params["embed"] = jnp.broadcast_to(params["embed"][0], params["embed"].shape)
    params["head"] = 0.5 * jax.random.normal(jax.random.key(3), params["head"].shape)

    logits = last_logits(graph, params, [0])[:5].astype(np.float64)
    odds = np.exp(logits / temperature)
    odds[np.argsort(-logits)[top_k or 5 :]] = 0
    expected = odds / odds.sum()

    count = 4000
    tokens = generate(
        graph, params, [0], num_tokens=count, context=2, temperature=temperature, top_k=top_k
    )
    drawn = np.bincount(tokens, minlength=5) / count
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (abs(drawn - expected) <= 4 * deviation).all()
    assert len(expected[expected > 0.05]) >= 2
