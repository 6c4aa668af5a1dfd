"""The shards that a run trains and validates on, found and checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nanogpt.data.corpus import embedded_corpus
from nanogpt.data.shards import check_vocabulary, find_shards, read_shard

SAMPLE = 1_000_000  # tokens of each shard that are checked unless all are asked for


@dataclass(frozen=True)
class Dataset:
    """What a run trains and validates on."""

    name: str
    train_files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    sizes: tuple[tuple[str, int], ...]
    """File name and tokens of each training shard."""
    sha256: str
    """Of the names and sizes of all shards, and of the first and last tokens in each."""

    @property
    def train_tokens(self) -> int:
        """Tokens of all training shards."""
        return sum(tokens for _, tokens in self.sizes)

    def __str__(self) -> str:
        return f"{self.name}, {self.train_tokens:,} tokens"


def find_dataset(
    train_files: str | None, val_files: str | None, name: str, vocab_size: int, every_token: bool
) -> Dataset:
    """The shards that match two globs, or without them the embedded corpus, made where missing.

    Every shard is opened, and a sample of its tokens, or each if `every_token`, is checked against
    the vocabulary. Raises ShardError or CorpusError.
    """
    if train_files is None or val_files is None:
        corpus = embedded_corpus()
        train_files, val_files = corpus.train_files, corpus.val_files
        name = f"embedded corpus {corpus.fingerprint}"
    training, validation = find_shards(train_files), find_shards(val_files)
    sizes, digest = [], hashlib.sha256()
    for file in training + validation:
        tokens = read_shard(file)
        digest.update(f"{file.name} {len(tokens)} ".encode())
        digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes())
        check_vocabulary(file, tokens, vocab_size, None if every_token else SAMPLE)
        sizes.append((file.name, len(tokens)))
    trained_on = tuple(sizes[: len(training)])
    return Dataset(name, tuple(training), tuple(validation), trained_on, digest.hexdigest())
