"""A run's shards of the user's own text, and when they are created again."""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest

from nanogpt.data.batches import Rows
from nanogpt.data.shards import read_shard
from nanogpt.data.text import prepare as prepare_module
from nanogpt.data.text.cache import content_of, prepare
from nanogpt.data.text.documents import DataError, find_files
from tests.test_prepare_data import ROOT, contents, expected_shards, made_up_texts, write_lines


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_run_gets_shards_that_it_can_train_on(tmp_path, cache):
    texts = made_up_texts(300)
    path = write_lines(tmp_path / "x.jsonl", texts)
    prepared = prepare([str(path)], "bytes")
    (train,), (val,) = glob(prepared.train_files), glob(prepared.val_files)
    assert contents(Path(train).parent) == expected_shards(texts, 10**8)
    assert prepared.train_tokens == len(read_shard(train))
    assert prepared.val_tokens == len(read_shard(val))
    assert len(Rows([Path(train)], 128, 0, False, 256, separator=255, max_document=100)) > 10


def test_a_second_run_reads_no_text_again(tmp_path, cache, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(300))
    first = prepare([str(path)], "bytes")
    monkeypatch.setattr(prepare_module, "encode_rest", None)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert prepare([str(path)], "bytes") == first


def test_text_that_changed_is_encoded_again(tmp_path, cache):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(300))
    first = prepare([str(path)], "bytes")
    path.write_bytes(path.read_bytes().replace(b"cat", b"dog"))
    second = prepare([str(path)], "bytes")
    assert second.train_files != first.train_files
    (shard,) = glob(second.train_files)
    assert b"dog" in read_shard(shard).astype("u1").tobytes()


def test_the_same_text_under_another_name_and_time_is_not_encoded_again(
    tmp_path, cache, monkeypatch
):
    path = write_lines(tmp_path / "here" / "x.jsonl", made_up_texts(300))
    first = prepare([str(path)], "bytes")
    monkeypatch.setattr(prepare_module, "encode_rest", None)
    path.touch()
    assert prepare([str(path.parent)], "bytes") == first
    moved = path.rename(tmp_path / "y.jsonl")
    assert prepare([str(moved)], "bytes") == first


def test_the_same_bytes_as_another_kind_of_file_or_in_another_order_are_other_text(tmp_path, cache):
    lines, plain = tmp_path / "x.jsonl", tmp_path / "x.txt"
    for path in (lines, plain):
        write_lines(path, ["one", "two"])
    other = write_lines(tmp_path / "y.jsonl", ["three"])
    inputs = [lines], [plain], [lines, other], [other, lines]
    made = {prepare([str(path) for path in paths], "bytes").train_files for paths in inputs}
    assert len(made) == len(inputs)


def test_a_file_that_could_not_be_read_is_read_when_it_can_be(tmp_path, cache):
    path, away = write_lines(tmp_path / "x.jsonl", ["one", "two"]), tmp_path / "away"
    files = find_files([str(path)])
    path.rename(away)
    without = content_of(files, print)
    away.rename(path)
    assert content_of(files, print) != without


def test_tokenizers_and_fields_have_shards_of_their_own(tmp_path, cache):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "one", "b": "two"}\n{"a": "1", "b": "2"}\n')
    assert (
        prepare([str(path)], "bytes", "a").train_files
        != prepare([str(path)], "bytes", "b").train_files
    )


def test_two_runs_at_once_make_the_shards_once(tmp_path, cache):
    texts = made_up_texts(2000)
    path = write_lines(tmp_path / "x.jsonl", texts)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from nanogpt.data.text import cache
from nanogpt.data.text import prepare
prepare.SAVE_SECONDS = 0
rest = prepare.encode_rest
prepare.encode_rest = lambda *a: (print("encodes"), rest(*a))
print(cache.prepare([{str(path)!r}], "bytes").train_files)
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    said = [
        process.communicate(timeout=60)[0]
        for process in [subprocess.Popen(command, **pipes) for _ in "ab"]
    ]
    assert "".join(said).count("encodes") == 1
    assert contents(next(cache.rglob("prepared.json")).parent) == expected_shards(texts, 10**8)


def test_what_was_left_out_is_said(tmp_path, cache, capsys):
    path = write_lines(tmp_path / "x.jsonl", ["one", "", "two"])
    prepare([str(path)], "bytes")
    assert "Left out: 1 empty." in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 2**20])
def test_a_document_that_is_more_than_half_of_all_is_said(
    tmp_path, cache, capsys, monkeypatch, batch
):
    monkeypatch.setattr("nanogpt.data.text.encode.BATCH", batch)
    monkeypatch.setattr("nanogpt.data.text.reading.PIECE", 64)
    (tmp_path / "a.txt").write_text("word " * 190)
    (tmp_path / "b.txt").write_text("word " * 200)
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    prepare(paths, "bytes")
    said = capsys.readouterr().err
    assert f"More than half of all tokens are from one document, {paths[1]}." in said
    (tmp_path / "a.txt").write_text("word " * 200)
    prepare(paths, "bytes")
    assert "More than half" not in capsys.readouterr().err


def test_a_pipe_in_a_folder_is_left_out_and_holds_nothing_up(tmp_path, cache, capsys):
    write_lines(tmp_path / "in" / "x.jsonl", ["one", "two"])
    os.mkfifo(tmp_path / "in" / "pipe")
    prepare([str(tmp_path / "in")], "bytes")
    assert "pipe: is a pipe, not a file" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, cache):
    path = write_lines(tmp_path / "x.jsonl", ["one", "two"])
    cache.write_text("a file is in the way")
    with pytest.raises(DataError, match=r" cannot be written \([^)]*\): choose another folder"):
        prepare([str(path)], "bytes")
