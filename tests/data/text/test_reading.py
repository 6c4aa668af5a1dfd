"""Documents from files of every kind, and messages about those that cannot be read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pytest

from nanogpt.data.text import reading
from nanogpt.data.text.documents import Split, digest_of, text_of
from nanogpt.data.text.reading import units
from nanogpt.data.tokenizer import GPT2Tokenizer, TokenizerError

TEXTS = ["one\n", "zwei — über", '"three" 三\r\n', " 4"]
USUAL = 2**64 // 100  # digests below it are for validation


def read(path, field="text", split=Split(USUAL)):  # noqa: B008
    """Return the texts in a file, and the problems as strings."""
    texts, problems = [], []
    for unit in units(path, field, split):
        try:
            texts.append(text_of(unit, field))
        except ValueError as error:
            problems.append(f"{unit.where}: {error}")
    return texts, problems


def write(path, data):
    """Write bytes, compressed by the suffix of the name."""
    packing = {".gz": gzip, ".bz2": bz2, ".xz": lzma}.get(path.suffix)
    data = packing.compress(data) if packing else data
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


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_a_text_file_is_one_document_packed_or_not(tmp_path, packed):
    path = write(tmp_path / f"x.txt{packed}", "".join(TEXTS).encode())
    assert read(path) == (["".join(TEXTS)], [])


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "X.JSONL", "x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines_hold_a_document_per_line_in_the_field_asked_for(tmp_path, name, field):
    path = write(tmp_path / name, json_lines(TEXTS, field))
    assert read(path, field) == (TEXTS, [])


def test_parquet_holds_a_document_per_row_in_the_column_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "ROWS", 3)
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


# Long documents


def random_text(seed):
    """Return words, and white space of every kind."""
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
    monkeypatch.setattr(reading, "PIECE", 64)
    text = random_text(seed)
    path = write(tmp_path / "x.txt", text.encode())
    parts = list(units(path, "text", Split(USUAL)))
    assert len(parts) > 10
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert {part.digest for part in parts} == {digest_of(text)}
    tokens = np.concatenate([tokenizer.encode(text_of(part, "text")) for part in parts])
    assert tokens.tolist() == tokenizer.encode(text).tolist()


def test_the_only_document_is_cut_in_two_at_nine_tenths(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 64)
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
    monkeypatch.setattr(reading, "PIECE", 64)
    path = write(tmp_path / "x.txt", b"x" * 1000)
    assert read(path) == (["x" * 1000], [])


# What cannot be read


@pytest.mark.parametrize("length", [10, 1000])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_file_that_is_not_utf_8_is_named_with_the_byte(tmp_path, monkeypatch, length, bom):
    monkeypatch.setattr(reading, "PIECE", 64)
    text = bom + "é".encode() * length
    path = write(tmp_path / "x.txt", text + b"\xe9 t\xe9")
    assert read(path) == ([], [f"{path}: is not UTF-8 at byte {len(text):,}"])


def test_a_character_that_the_end_of_a_long_file_cuts_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 64)
    path = write(tmp_path / "x.txt", b"x " * 500 + b"\xe4\xb8")
    assert read(path) == ([], [f"{path}: is not UTF-8 at byte 1,000"])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"nothing", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["text"]', "is JSON but not an object"),
        (b'{"body": "x"}', "has no 'text', only 'body'"),
        (b"{}", "has no 'text'"),
        (
            b'{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0}',
            "has no 'text', only 'a', 'b', 'c', 'd', 'e', ...",
        ),
        (b'{"text": 5}', "has a 'text' that is not text"),
        (b'{"text": "\\ud800"}', "has half a surrogate pair, which is not a character"),
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


# Limits


def test_text_without_white_space_is_read_in_linear_time_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 64)
    seen = 0

    class Counted:
        """The pattern that searches for a place to cut, counting the characters it is given."""

        def match(self, text):
            nonlocal seen
            seen += len(text)
            return cut.match(text)

    cut = reading.CUT
    monkeypatch.setattr(reading, "CUT", Counted())
    text = "a" * 10_000 + " " + "b" * 10_000
    path = write(tmp_path / "x.txt", text.encode())
    parts = [*units(path, "text", Split(USUAL))]
    assert [part.raw for part in parts] == [b"a" * 10_000, b" " + b"b" * 10_000]
    assert seen < 3 * len(text)  # it is read twice
    monkeypatch.setattr(reading, "LONGEST", 9_000)
    _, (problem,) = read(path)
    assert problem.startswith(f"{path}: has text without white space that is longer than ")


def test_a_line_that_is_too_long_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 64)
    monkeypatch.setattr(reading, "LONGEST", 1000)
    texts = ["one", "x" * 5000, "two"]
    path = write(tmp_path / "x.jsonl", json_lines(texts))
    assert read(path) == (["one", "two"], [f"{path}, line 2: {reading.TOO_LONG}"])
    path = write(tmp_path / "x.json", json.dumps([{"text": text} for text in texts]).encode())
    assert read(path) == (["one"], [f"{path}: has an entry that {reading.TOO_LONG}"])
    path = write(tmp_path / "x.csv", b"text\none\n" + b"x" * 5000 + b"\ntwo\n")
    assert read(path) == (["one"], [f"{path}: has a line that {reading.TOO_LONG}"])


# JSON and tables


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [7, 2**20])
def test_json_holds_the_documents_of_an_array_or_of_its_lines(tmp_path, monkeypatch, indent, piece):
    monkeypatch.setattr(reading, "PIECE", piece)
    values = [{"id": [1, {}], "text": text} for text in TEXTS]
    path = write(tmp_path / "x.json", b" " + json.dumps(values, indent=indent).encode())
    assert read(path) == (TEXTS, [])
    path = write(tmp_path / "y.json.gz", json_lines(TEXTS))
    assert read(path) == (TEXTS, [])
    path = write(tmp_path / "z.json", json.dumps(values[1], indent=indent).encode())
    assert read(path) == (TEXTS[1:2], [])


@pytest.mark.parametrize(
    ("content", "texts", "problem"),
    [
        ('[{"text": "a"}, {"text": "b"', ["a"], ": is not JSON after entry 1"),
        ('[{"text": "a"}, nonsense]', ["a"], ": is not JSON after entry 1"),
        ("nonsense", [], ": is not JSON"),
        ('{"data": [{"text": "a"}]}', [], ", entry 1: has no 'text', only 'data'"),
        ('["a"]', [], ", entry 1: is JSON but not an object"),
    ],
)
def test_what_is_no_document_in_json_is_named(tmp_path, content, texts, problem):
    path = write(tmp_path / "x.json", content.encode())
    assert read(path) == (texts, [f"{path}{problem}"])


@pytest.mark.parametrize("name", ["x.csv", "x.csv.xz"])
def test_a_table_holds_a_document_per_row_in_the_column_asked_for(tmp_path, name):
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["id", "body"], *enumerate(TEXTS)])
    path = write(tmp_path / name, "\ufeff".encode() + table.getvalue().encode() + b"\r\n9\r\n")
    assert read(path, "body") == (
        [*TEXTS, ""],
        [f"{path}, line 9: has 1 instead of 2 columns"],
    )
    assert read(path) == ([], [f"{path}: has no column 'text', only 'id', 'body'"])


def test_a_quotation_mark_that_is_not_closed_ends_a_table(tmp_path):
    path = write(tmp_path / "x.csv", b'text\none\n"two\nthree\n')
    assert read(path) == (["one"], [f"{path}: unexpected end of data"])


def test_a_quotation_mark_by_itself_joins_no_lines_of_a_table_with_tabs(tmp_path):
    path = write(tmp_path / "x.tsv", b'id\ttext\n1\t"one\n2\ttwo "2"\n3\t"three"\r\n')
    assert read(path) == (['"one', 'two "2"', '"three"'], [])


def test_a_line_of_a_table_that_is_not_utf_8_is_named(tmp_path):
    path = write(tmp_path / "x.csv", b"text\na\n\xff\nb\n")
    assert read(path) == (["a", "b"], [f"{path}, line 3: is not UTF-8 at byte 0"])


# Files that are not text


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.txt", "hello")
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.zip", zipped(), "is a ZIP archive (as .docx, .xlsx and .epub are): unpack it"),
        ("x.docx", zipped(), "is a ZIP archive (as .docx"),
        ("x.tar", tarred(), "is a tar archive, which is not supported: unpack it"),
        ("x.tar.gz", tarred(), "is a tar archive, which is not supported: unpack it"),
        ("x.pdf", b"%PDF-1.7 text", "is a PDF, which is not supported: save its text"),
        ("x.png", b"\x89PNG\r\n\x1a\n", "is an image, not text"),
        ("x.txt", gzip.compress(b"hello", mtime=0), "is compressed with gzip: rename it to .gz"),
        ("x.txt", bz2.compress(b"hello"), "is compressed with bzip2: rename it to .bz2"),
        ("x.jsonl", lzma.compress(b"hello"), "is compressed with xz: rename it to .xz"),
        ("x.txt", "hello".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("x.txt", b"abc\0def", "has NUL bytes, so it is not text"),
        ("x.txt", b"long \0" * 100, "has NUL bytes, so it is not text"),
        ("x.txt", b"\x1b[1m" * 30, "has 25% control characters, so it is not text"),
    ],
)
def test_what_is_no_text_is_left_out_with_what_it_is(tmp_path, monkeypatch, name, content, told):
    monkeypatch.setattr(reading, "PIECE", 64)
    path = write(tmp_path / name, content)
    texts, (problem,) = read(path)
    assert texts == []
    assert problem.startswith(f"{path}: {told}")


def test_a_few_control_characters_and_white_space_of_every_kind_are_text(tmp_path):
    text = "word \t\r\n\x0b\x0c\x1c\x85" * 20 + "\x07"
    assert read(write(tmp_path / "x.txt", text.encode())) == ([text], [])


def test_names_are_told_on_one_line(tmp_path):
    path = write(tmp_path / "x\ny\x1b.txt", b"\xff")
    (unit,) = units(path, "text", Split(USUAL))
    assert unit.where == f"{tmp_path}/x\\ny\\x1b.txt"


def test_what_is_in_the_place_of_a_file_is_told_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    for name, told in (("pipe.txt", "is a pipe, not a file"), ("gone.txt", "is a broken link")):
        texts, (problem,) = read(tmp_path / name)
        assert texts == []
        assert problem.startswith(f"{tmp_path}/{name}: {told}")


# Damage


@pytest.mark.parametrize("count", [10, 1000])
@pytest.mark.parametrize("damage", [b"junk", "cut"])
def test_of_damaged_zstd_all_before_the_damage_is_read(tmp_path, damage, count):
    path = write(tmp_path / "x.jsonl.zst", json_lines(TEXTS * count))
    frame = path.read_bytes()
    path.write_bytes(frame + (frame[:-5] if damage == "cut" else damage))
    texts, problems = read(path)
    assert texts[: len(TEXTS) * count] == TEXTS * count
    assert len(texts) == len(TEXTS) * count or damage == "cut"
    assert len(problems) == 1 and problems[0].startswith(f"{path}: ")
