"""Which ids GPT-2's tokenizer cannot produce after another.

The tokenizer always merges the two neighbors with the lowest rank, so it never produces most
sequences of ids: " hello" is one id, not those of " hel" and "lo". If a model gives impossible ids
no probability, its loss is lower on any text (Vieira et al., arXiv:2506.07956, local conditioning;
by 0.0017 in modded-nanogpt's record of 2026-08-06).

A merge crosses the boundary between two ids if, at its turn, one of its parts ends the left id so
far and the other begins the right one. Each id goes through its own merges in the order of their
ranks, so these parts and turns follow from one id at a time.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from nanogpt.data.tokenizer import Tokenizer

NEVER = 2**31 - 1
LETTER, NUMBER, OTHER, SPACE, UNKNOWN = range(5)
# Kinds of characters between which the tokenizer's pattern never splits words.
JOINED = np.zeros((5, 5), bool)
JOINED[[LETTER, NUMBER, OTHER], [LETTER, NUMBER, OTHER]] = True
JOINED[SPACE, [LETTER, NUMBER, OTHER]] = True
# A word of its own, even before a letter.
CONTRACTIONS = (b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d")
WHITESPACE = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
WHITESPACE += "".join(map(chr, range(0x2000, 0x200B)))


class Lasting(NamedTuple):
    """The ids that a part ends or begins, and between which ranks."""

    ids: Int[np.ndarray, "n"]
    after: Int[np.ndarray, "n"]  # the rank of the merge that makes the part, -1 for single bytes
    until: Int[np.ndarray, "n"]  # the rank of the merge that makes it a part of a longer one


def impossible_next(tokenizer: Tokenizer, vocab_size: int) -> UInt8[np.ndarray, "V V8"]:
    """Return for each id a bit for each id that cannot follow it in any text.

    Bit i of byte k, counted from the lowest, is for id 8 k + i. If it depends on the rest of the
    text whether the tokenizer's pattern splits words between two ids, the pair is possible.

    Args:
        tokenizer: one whose ids are the ranks of its merges; with bytes, no pair is impossible.
        vocab_size: the model's, padded to a multiple of 8.
    """
    ranks = {tokenizer.token_bytes(id): id for id in range(tokenizer.separator)}
    ends, begins = (lasting_parts(ranks, edge) for edge in (-1, 0))
    last, first = (np.array([kind_at(token, edge) for token in ranks]) for edge in (-1, 0))
    impossible = np.zeros((vocab_size, vocab_size // 8), np.uint8)
    for token, rank in ranks.items():
        for split in range(1, len(token)):
            a, b = ends.get(token[:split]), begins.get(token[split:])
            if a is None or b is None:
                continue
            # Of equal merges the leftmost is the first, so those within the left id come before.
            left = a.ids[(a.after < rank) & (rank < a.until)]
            right = b.ids[(b.after < rank) & (rank <= b.until)]
            within_character = 0x80 <= token[split] < 0xC0
            for kind in np.unique(last[left]) if len(right) else ():
                follows = np.zeros(vocab_size, bool)
                follows[right[within_character | JOINED[kind, first[right]]]] = True
                impossible[left[last[left] == kind]] |= np.packbits(follows, bitorder="little")
    return impossible


def lasting_parts(ranks: dict[bytes, int], edge: Literal[-1, 0]) -> dict[bytes, Lasting]:
    """Return, for each part, the ids that it ends (edge -1) or begins (0) for some time."""
    found = defaultdict(list)
    for token, id in ranks.items():
        part, since = token[edge : edge + 1 or None], -1
        for rank, parts in merges(token, ranks):
            if parts[edge] != part:
                found[part].append((id, since, rank))
                part, since = parts[edge], rank
        found[part].append((id, since, NEVER))
    return {part: Lasting(*np.array(spans).T) for part, spans in found.items()}


def merges(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the rank of each merge within an id, and the parts after it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, NEVER) for a, b in pairwise(parts)]
        rank = min(joined)
        i = joined.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield rank, parts


def kind_at(token: bytes, edge: Literal[-1, 0]) -> int:
    """Return the kind of an id's last character (edge -1) or first one (0), if it is certain."""
    if edge == -1 and token in CONTRACTIONS:
        return UNKNOWN
    text = token.decode("utf-8", errors="replace")
    character = text[edge]
    if character == " " and edge == -1:
        return SPACE
    if character in WHITESPACE or character == "\ufffd":  # a replacement for bytes of another id
        return UNKNOWN
    return {"L": LETTER, "N": NUMBER}.get(unicodedata.category(character)[0], OTHER)
