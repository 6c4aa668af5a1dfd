"""What a run knows about its data: their content, and warnings about it."""

import os
from hashlib import sha256

import numpy as np
import pytest

from nanogpt.data.dataset import SAMPLE, content_of, difference, find_dataset
from nanogpt.data.shards import ShardError, note_sha256, write_shard
from tests.small_runs import change_a_token


@pytest.fixture
def folder(tmp_path):
    """Two training shards, one of them larger than the sample, and a validation shard."""
    random = np.random.default_rng(0)
    for name, count in (("train_0", 5000), ("train_1", SAMPLE + 200_000), ("val", 3000)):
        write_shard(tmp_path / f"{name}.bin", random.integers(0, 50257, count))
    return tmp_path


def dataset_in(folder, tokenizer="gpt2", every_token=False):
    files = f"{folder}/train_*.bin", f"{folder}/val.bin"
    return find_dataset(*files, "mine", tokenizer, 50304, every_token)


def test_shards_are_known_by_name_tokens_and_content(folder):
    found = dataset_in(folder)
    names_and_tokens = [(shard.name, shard.tokens) for shard in (*found.train, *found.val)]
    assert names_and_tokens == [
        ("train_0.bin", 5000),
        ("train_1.bin", SAMPLE + 200_000),
        ("val.bin", 3000),
    ]
    assert (str(found), found.warnings) == ("mine, 1,205,000 tokens", ())
    assert dataset_in(folder) == found
    for side, name in (("train", "train_0"), ("train", "train_1"), ("val", "val")):
        before = content_of(dataset_in(folder))
        change_a_token(folder / f"{name}.bin", 2000)  # in the first block of a sample
        now = dataset_in(folder)
        assert difference(before[side], getattr(now, side)) == (
            f"the content of shard {name}.bin changed"
        )


def test_with_every_token_no_change_of_a_shard_hides(folder):
    whole = dataset_in(folder, every_token=True)
    for file, shard in zip(whole.train_files, whole.train, strict=True):
        assert shard.sha256 == sha256(file.read_bytes()).hexdigest()
    change_a_token(folder / "train_1.bin", 4500)  # outside of the sample
    now, before = dataset_in(folder, every_token=True), content_of(whole)["train"]
    assert whole.train[1].sample == now.train[1].sample
    assert difference(before, now.train) == "the content of shard train_1.bin changed"
    # If one of the two has only a sample's digest, nothing else can be compared.
    assert difference(before, dataset_in(folder).train) is None


def test_a_digest_that_the_maker_noted_counts_unless_the_shard_is_newer(folder):
    shard = folder / "train_0.bin"
    digest = sha256(shard.read_bytes()).hexdigest()
    note_sha256(shard, digest)
    note_sha256(folder / "other.bin", "0" * 64)
    assert [each.sha256 for each in dataset_in(folder).train] == [digest, None]
    # Flipped bits do not change the modification time.
    written = shard.stat()
    change_a_token(shard, 2000)
    os.utime(shard, ns=(written.st_atime_ns, written.st_mtime_ns))
    with pytest.raises(ShardError, match=r"train_0\.bin is damaged: its SHA-256 is "):
        dataset_in(folder, every_token=True)
    os.utime(shard)
    assert dataset_in(folder).train[0].sha256 is None


def test_shards_of_the_same_content_are_told(folder):
    (folder / "train_0 (1).bin").write_bytes((folder / "train_0.bin").read_bytes())
    (warning,) = dataset_in(folder).warnings
    assert warning == "shards train_0 (1).bin, train_0.bin have the same content"


def test_a_shard_that_is_mostly_one_token_is_told(folder):
    tokens = np.where(np.arange(5000) % 100, 7, np.arange(5000))
    write_shard(folder / "train_0.bin", tokens)
    assert dataset_in(folder).warnings == ("99% of the tokens of shard train_0.bin are id 7",)


def test_tokens_that_another_tokenizer_makes_are_told(folder):
    write_shard(folder / "val.bin", np.arange(3000) % 256)
    assert dataset_in(folder).warnings == (
        "none of 3,000 sampled validation tokens is above 255: the shards seem to be for tokenizer "
        "bytes, not gpt2",
    )
    assert dataset_in(folder, "bytes").warnings == ()
