"""Pairs of ids that no text has: against texts, and against the tokenizer itself."""

import random
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import tiktoken

from nanogpt.data.canonical import impossible_next
from nanogpt.data.tokenizer import ByteTokenizer, TokenizerError, gpt2_encoding

IDS = 3000  # the first of GPT-2's, which are merged from each other only


class Small(NamedTuple):
    """A tokenizer with the first ids of GPT-2."""

    encoding: tiktoken.Encoding
    separator: int = IDS

    def token_bytes(self, id):
        return self.encoding.decode_single_token_bytes(id)


@cache
def small():
    """Return the tokenizer, and whether each id is impossible after each."""
    try:
        whole = gpt2_encoding()
    except TokenizerError as error:
        pytest.skip(str(error))
    ranks = {whole.decode_single_token_bytes(id): id for id in range(IDS)}
    encoding = tiktoken.Encoding(
        "small", pat_str=whole._pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    table = impossible_next(Small(encoding), IDS)
    return encoding, np.unpackbits(table, axis=1, count=IDS, bitorder="little").astype(bool)


def test_letters_are_impossible_exactly_if_the_tokenizer_joins_them_differently():
    encoding, impossible = small()
    texts = [encoding.decode([id]) for id in range(IDS)]
    inside = [id for id, text in enumerate(texts) if text.isascii() and text.isalpha()]
    left = [id for id, text in enumerate(texts) if text.isascii() and text.strip().isalpha()]
    chosen = random.Random(0)
    pairs = [(chosen.choice(left), chosen.choice(inside)) for _ in range(3000)]
    # Repeated characters, where merges on both sides of the boundary are the same.
    repeated = [id for id, text in enumerate(texts) if {*text} in ({"="}, {"-"}, {"."}, {"o"})]
    pairs += [(a, b) for a in repeated for b in repeated if texts[a][0] == texts[b][0]]
    expected = [encoding.encode_ordinary(texts[a] + texts[b]) != [a, b] for a, b in pairs]
    assert [bool(impossible[pair]) for pair in pairs] == expected
    assert 0.05 < np.mean(expected) < 0.95


TRICKY = (
    *("'s", "'t", "'re", "'", "he", "s", "t", "th", " ", "  ", "\n", "\t", " \n", "\r\n", "\xa0"),
    *("\x1f", "\u2003", "1", "12", "2024", ".", "...", "--", "(", ")", "the", " the", "ing", "In"),
    *("é", "ß", "日本", "語", "👍", "🏽", "\u0301", "ﬁ", "Ⅳ", "½", "٣", "अ", "\ufffd", "_", "=="),
)


def test_no_text_has_an_impossible_pair():
    encoding, impossible = small()
    chosen = random.Random(0)
    for _ in range(3000):
        text = "".join(chosen.choices(TRICKY, k=20))
        ids = encoding.encode_ordinary(text)
        assert not impossible[ids[:-1], ids[1:]].any(), text


def test_bytes_can_follow_each_other_in_any_order():
    assert not impossible_next(ByteTokenizer(), 256).any()
