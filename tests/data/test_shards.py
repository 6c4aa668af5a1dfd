"""The .bin shard format, compared with an independent reader and writer of five lines."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from nanogpt.data.shards import (
    ShardError,
    check_vocabulary,
    find_shards,
    read_shard,
    sample_of,
    write_shard,
)


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    """The published format, byte by byte."""
    count = len(tokens) if count is None else count
    header = struct.pack("<3i", magic, version, count) + bytes(4 * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some_train_000001.bin"


# Writing


def test_a_written_shard_has_the_published_bytes(path):
    tokens = [50256, 0, 1, 255, 256, 65535]
    write_shard(path, tokens)
    assert path.read_bytes() == shard_bytes(tokens)
    assert path.stat().st_size == 1024 + 2 * 6


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "uint64", ">u2", ">i4"])
def test_any_integer_type_gives_the_same_shard(path, dtype):
    write_shard(path, np.array([7, 100, 3], dtype=dtype))
    assert path.read_bytes() == shard_bytes([7, 100, 3])


def test_a_strided_view_is_written_in_its_own_order(path):
    write_shard(path, np.arange(10)[::-3])
    assert path.read_bytes() == shard_bytes([9, 6, 3, 0])


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ([1, 65536], "token 65536"),
        ([1, -1], "token -1"),
        ([1.0, 2.0], "float64"),
        ([True, False], "bool"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        (3, r"shape \(\)"),
        ([], r"shape \(0,\)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(path, tokens, complaint):
    with pytest.raises(ShardError, match=complaint) as refusal:
        write_shard(path, tokens)
    assert str(path) in str(refusal.value)
    assert os.listdir(path.parent) == []


def test_writing_replaces_the_shard_that_was_there(path):
    write_shard(path, [1, 2, 3])
    write_shard(path, [4])
    assert path.read_bytes() == shard_bytes([4])
    assert os.listdir(path.parent) == [path.name]


@pytest.fixture
def small_disk():
    """Limit files to 2000 bytes, which to a writer looks like a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_shard_and_no_other_file(path, small_disk):
    write_shard(path, [1, 2, 3])
    with pytest.raises(ShardError, match="make room there"):
        write_shard(path, np.zeros(1000, np.uint16))
    assert path.read_bytes() == shard_bytes([1, 2, 3])
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupted_write_leaves_nothing(path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, [1, 2, 3])
    assert os.listdir(path.parent) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"nowhere.a\.bin cannot be written \(No such file"):
        write_shard(tmp_path / "nowhere" / "a.bin", [1])


# Reading


def test_a_shard_made_elsewhere_is_read_back(path):
    path.write_bytes(shard_bytes([50256, 0, 65535, 258]))
    assert read_shard(path).tolist() == [50256, 0, 65535, 258]


def test_tokens_are_a_memory_map_of_uint16_that_cannot_be_written(path):
    path.write_bytes(shard_bytes([1, 2]))
    tokens = read_shard(path)
    assert isinstance(tokens, np.memmap)
    assert (tokens.dtype, tokens.shape) == (np.uint16, (2,))
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 5


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "truncated: 0 bytes"),
        (shard_bytes([])[:1023], "truncated: 1023 bytes"),
        (shard_bytes([1, 2, 3], magic=20240801), "starts with 20240801 instead of 20240520"),
        (shard_bytes([1, 2, 3], version=7), "version 7"),
        (shard_bytes([1, 2, 3])[:-1], "promises 3 tokens, 1,030 bytes in all, but it has 1,029"),
        (shard_bytes([1, 2, 3])[:-2], "promises 3 tokens, 1,030 bytes in all, but it has 1,028"),
        (shard_bytes([1, 2, 3]) + b"\0", "promises 3 tokens, 1,030 bytes in all, but it has 1,031"),
        (shard_bytes([1, 2, 3], count=-3), "promises -3 tokens"),
    ],
)
def test_a_damaged_shard_is_named_with_what_is_wrong(path, content, complaint):
    path.write_bytes(content)
    with pytest.raises(ShardError, match=complaint) as refusal:
        read_shard(path)
    assert str(path) in str(refusal.value)


def test_raw_tokens_without_a_header_are_told_how_to_become_a_shard(path):
    np.arange(5000, dtype=np.uint16).tofile(path)
    with pytest.raises(ShardError, match=r"without a header.*write_shard"):
        read_shard(path)


def test_a_missing_shard_is_named(path):
    with pytest.raises(ShardError, match=r"some_train_000001\.bin: No such file or directory"):
        read_shard(path)


def test_a_folder_is_no_shard(tmp_path):
    with pytest.raises(ShardError, match="Is a directory"):
        read_shard(tmp_path)


# The vocabulary


def tokens_with(bad, count=100_000):
    """Write tokens below 50257, except the ids `bad` = {position: id}."""
    tokens = np.arange(count, dtype=np.uint16) % 50257
    for position, token in bad.items():
        tokens[position] = token
    return tokens


def test_tokens_below_the_vocabulary_size_pass():
    check_vocabulary("a.bin", tokens_with({5: 50256}), 50257)


@pytest.mark.parametrize("position", [0, 4095, 4096, 77_777, 99_999])
def test_a_token_beyond_the_vocabulary_is_named_with_its_position(position):
    with pytest.raises(ShardError, match=f"a.bin has token 50257 at position {position:,},"):
        check_vocabulary("a.bin", tokens_with({position: 50257}), 50257)


def test_the_first_of_several_bad_tokens_is_named():
    with pytest.raises(ShardError, match="token 60000 at position 40,000,"):
        check_vocabulary("a.bin", tokens_with({90_000: 65535, 40_000: 60000}), 50257)


# A sample of positions, to see which


POSITIONS = np.arange(100_000)


@pytest.mark.parametrize("size", [4097, 10_000, 50_000])
def test_a_sample_reaches_from_the_first_token_to_the_last_and_is_spread_evenly(size):
    sample = sample_of(POSITIONS, size)
    assert sample[0] == 0 and sample[-1] == 99_999
    assert (np.diff(sample) > 0).all()
    if size > 10_000:
        assert np.histogram(sample, 4, (0, 100_000))[0].min() >= size / 4 * 0.7


@pytest.mark.parametrize("size", [1, 100, 10_000, 50_000])
def test_a_sample_has_about_the_size_asked_for_or_that_of_the_shard(size):
    assert size <= len(sample_of(POSITIONS, size)) <= size + 20
    assert sample_of(POSITIONS[:size], size).tolist() == [*range(size)]


# If this changes, every resumed run refuses its data.
def test_a_sample_is_the_same_with_every_version():
    starts = [0, 33_968, 53_938, 71_090, 96_000]
    sample = sample_of(POSITIONS, 20_000)
    assert sample[:: len(sample) // 5].tolist() == starts


# Finding


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A home folder, also the working directory, with two training shards and another file."""
    for name in ("x_train_000010.bin", "x_train_000002.bin", "x_val_000000.bin"):
        (tmp_path / name).touch()
    (tmp_path / "x_train_folder.bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("pattern", ["x_train_*.bin", "~/x_train_*.bin", "{folder}/x_train_*.bin"])
def test_a_pattern_finds_its_files_in_order(folder, pattern):
    found = find_shards(pattern.format(folder=folder))
    assert [path.name for path in found] == ["x_train_000002.bin", "x_train_000010.bin"]
    assert all(path.exists() for path in found)


def test_shards_of_several_folders_are_ordered_by_folder_and_name(folder):
    for name in ("a/x.bin", "a-b/x.bin"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
    assert find_shards("a*/x.bin") == [Path("a/x.bin"), Path("a-b/x.bin")]


def test_what_is_no_file_is_told(folder):
    os.mkfifo("pipe.bin")
    for name, told in (
        ("x_train_folder.bin", "is a folder: give shards"),
        ("pipe.bin", "is a pipe"),
    ):
        with pytest.raises(ShardError, match=f"^{name} {told}"):
            find_shards(name)


def test_a_pattern_without_a_match_is_named_with_the_current_folder(folder):
    with pytest.raises(ShardError, match=r"No shard matches y_\*\.bin") as refusal:
        find_shards("y_*.bin")
    assert str(folder) in str(refusal.value)
