"""Documents from files of every kind, and what is said of those that cannot be read."""

import gzip
import json
import os
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from nanogpt.data.text import documents
from nanogpt.data.text.documents import (
    DataError,
    Split,
    digest_of,
    find_files,
    find_split,
    text_of,
    units,
)
from nanogpt.data.tokenizer import GPT2Tokenizer, TokenizerError

TEXTS = ["one\n", "zwei — über", '"three" 三\r\n', " 4"]
USUAL = 2**64 // 100  # digests below it are for validation


def read(path, field="text", split=Split(USUAL)):  # noqa: B008
    """The texts in a file, and the problems as strings."""
    texts, problems = [], []
    for unit in units(path, field, split):
        try:
            texts.append(text_of(unit, field))
        except ValueError as error:
            problems.append(f"{unit.where}: {error}")
    return texts, problems


def write(path, data):
    """Write bytes, packed as the name says."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


def json_lines(texts, field="text"):
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


# Where documents come from


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_packed_or_not(tmp_path, packed):
    path = write(tmp_path / f"x.txt{packed}", "".join(TEXTS).encode())
    assert read(path) == (["".join(TEXTS)], [])


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "X.JSONL", "x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines_hold_a_document_per_line_in_the_field_asked_for(tmp_path, name, field):
    path = write(tmp_path / name, json_lines(TEXTS, field))
    assert read(path, field) == (TEXTS, [])


def test_parquet_holds_a_document_per_row_in_the_column_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROWS", 3)
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]
    path = write_parquet(tmp_path / "x.parquet", {"n": list(range(20)), "body": texts})
    assert read(path, "body") == (texts, [])


def test_several_packed_files_in_a_row_are_one(tmp_path):
    one, two = gzip.compress(json_lines(TEXTS)), gzip.compress(json_lines(["more"]))
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(one + two)
    assert read(path) == ([*TEXTS, "more"], [])


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbfhello")
    assert read(path) == (["hello"], [])


def test_a_folder_gives_all_files_below_it_sorted_but_for_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.jsonl", ".git/x.txt", "a/.hidden", "out/x.bin"):
        write(tmp_path / name, b"x")
    names = find_files([str(tmp_path)], leave_out=tmp_path / "out").names
    assert [os.path.relpath(name, tmp_path) for name in names] == ["a/y.jsonl", "a/z.txt", "b.txt"]


def test_inputs_keep_their_order_and_no_file_comes_twice(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c/d.txt", "c/e/f.txt"):
        write(tmp_path / name, b"x")
    monkeypatch.chdir(tmp_path)
    names = find_files(["b.txt", "*.txt", "c/**/*.txt", "../" + tmp_path.name]).names
    assert [Path(name).name for name in names] == ["b.txt", "a.txt", "d.txt", "f.txt"]
    assert all(Path(name).is_absolute() for name in names)


def test_a_name_with_the_characters_of_a_glob_is_a_name_first(tmp_path):
    path = write(tmp_path / "x[1].txt", b"x")
    assert find_files([str(path)]).names == [str(path)]


def test_the_fingerprint_changes_with_name_size_and_time(tmp_path):
    path = write(tmp_path / "x.txt", b"one")
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


# Long documents


def random_text(seed):
    """Words, and white space of every kind."""
    words = ["don't", "naïve", "三十", "12345", "!?", "a", " ", "\u3000", "\x1c", "\x85", "\ufeff"]
    spaces = [" ", "\n", "  ", "\n\n\n", "\t", "\r\n", "\u00a0 ", " \u2003", ""]
    draw = np.random.default_rng(seed)
    chosen = [(draw.choice(words), draw.choice(spaces)) for _ in range(400)]
    return "".join(word + space for word, space in chosen).lstrip("\ufeff")


@pytest.mark.parametrize("seed", range(5))
def test_a_long_document_is_cut_where_gpt_2_sees_a_boundary(tmp_path, monkeypatch, seed):
    try:
        tokenizer = GPT2Tokenizer()
    except TokenizerError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(documents, "PIECE", 64)
    text = random_text(seed)
    path = write(tmp_path / "x.txt", text.encode())
    parts = list(units(path, "text", Split(USUAL)))
    assert len(parts) > 10
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert {part.digest for part in parts} == {digest_of(text)}
    tokens = np.concatenate([tokenizer.encode(text_of(part, "text")) for part in parts])
    assert tokens.tolist() == tokenizer.encode(text).tolist()


def test_the_only_document_is_cut_in_two_at_nine_tenths(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 64)
    text = random_text(0)
    path = write(tmp_path / "x.txt.gz", text.encode())
    parts = list(units(path, "text", Split(None)))
    last = [part.is_last_share for part in parts]
    assert last == sorted(last)
    sides = ["".join(text_of(p, "") for p in parts if p.is_last_share == x) for x in (0, 1)]
    assert "".join(sides) == text
    assert len(sides[1]) == len(text) // 10
    assert [part.begins for part in parts] == [
        i == 0 or (last[i] and not last[i - 1]) for i in range(len(parts))
    ]


def test_a_long_document_without_white_space_is_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 64)
    path = write(tmp_path / "x.txt", b"x" * 1000)
    assert read(path) == (["x" * 1000], [])


# The split


def test_a_digest_is_the_beginning_of_blake2b():
    expected = blake2b("über".encode(), digest_size=8).hexdigest()
    assert f"{digest_of('über'):016x}" == expected


def test_one_document_in_a_hundred_is_for_validation():
    digests = [digest_of(str(i)) for i in range(20_000)]
    split = find_split(digests)
    assert split == Split(USUAL)
    assert 150 < sum(map(split.is_validation, digests)) < 250


def test_the_split_reads_no_more_documents_than_it_needs():
    digests = iter([USUAL, USUAL - 1, 5, 6])
    assert find_split(digests) == Split(USUAL)
    assert list(digests) == [5, 6]


@pytest.mark.parametrize(
    ("digests", "validation"),
    [
        ([2**63, 2**62, 2**62 + 1], [2**62]),  # too few for one in a hundred
        ([7, 3, 5], [3]),  # all below it
        ([2**63, 2**62, 2**62], [2**62, 2**62]),
    ],
)
def test_a_few_documents_leave_something_on_both_sides(digests, validation):
    split = find_split(digests)
    assert [digest for digest in digests if split.is_validation(digest)] == validation


def test_copies_of_one_document_are_cut_like_one():
    assert find_split([9, 9, 9]) == Split(None)
    assert find_split([]) is None


# What cannot be read


@pytest.mark.parametrize("length", [10, 1000])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_file_that_is_not_utf_8_is_named_with_the_byte(tmp_path, monkeypatch, length, bom):
    monkeypatch.setattr(documents, "PIECE", 64)
    text = bom + "é".encode() * length
    path = write(tmp_path / "x.txt", text + b"\xe9 t\xe9")
    assert read(path) == ([], [f"{path}: is not UTF-8 at byte {len(text):,}"])


def test_a_character_that_the_end_of_a_long_file_cuts_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 64)
    path = write(tmp_path / "x.txt", b"x " * 500 + b"\xe4\xb8")
    assert read(path) == ([], [f"{path}: is not UTF-8 at byte 1,000"])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"nothing", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["text"]', "is JSON, but no object"),
        (b'{"body": "x"}', "has no 'text', only 'body'"),
        (b"{}", "has no 'text'"),
        (
            b'{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0}',
            "has no 'text', only 'a', 'b', 'c', 'd', 'e', ...",
        ),
        (b'{"text": 5}', "has a 'text' that is not text"),
        (b'{"text": "\\ud800"}', "has half a surrogate pair, which is no character"),
        (b'{"text": "\xff"}', "is not UTF-8 at byte 10"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, problem):
    good = json_lines(TEXTS)
    path = write(tmp_path / "x.jsonl", good + line + b"\n" + good)
    assert read(path) == (TEXTS * 2, [f"{path}, line 5: {problem}"])


def test_null_and_blank_lines_are_empty_documents(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"text": null}\n\n{"text": ""}\n{"text": "x"}')
    texts, problems = read(path)
    assert [text.strip() for text in texts] == ["", "", "", "x"]
    assert problems == []


def test_a_row_that_is_not_utf_8_is_named_and_the_others_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = pyarrow.array([b"a", b"\xff", None, b"b"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "x.parquet", {"text": rows})
    assert read(path) == (["a", "", "b"], [f"{path}, row 2: is not UTF-8 at byte 0"])


def test_a_missing_column_is_named(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"body": ["a"], "n": [1]})
    assert read(path) == ([], [f"{path}: has no column 'text', only 'body', 'n'"])


def test_a_column_of_numbers_is_named(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"text": [1]})
    texts, (problem,) = read(path)
    assert texts == []
    assert str(path) in problem and "int64" in problem


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_of_a_packed_file_that_is_cut_short_the_beginning_is_read(tmp_path, packed):
    lines = [f"{i} {np.random.default_rng(i).integers(10**18)}" for i in range(20_000)]
    path = write(tmp_path / f"x.jsonl{packed}", json_lines(lines))
    path.write_bytes(path.read_bytes()[:-1000])
    texts, problems = read(path)
    assert 0 < len(texts) < len(lines)
    assert texts == lines[: len(texts)]
    assert len(problems) == 1 and problems[0].startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.txt.gz", "x.parquet"])
def test_a_file_that_vanished_is_named(tmp_path, name):
    pytest.importorskip("pyarrow")
    texts, (problem,) = read(tmp_path / name)
    assert texts == []
    assert problem.startswith(str(tmp_path / name))
    assert "No such file" in problem


def test_an_input_that_names_nothing_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/\*\.txt .*names no file"):
        find_files([str(tmp_path / "nowhere/*.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty .*names no file"):
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
