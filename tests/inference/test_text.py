"""The text that is shown for tokens arriving one by one."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import nanogpt.inference.text
from nanogpt.config import GPTConfig
from nanogpt.data.tokenizer import ByteTokenizer, TokenizerError, load_tokenizer
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference.generate import Written
from nanogpt.inference.sampling import Sampling
from nanogpt.inference.text import sample, write
from nanogpt.training.step import graph_of, init_params, param_shapes
from tests.conftest import with_every_trick
from train_gpt import PRESETS


@pytest.fixture
def shown(monkeypatch):
    """Return the tokens that `write` yields if the model generates these texts, one per prompt."""
    asked = []

    def shown(*texts, chunk=3, tokenizer=None, **how):
        tokenizer = tokenizer or ByteTokenizer()
        rows = [list(text) for text in texts]
        length = len(rows[0])

        def generate(graph, params, prompts, *, num_tokens, **_):
            assert num_tokens == length
            asked.append(prompts)
            for at in range(0, length, chunk):
                tokens = np.array([row[at : at + chunk] for row in rows]).T
                likeliest = np.stack([tokens, tokens * 0 + 65], axis=-1)
                yield Written(tokens, tokens / 256, likeliest, likeliest / 256)
                asked.append("more")

        monkeypatch.setattr(nanogpt.inference.text, "generate", generate)
        prompts = [how.pop("prompt", "")] * len(texts)
        return list(
            write(
                None,
                None,
                tokenizer,
                prompts,
                num_tokens=length,
                context=9,
                sampling=Sampling(),
                **how,
            )
        )

    shown.asked = asked
    return shown


def joined(tokens, number=0):
    return "".join(token.text for which, token in tokens if which == number)


def test_a_prompt_is_the_beginning_of_a_document(shown):
    shown(b"x", prompt="é")
    assert [list(map(int, prompt)) for prompt in shown.asked[0]] == [[255, 0xC3, 0xA9]]


def test_every_token_comes_with_its_probability_and_alternatives(shown):
    (_, a), (_, b) = shown(b"z\xff")
    assert (a.text, a.probability) == ("z", 122 / 256)
    assert a.alternatives == (("z", 122 / 256), ("A", 65 / 256))
    assert (b.text, b.probability) == ("<|endoftext|>", 255 / 256)


def test_a_character_of_several_tokens_is_shown_with_its_last(shown):
    tokens = shown("aé€😀b".encode())
    assert [token.text for _, token in tokens] == ["a", "", "é", "", "", "€", *[""] * 3, "😀", "b"]


def test_bytes_that_make_no_character_show_as_one_that_says_so(shown):
    assert joined(shown(b"a\xc3b\x80c")) == "a\ufffdb\ufffdc"
    assert joined(shown(b"a\xe2\x82")) == "a\ufffd"  # what is left when it ends


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (b"one two three", ["two"], "one "),
        (b"one two three", ["three", "two"], "one "),
        (b"one two three", ["e t", "ne"], "o"),
        (b"one two three", ["four", "threes"], "one two three"),
        (b"aabab", ["abab"], "a"),
        (b"aaab", ["aab"], "a"),
        (b"one\xfftwo", ["<|endoftext|>"], "one"),
        ("a€b".encode(), ["€"], "a"),
        (b"xabcd", ["bc", "abc"], "x"),
        (b"stop", ["stop"], ""),
    ],
)
def test_a_text_ends_before_the_first_stop_string(shown, text, stop, expected, chunk):
    assert joined(shown(text, stop=stop, chunk=chunk)) == expected


def test_of_what_could_be_a_stop_string_nothing_is_shown_before_that_is_known(shown):
    texts = [token.text for _, token in shown(b"xaabc", stop=["aad"])]
    assert texts == ["x", "", "", "aab", "c"]


def test_texts_end_each_for_itself_and_nothing_is_written_after_the_last(shown):
    tokens = shown(b"a.bcdefghijk", b"abcde.ghijkl", stop=["."])
    assert (joined(tokens, 0), joined(tokens, 1)) == ("a", "abcde")
    assert shown.asked[1:] == ["more"]  # the first two of four chunks were requested
    assert [number for number, _ in tokens] == [0, 1, 0, 1, 1, 1, 1, 1]


def test_gpt2s_tokens_are_shown_as_the_text_that_they_spell(shown):
    try:
        tokenizer = load_tokenizer("gpt2")
    except TokenizerError as error:
        pytest.skip(str(error))
    text = "Ærøskøbing 😀\n\n  naïve<|endoftext|>"
    ids = [*tokenizer.encode("Ærøskøbing 😀\n\n  naïve"), 50256]
    tokens = shown(ids, tokenizer=tokenizer)
    assert joined(tokens) == text
    assert len(tokens) == len(ids) < len(text)


def test_a_model_writes_through_it():
    config = GPTConfig(100, num_layers=1, num_heads=1, width=12, mlp_width=8, value_embeddings=0)
    graph, params = graph_of(config), jax.jit(lambda: init_params(config, jax.random.key(0)))()
    tokens = list(
        write(
            graph,
            params,
            ByteTokenizer(),
            ["ab", "c"],
            num_tokens=20,
            context=16,
            sampling=Sampling(1.0),
            alternatives=2,
        )
    )
    assert [number for number, _ in tokens] == [0, 1] * 20
    # To a new model all tokens are alike.
    for _, token in tokens:
        assert token.probability == pytest.approx(1 / 100, rel=1e-4)
        assert [odds for _, odds in token.alternatives] == pytest.approx([1 / 100] * 2, rel=1e-4)


def test_the_sample_of_a_run_has_the_windows_with_which_its_model_is_used(monkeypatch):
    trained = replace(with_every_trick(), vocab_size=256)
    used = replace(trained, windows=(16, 64))
    hp = replace(PRESETS["laptop"], model=trained, sample_prompt="ab")
    plan = SimpleNamespace(hp=hp, stages=[SimpleNamespace(model=trained, used_model=used)])
    shapes = param_shapes(trained)
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), shapes)

    def generate(graph, params, *_, **__):
        assert nnx.merge(graph, params).config == used
        token, odds = np.array([[99]]), np.array([[1.0]])
        yield Written(token, odds, token[..., None], odds[..., None])

    monkeypatch.setattr(nanogpt.inference.text, "generate", generate)
    assert sample(plan, params, make_mesh(1)) == "sample:\nabc"
