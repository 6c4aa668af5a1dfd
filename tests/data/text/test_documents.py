"""Which files are read, and which documents are used for validation."""

import os
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from nanogpt.data.text import documents
from nanogpt.data.text.documents import DataError, Split, digest_of, find_files, find_split

USUAL = 2**64 // 100  # digests below it are for validation


# Where documents come from


def test_a_folder_gives_all_files_below_it_sorted_but_for_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.jsonl", ".git/x.txt", "a/.hidden", "out/x.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = find_files([str(tmp_path)], leave_out=tmp_path / "out").names
    assert [os.path.relpath(name, tmp_path) for name in names] == ["a/y.jsonl", "a/z.txt", "b.txt"]


def test_inputs_keep_their_order_and_no_file_comes_twice(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c/d.txt", "c/e/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    names = find_files(["b.txt", "*.txt", "c/**/*.txt", "../" + tmp_path.name]).names
    assert [Path(name).name for name in names] == ["b.txt", "a.txt", "d.txt", "f.txt"]
    assert all(Path(name).is_absolute() for name in names)


def test_a_name_with_the_characters_of_a_glob_is_a_name_first(tmp_path):
    path = tmp_path / "x[1].txt"
    path.touch()
    assert find_files([str(path)]).names == [str(path)]


def test_the_fingerprint_changes_with_name_size_and_time(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    seen = {find_files([str(path)]).fingerprint}
    assert find_files([str(path)]).fingerprint in seen
    os.utime(path, ns=(10**18, 10**18 + 1))
    seen.add(find_files([str(path)]).fingerprint)
    path.write_bytes(b"four")
    os.utime(path, ns=(10**18, 10**18))
    seen.add(find_files([str(path)]).fingerprint)
    os.rename(path, tmp_path / "y.txt")
    seen.add(find_files([str(tmp_path / "y.txt")]).fingerprint)
    assert len(seen) == 4


# The split


def test_a_digest_is_the_beginning_of_blake2b():
    expected = blake2b("über".encode(), digest_size=8).hexdigest()
    assert f"{digest_of('über'):016x}" == expected


def test_one_document_in_a_hundred_is_for_validation():
    digests = [digest_of(str(i)) for i in range(20_000)]
    split = find_split((digest, 1) for digest in digests)
    assert split == Split(USUAL)
    assert 150 < sum(map(split.is_validation, digests)) < 250


def test_the_split_reads_no_more_documents_than_it_needs():
    documents = iter([(USUAL, 1)] * 999 + [(USUAL - 1, 1), (5, 1), (6, 1)])
    assert find_split(documents) == Split(USUAL)
    assert list(documents) == [(5, 1), (6, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_of_a_few_documents_about_a_tenth_of_the_text_is_for_validation(seed):
    random = np.random.default_rng(seed)
    lengths = random.lognormal(8, random.choice([0.1, 1, 2]), random.integers(2, 900)).astype(int)
    documents = [(digest_of(f"{seed} {i}"), int(n)) for i, n in enumerate(lengths + 10)]
    split = find_split(documents)
    if split.below is not None:
        share = sum(n for digest, n in documents if split.is_validation(digest))
        assert 0.1 <= share / sum(n for _, n in documents) <= 0.2
    else:  # the smallest digests had more: the last tenth of every document
        least = sorted(documents)
        ends = np.cumsum([n for _, n in least]) / sum(n for _, n in least)
        assert ends[np.searchsorted(ends, 0.1)] > 0.2


@pytest.mark.parametrize(
    ("documents", "split"),
    [
        ([(7, 5), (3, 5000)], Split(None)),  # either would have too much or too little
        ([(3, 5), (7, 5000)], Split(None)),
        ([(3, 600), (7, 5000)], Split(4)),
        ([(9, 70), (9, 70), (9, 70)], Split(None)),  # copies: the same side
        ([(9, 70), (8, 35), (8, 35), (7, 1)], Split(None)),
        ([(7, 3), (3, 3), (5, 5)], Split(4)),  # too short to be cut
        ([(7, 3)], Split(None)),
        ([], None),
    ],
)
def test_a_few_documents_are_divided_so_that_both_sides_have_something(documents, split):
    assert find_split(documents) == split


def test_an_input_that_names_nothing_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/\*\.txt .*matches no file"):
        find_files([str(tmp_path / "nowhere/*.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty .*matches no file"):
        find_files([str(tmp_path / "empty")])


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.zst"])
def test_without_pyarrow_the_file_that_needs_it_is_named_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"{name}.*pip install pyarrow"):
        find_files([str(tmp_path)])


def test_a_packed_parquet_file_is_refused(tmp_path):
    (tmp_path / "x.parquet.gz").touch()
    with pytest.raises(DataError, match=r"x\.parquet\.gz .*unpack it"):
        find_files([str(tmp_path)])


def test_a_file_that_is_linked_or_named_twice_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").touch()
    (tmp_path / "a" / "y.txt").symlink_to(tmp_path / "b" / "x.txt")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "b")
    names = find_files([f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/**"]).names
    assert names == [f"{tmp_path}/a/linked/x.txt"]


def test_a_pipe_is_refused_at_once_and_in_a_folder_it_does_not_hold_up_the_others(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(
        DataError, match=r"pipe\.txt is a pipe, not a file: give a file, which may be"
    ):
        find_files([f"{tmp_path}/pipe.txt"])
    (tmp_path / "x.txt").touch()
    assert len(find_files([f"{tmp_path}"]).names) == 2
