"""The training and validation shards of a run: found, checked and identified by their content."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from nanogpt.checks import shown
from nanogpt.data.corpus import embedded_corpus
from nanogpt.data.shards import (
    REMAKE,
    SUMS,
    ShardError,
    check_vocabulary,
    find_shards,
    noted_sha256,
    read_shard,
    sample_of,
)
from nanogpt.data.tokenizer import TOKENIZERS
from nanogpt.files import sha256_of

SAMPLE = 1_000_000  # tokens of each shard that are checked by default
TOO_COMMON = 0.5  # share of a shard's tokens that no single token has in real text


@dataclass(frozen=True)
class Shard:
    """The identity of a shard."""

    name: str
    tokens: int
    sample: str
    """Digest of a sample of its tokens, or of all tokens of a small shard."""
    sha256: str | None
    """SHA-256 of the whole file, if every token was checked or SHA256SUMS has it."""


@dataclass(frozen=True)
class Dataset:
    """The data that a run trains and validates on."""

    name: str
    train_files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    warnings: tuple[str, ...] = ()
    """Suspicious properties of the data, which may still be intended."""

    @property
    def train_tokens(self) -> int:
        """Number of tokens in all training shards."""
        return sum(shard.tokens for shard in self.train)

    @property
    def val_tokens(self) -> int:
        """Number of tokens in all validation shards."""
        return sum(shard.tokens for shard in self.val)

    def contents(self, whole: bool) -> list[tuple[str, str]]:
        """Return a name and the content of each shard, to compare between processes."""
        shards = [*self.train, *self.val]
        return [
            (f"shard {shown(x.name)}", f"{x.tokens} {x.sample} {whole and x.sha256}")
            for x in shards
        ]

    def __str__(self) -> str:
        return f"{shown(self.name)}, {self.train_tokens:,} tokens"


LookedAt = tuple[Shard, Int64[np.ndarray, "ids"]]  # with the token counts in its sample


def content_of(dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Return the dataset's shards in JSON types."""
    return {side: [asdict(shard) for shard in getattr(dataset, side)] for side in ("train", "val")}


def difference(before: list[dict[str, Any]], now: Sequence[Shard]) -> str | None:
    """Describe the first difference between shards in JSON types and others; None if equal."""
    for had, has in zip_longest((Shard(**shard) for shard in before), now):
        name = shown((had or has).name)
        if had is None or has is None or (had.name, had.tokens) != (has.name, has.tokens):
            both = (had, has)
            told = [
                f"{x.tokens:,} tokens" if x and shown(x.name) == name else "nothing" for x in both
            ]
            return f"shard {name} had {told[0]} before and has {told[1]} now"
        whole = None not in (had.sha256, has.sha256) and had.sha256 != has.sha256
        if had.sample != has.sample or whole:
            return f"the content of shard {name} changed"
    return None


def find_dataset(
    train_files: str | None,
    val_files: str | None,
    name: str,
    tokenizer: str,
    vocab_size: int,
    every_token: bool,
) -> Dataset:
    """Find the shards that match two globs, or without globs the embedded corpus, built if missing.

    Every shard is opened, and a sample of its tokens, or all if `every_token`, is checked against
    the vocabulary. Raises ShardError or CorpusError.
    """
    if train_files is None or val_files is None:
        corpus = embedded_corpus()
        train_files, val_files = corpus.train_files, corpus.val_files
        name = f"embedded corpus {corpus.fingerprint}"
    training, validation = find_shards(train_files), find_shards(val_files)
    train = [look_into(file, vocab_size, every_token) for file in training]
    val = [look_into(file, vocab_size, every_token) for file in validation]
    return Dataset(
        name,
        tuple(training),
        tuple(validation),
        tuple(shard for shard, _ in train),
        tuple(shard for shard, _ in val),
        (
            *copies([shard for shard, _ in train + val]),
            *uniformity(train + val),
            *other_tokenizer(train, "training", tokenizer),
            *other_tokenizer(val, "validation", tokenizer),
        ),
    )


def look_into(file: Path, vocab_size: int, every_token: bool = False) -> LookedAt:
    """Check a shard; return its identity and the token counts in a sample.

    Raises ShardError if it is damaged or has a token beyond the vocabulary.
    """
    tokens = read_shard(file)
    sample = sample_of(tokens, SAMPLE)
    if every_token or (sample >= vocab_size).any():
        check_vocabulary(file, tokens, vocab_size)
    sha256 = noted = noted_sha256(file)
    if every_token:
        sha256 = sha256_of(file)
        if noted not in (None, sha256):
            raise ShardError(
                f"Shard {file} is damaged: its SHA-256 is {sha256}, not that in {SUMS}; {REMAKE}."
            )
    digest = blake2b(np.ascontiguousarray(sample, "<u2").data, digest_size=16).hexdigest()
    return Shard(file.name, len(tokens), digest, sha256), np.bincount(sample, minlength=1)


def copies(shards: Sequence[Shard]) -> Iterator[str]:
    """Yield warnings about shards with the same content."""
    alike = defaultdict(list)
    for shard in shards:
        alike[shard.tokens, shard.sample, shard.sha256].append(shard.name)
    for names in alike.values():
        if len(names) > 1:
            yield f"shards {', '.join(map(shown, names))} have the same content"


def uniformity(looked_at: Sequence[LookedAt]) -> Iterator[str]:
    """Yield warnings about shards in which one token is too common."""
    for shard, counts in looked_at:
        share = counts.max() / max(1, counts.sum())
        if share > TOO_COMMON:
            yield f"{share:.0%} of the tokens of shard {shown(shard.name)} are id {counts.argmax()}"


def other_tokenizer(looked_at: Sequence[LookedAt], side: str, tokenizer: str) -> Iterator[str]:
    """Yield a warning if the tokens look like those of another tokenizer."""
    seen = sum(int(counts.sum()) for _, counts in looked_at)
    greatest = max(len(counts) for _, counts in looked_at) - 1
    for name, other in TOKENIZERS.items():
        if greatest < other.vocab_size < TOKENIZERS[tokenizer].vocab_size:
            yield (
                f"none of {seen:,} sampled {side} tokens is above {other.vocab_size - 1}: the "
                f"shards seem to be for tokenizer {name}, not {tokenizer}"
            )
