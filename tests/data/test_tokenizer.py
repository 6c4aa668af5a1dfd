"""The tokenizers: exact ids, lossless text, decoding that never raises."""

import os
import threading
import time

import numpy as np
import pytest

from nanogpt.data import tokenizer
from nanogpt.data.tokenizer import ByteTokenizer, GPT2Tokenizer, TokenizerError, load_tokenizer

TEXTS = ["", "def f(x):\n\treturn x\r\n", "naïve café", "日本語", "🙂 \x00 ~", "<|endoftext|>"]


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary")
    return GPT2Tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_byte_ids_are_the_utf8_bytes(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(bytes(text, "utf8"))


def test_no_character_of_unicode_encodes_to_the_byte_separator():
    surrogates = range(0xD800, 0xE000)
    everything = "".join(chr(c) for c in range(0x110000) if c not in surrogates)
    ids = ByteTokenizer().encode(everything)
    assert ids.max() < ByteTokenizer.separator < ByteTokenizer.vocab_size
    assert ByteTokenizer().decode(ids) == everything


def test_byte_decoding_shows_separators_as_nothing_and_broken_utf8_as_a_mark():
    é = "é".encode()
    assert ByteTokenizer().decode([255, 97, 255, 98, 300]) == "ab"
    assert ByteTokenizer().decode([97, é[0], 98]) == "a\N{REPLACEMENT CHARACTER}b"
    assert ByteTokenizer().decode([]) == ""


def test_gpt2_ids_are_the_published_ones(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip
    assert (gpt2.vocab_size, gpt2.separator) == (50257, 50256)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_gives_back_the_text_it_was_given(gpt2, text):
    ids = gpt2.encode(text)
    assert ids.dtype == np.uint16
    assert gpt2.decode(ids) == text


def test_gpt2_reads_a_spelled_out_separator_as_plain_text(gpt2):
    assert gpt2.separator not in gpt2.encode("one<|endoftext|>two")


def test_gpt2_decoding_shows_separators_and_padding_as_nothing(gpt2):
    assert gpt2.decode([50256, 15496, 50257, 995, 50303]) == "Hello world"
    assert gpt2.decode([]) == ""


def test_gpt2_decoding_shows_half_a_character_as_a_mark(gpt2):
    half = gpt2.encode("🙂")[:1]
    assert gpt2.decode(half) == "\N{REPLACEMENT CHARACTER}"


def test_without_cache_and_network_the_error_says_how_to_provide_the_vocabulary(
    monkeypatch, tmp_path
):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # discard what other tests loaded
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # a port on which nothing listens
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    with pytest.raises(TokenizerError, match=r"set TIKTOKEN_CACHE_DIR .*ProxyError"):
        GPT2Tokenizer()


def test_a_download_that_never_answers_is_given_up(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    answered = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: answered.wait())
    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.05)
    start = time.monotonic()
    with pytest.raises(TokenizerError, match="TimeoutError"):
        GPT2Tokenizer()
    assert time.monotonic() - start < 3
    answered.set()


def test_tokenizers_are_loaded_by_the_name_they_carry(gpt2):
    assert load_tokenizer("bytes").name == "bytes"
    assert load_tokenizer("gpt2").name == "gpt2"


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(TokenizerError, match="bytes, gpt2"):
        load_tokenizer("word2vec")


def test_an_id_beyond_those_of_the_tokenizer_stands_for_nothing(gpt2):
    for each in (ByteTokenizer(), gpt2):
        assert each.token_bytes(each.vocab_size) == b""
