"""Shards from text: their contents, which stay bit-identical after any interruption."""

import http.server
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from hashlib import blake2b, sha256
from itertools import compress
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from nanogpt.data.shards import read_shard
from nanogpt.data.text import encode
from nanogpt.data.text import prepare as prepare_module
from tests.programs import Process

ROOT = Path(__file__).parent.parent


def made_up_texts(count, seed=0, words=60):
    """Texts of 1 to `words` words, some of them not ASCII."""
    draw = random.Random(seed)
    vocabulary = ["the", "of\n", "a", "cat", "naïve", "三十", "don't", "1234", "running;"]
    return [" ".join(draw.choices(vocabulary, k=draw.randint(1, words))) for _ in range(count)]


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def shard_bytes(tokens):
    """The format of llm.c and modded-nanogpt."""
    return struct.pack("<3i", 20240520, 1, len(tokens)) + bytes(253 * 4) + tokens.tobytes()


def expected_shards(texts, limit, name="text"):
    """Return the expected shards of byte tokens by name, computed independently."""
    digests = [int(blake2b(text.encode(), digest_size=8).hexdigest(), 16) for text in texts]
    total, below = sum(map(len, texts)), 2**64 // 100
    if len(texts) < 1000:  # the smallest digests, with a tenth of the text
        by_digest = sorted(zip(digests, map(len, texts), strict=True))
        ends = np.cumsum([length for _, length in by_digest])
        below = by_digest[int(np.searchsorted(ends, total / 10))][0] + 1
    sides, of_val = {"train": b"", "val": b""}, [digest < below for digest in digests]
    divided = sum(map(len, compress(texts, of_val))) > total / 5 and total > 30
    for text, is_val in zip(texts, of_val, strict=True):
        first = len(text) - len(text) // 10 if divided else 0 if is_val else len(text)
        for side, part in (("train", text[:first]), ("val", text[first:])):
            sides[side] += b"\xff" + part.encode() if part else b""
    shards = {}
    for side, first in (("train", 1), ("val", 0)):
        tokens = np.frombuffer(sides[side], "u1").astype("<u2")
        for number, start in enumerate(range(0, len(tokens), limit), first):
            part = tokens[start : start + limit]
            shards[f"{name}_{side}_{number:06d}.bin"] = shard_bytes(part)
    return shards


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def run(*arguments):
    """Run the script in this process; return its exit status."""
    return prepare_data.main(list(map(str, arguments)))


def bytes_of(*arguments):
    """Arguments for bytes tokens in one process."""
    return ["--tokenizer", "bytes", "--processes", "1", *arguments]


# A script like prepare_data.py that saves and distributes work more often, so that there is more to
# interrupt.
BUSY = """
import sys
sys.path.insert(0, sys.argv[1])
import prepare_data
from nanogpt.data.text import encode
from nanogpt.data.text import prepare
from nanogpt.data.text import reading
prepare.SAVE_SECONDS, encode.BATCH, reading.PIECE = 0.0, 4000, 1000
if __name__ == "__main__":
    sys.exit(prepare_data.main(sys.argv[2:]))
"""


@pytest.fixture
def start(tmp_path):
    """Start the busy script."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY)

    def start(*arguments, **settings):
        return subprocess.Popen(
            [sys.executable, script, ROOT, *map(str, arguments)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **settings,
        )

    return start


# What is in the shards


def test_shards_are_what_a_writer_of_twenty_lines_makes(tmp_path, capsys):
    texts = made_up_texts(500)
    write_lines(tmp_path / "in" / "a.jsonl", texts[:300])
    write_lines(tmp_path / "in" / "b.jsonl", texts[300:])
    out = tmp_path / "out"
    assert run(tmp_path / "in", "--out", out, *bytes_of("--shard-tokens", 5000)) == 0
    expected = expected_shards(texts, 5000)
    assert contents(out) == expected
    assert len(expected) > 5  # so that documents continue in the next shard
    assert capsys.readouterr().out.startswith("500 documents: ")
    hidden = {path.name for path in out.iterdir()} - set(expected)
    assert hidden == {".lock", "prepared.json", "SHA256SUMS"}
    sums = [f"{sha256(expected[name]).hexdigest()}  {name}\n" for name in sorted(expected)]
    assert (out / "SHA256SUMS").read_text() == "".join(sums)


def test_shards_of_very_few_tokens_are_full_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.data.text.encode.BATCH", 1)
    texts = made_up_texts(5, words=5)
    path = write_lines(tmp_path / "x.jsonl", texts)
    assert run(path, "--out", tmp_path / "out", *bytes_of("--shard-tokens", "3")) == 0
    assert contents(tmp_path / "out") == expected_shards(texts, 3)


def test_gpt_2_tokens_are_those_of_tiktoken(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network
        pytest.skip(str(error))
    texts = ["<|endoftext|> is text", *made_up_texts(100)]
    path = write_lines(tmp_path / "x.jsonl", texts)
    assert run(path, "--out", tmp_path / "out", "--processes", 1, "--name", "mine") == 0
    read = [read_shard(tmp_path / "out" / f"mine_{x}.bin") for x in ("train_000001", "val_000000")]
    documents = [encoding.encode_ordinary(text) for text in texts]
    found = [part.tolist() for side in read for part in np.split(side, np.where(side == 50256)[0])]
    assert sorted(filter(None, found)) == sorted([50256, *document] for document in documents)


def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.data.text.encode.BATCH", 3000)
    texts = made_up_texts(400)
    write_lines(tmp_path / "in" / "a.jsonl", texts)
    (tmp_path / "in" / "b.txt").write_text("".join(texts) * 50)  # long: cut into parts
    arguments = [tmp_path / "in", "--tokenizer", "bytes", "--shard-tokens", 40_000]
    assert run(*arguments, "--out", tmp_path / "one", "--processes", 1) == 0
    assert run(*arguments, "--out", tmp_path / "many", "--processes", 3) == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert contents(tmp_path / "one") == expected_shards([*texts, "".join(texts) * 50], 40_000)


@pytest.mark.parametrize("length", [10, 1000, 3_000_000])
def test_of_a_single_document_the_last_tenth_is_for_validation(tmp_path, length):
    text = ("Wörter, 三. " * (length // 10 + 1))[:length]
    (tmp_path / "x.txt").write_text(text)
    assert run(tmp_path / "x.txt", "--out", tmp_path / "out", *bytes_of()) == 0
    for name, part in (
        ("train_000001", text[: -length // 10]),
        ("val_000000", text[-length // 10 :]),
    ):
        tokens = read_shard(tmp_path / "out" / f"text_{name}.bin")
        assert tokens.astype("u1").tobytes() == b"\xff" + part.encode()


def test_of_three_documents_one_is_for_validation(tmp_path):
    texts = ["one", "two", "three"]
    path = write_lines(tmp_path / "x.jsonl", texts)
    assert run(path, "--out", tmp_path / "out", *bytes_of()) == 0
    assert contents(tmp_path / "out") == expected_shards(texts, 10**8)
    assert len(read_shard(tmp_path / "out" / "text_val_000000.bin")) in (4, 6)


# Interruptions


@pytest.mark.parametrize("processes", [1, 2])
def test_after_kill_9_at_any_moment_the_shards_have_the_same_bytes(tmp_path, start, processes):
    texts = made_up_texts(600)
    write_lines(tmp_path / "in" / "a.jsonl", texts[:300])
    long = " ".join(texts)
    (tmp_path / "in" / "b.txt").write_text(long)
    write_lines(tmp_path / "in" / "c.jsonl", texts[300:])
    out, expected = tmp_path / "out", expected_shards([*texts[:300], long, *texts[300:]], 20_000)
    arguments = [tmp_path / "in", "--out", out, "--tokenizer", "bytes"]
    arguments += ["--shard-tokens", 20_000, "--processes", processes]
    record, reached, kills = out / "prepared.json", [-1, -1], 0
    for rounds in (1, 6):
        process = start(*arguments)
        for _ in range(rounds):  # this many more saves, then it is killed
            before = reached
            while process.poll() is None and reached == before:
                reached = json.loads(record.read_text())["next"] if record.exists() else before
                time.sleep(0.0005)
        process.kill()
        process.communicate(timeout=20)
        kills += process.returncode == -signal.SIGKILL
        assert all(expected[name] == data for name, data in contents(out).items())
    assert kills == 2
    process = start(*arguments)
    assert process.wait(60) == 0, process.communicate()
    assert contents(out) == expected
    assert f"{601:,} documents: " in process.communicate()[0]
    assert not list(out.glob(".*.partial"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_crash_at_any_renaming_of_a_file_the_shards_have_the_same_bytes(
    tmp_path, monkeypatch, when
):
    texts = made_up_texts(30)
    path = write_lines(tmp_path / "x.jsonl", texts)
    monkeypatch.setattr("nanogpt.data.text.encode.BATCH", 500)
    replace, expected, crashed, count = os.replace, expected_shards(texts, 1500), True, 0

    class Crash(BaseException):
        pass

    while crashed:
        arguments = [path, "--out", tmp_path / f"{count}", *bytes_of("--shard-tokens", "1500")]
        calls = []

        def crash(*files, calls=calls, last=count):
            calls.append(files)
            if len(calls) <= last or when == "after":
                replace(*files)
            if len(calls) > last:
                raise Crash

        monkeypatch.setattr(os, "replace", crash)
        try:
            crashed = run(*arguments) != 0
        except Crash:
            crashed = True
        monkeypatch.setattr(os, "replace", replace)
        assert run(*arguments) == 0
        assert contents(tmp_path / f"{count}") == expected
        count += 1
    assert count > 7  # renamings of three records and four shards


def test_workers_end_when_their_parent_is_killed(tmp_path, start):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(1500))
    arguments = [path, "--out", tmp_path / "out", "--tokenizer", "bytes", "--processes", 2]
    process = start(*arguments, start_new_session=True)
    while not (tmp_path / "out" / "prepared.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=20)  # its pipes are closed when the last worker has ended
    assert process.returncode == -signal.SIGKILL


def test_a_finished_folder_is_left_as_it_is(tmp_path, capsys):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(200))
    arguments = [path, "--out", tmp_path / "out", *bytes_of()]
    assert run(*arguments) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("[!.]*")}
    said = capsys.readouterr().out
    assert run(*arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("[!.]*")} == before
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("change", ["input", "field", "tokens"])
def test_a_folder_of_other_shards_is_not_touched(tmp_path, capsys, change):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(200))
    arguments = [path, "--out", tmp_path / "out", *bytes_of()]
    assert run(*arguments) == 0
    before = contents(tmp_path / "out")
    if change == "input":
        write_lines(path, made_up_texts(200, seed=1))
    more = {"input": [], "field": ["--field", "x"], "tokens": ["--shard-tokens", 99]}[change]
    assert run(*arguments, *more) == 2
    assert contents(tmp_path / "out") == before
    assert "has shards of other inputs" in one_sentence(capsys)


def test_shards_that_something_else_made_are_not_overwritten(tmp_path, capsys):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(200))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text_train_000001.bin").write_bytes(b"dear")
    assert run(path, "--out", tmp_path / "out", *bytes_of()) == 2
    assert contents(tmp_path / "out") == {"text_train_000001.bin": b"dear"}
    assert "text_train_000001.bin was not written by this program" in one_sentence(capsys)


def test_a_shard_that_was_deleted_is_named(tmp_path, capsys):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(200))
    arguments = [path, "--out", tmp_path / "out", *bytes_of()]
    run(*arguments)
    (tmp_path / "out" / "text_val_000000.bin").unlink()
    capsys.readouterr()
    assert run(*arguments) == 2
    assert "text_val_000000.bin is missing" in one_sentence(capsys)


def one_sentence(capsys):
    """Return the last line on standard error."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(".")
    return line


# What cannot be read or written


def test_bad_documents_are_left_out_counted_and_the_first_are_named(tmp_path, capsys):
    texts = made_up_texts(300)
    path = write_lines(tmp_path / "in" / "a.jsonl", texts)
    with path.open("a") as file:
        file.write('\n{"text": ""}\n{"text": 5}\n' + "no\n" * 9)
    (tmp_path / "in" / "b.txt").write_bytes(b"ab\xff")
    (tmp_path / "in" / "c.txt").touch()
    assert run(tmp_path / "in", "--out", tmp_path / "out", *bytes_of()) == 0
    assert contents(tmp_path / "out") == expected_shards(texts, 10**8)
    said = capsys.readouterr().out
    assert "300 documents: " in said
    assert "Left out: 3 empty and 11 that could not be read (" in said
    assert (
        f"({path}, line 303: has a 'text' that is not text; {path}, line 304: is not JSON" in said
    )
    assert said.count("is not JSON") == 4 and "b.txt" not in said  # five are named in all
    assert "; ...). " in said


def test_a_file_that_vanishes_before_its_turn_is_left_out(tmp_path, capsys, monkeypatch):
    texts = made_up_texts(300)
    write_lines(tmp_path / "a.jsonl", texts)
    gone = write_lines(tmp_path / "b.jsonl", ["gone"])
    made = prepare_data.make_shards
    monkeypatch.setattr(prepare_data, "make_shards", lambda *a: (gone.unlink(), made(*a))[1])
    assert run(tmp_path, "--out", tmp_path / "out", *bytes_of()) == 0
    assert contents(tmp_path / "out") == expected_shards(texts, 10**8)
    assert f"{gone}: No such file" in capsys.readouterr().out


def test_inputs_without_a_document_are_one_sentence_that_says_why(tmp_path, capsys):
    path = write_lines(tmp_path / "x.jsonl", made_up_texts(3))
    assert run(path, "--out", tmp_path / "out", "--field", "body", *bytes_of()) == 2
    assert f"no document ({path}, line 1: has no 'body', only 'text')" in one_sentence(capsys)
    assert contents(tmp_path / "out") == {}


def saving_often(arguments):
    """Run it in a process of its own, which saves after each batch."""
    prepare_module.SAVE_SECONDS, encode.BATCH = 0.0, 4000
    return prepare_data.main(arguments)


def test_a_disk_that_is_full_is_one_sentence_and_with_more_room_it_goes_on(tmp_path, cache):
    texts = made_up_texts(1000)
    path = write_lines(tmp_path / "x.jsonl", texts)
    arguments = [path, "--out", tmp_path / "out", *bytes_of("--shard-tokens", 100_000)]
    limit = 100_000  # bytes, of a file of 200,000
    with Process(arguments, tmp_path, cache, limit=limit, main=saving_often) as process:
        assert process.end() == 2
    last = process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr and "cannot be written" in last and "make room" in last
    assert contents(tmp_path / "out") == {}
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["next"][1] > 0
    assert run(*arguments) == 0
    assert contents(tmp_path / "out") == expected_shards(texts, 100_000)


def test_a_worker_that_was_killed_is_one_sentence_and_it_goes_on(tmp_path, start):
    psutil = pytest.importorskip("psutil")
    texts = made_up_texts(1500)
    path = write_lines(tmp_path / "x.jsonl", texts)
    arguments = [path, "--out", tmp_path / "out", "--tokenizer", "bytes", "--processes", 2]
    process = start(*arguments)
    while not (tmp_path / "out" / "prepared.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children():
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "A worker was killed" in err.splitlines()[-1]
    assert start(*arguments).wait(60) == 0
    assert contents(tmp_path / "out") == expected_shards(texts, 10**8)


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        ([], "either inputs, or"),
        (["x", "--hub", "a/b"], "either inputs, or"),
        (["x", "--subset", "c"], "need --hub"),
        (["x", "--shard-tokens", "0"], "shard_tokens must be at least 1, not 0"),
        (["x", "--processes", "0"], "processes must be at least 1, not 0"),
        (["x", "--name", "a/b"], "'a/b'"),
        (["x"], "matches no file"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(tmp_path, capsys, arguments, mention):
    assert run(*arguments, "--out", tmp_path / "out") == 2
    assert mention in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


# Memory

PEAK = """
import re, sys
sys.path.insert(0, sys.argv[1])
import prepare_data
for path in sys.argv[2:]:
    out = ["--out", path + " made"]
    assert prepare_data.main([path, *out, "--tokenizer", "bytes", "--processes", "1"]) == 0
    print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_input(tmp_path):
    line = b'{"text": "' + b"some words " * 100 + b'"}\n'
    paths = [tmp_path / name for name in ("3.jsonl", "3.txt", "20.jsonl", "20.txt")]
    for path in paths:
        path.write_bytes(line * (int(path.stem) * 10**6 // len(line)))
    said = subprocess.check_output([sys.executable, "-c", PEAK, ROOT, *paths], text=True)
    _, small, _, large = (int(peak) / 1e3 for peak in re.findall(r"peak (\d+)", said))
    assert large < small + 10  # MB; the inputs differ by 17, their tokens by 34


# A data set on the hub


class Hub:
    """A hub with one data set."""

    def __init__(self, files, configs):
        self.files, self.configs, self.gets = files, configs, []
        self.sha = self.newest = "1" * 40  # the only revision with files, to which main points
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = self.path.partition("?")[0]
                content = None
                asked = {"/api/datasets/o/d": hub.newest}
                asked[f"/api/datasets/o/d/revision/{hub.sha}"] = hub.sha
                if path in asked:
                    info = {
                        "id": "o/d",
                        "sha": asked[path],
                        "siblings": [{"rfilename": name} for name in hub.files],
                        "cardData": {"configs": hub.configs},
                    }
                    content = json.dumps(info).encode()
                elif path.startswith(prefix := f"/datasets/o/d/resolve/{hub.sha}/"):
                    content = hub.files.get(path[len(prefix) :])
                    if self.command == "GET":
                        hub.gets.append(path[len(prefix) :])
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("X-Repo-Commit", hub.sha)
                self.send_header("ETag", f'"{hash(content)}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of three Parquet files, two of them in the subset small."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    def parquet(texts):
        file = io.BytesIO()
        write_table(pyarrow.table({"text": texts}), file)
        return file.getvalue()

    texts = made_up_texts(300)
    files = {
        "README.md": b"",
        "some/one/0.parquet": parquet(texts[:100]),
        "some/one/1.parquet": parquet(texts[100:200]),
        "some/two/0.parquet": parquet(texts[200:]),
    }
    path = {"split": "train", "path": "some/one/*"}
    hub = Hub(files, [{"config_name": "small", "data_files": [path]}])
    hub.texts = texts
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", constants.ENDPOINT)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.mark.parametrize(
    ("subset", "count"), [(["--subset", "small"], 200), (["--subset", "some/two"], 100), ([], 300)]
)
def test_a_data_set_of_the_hub_is_downloaded_file_by_file(tmp_path, hub, subset, count):
    out = tmp_path / "out"
    assert run("--hub", "o/d", *subset, "--out", out, *bytes_of()) == 0
    texts = hub.texts[200:] if count == 100 else hub.texts[:count]
    assert contents(out) == expected_shards(texts, 10**8, "d")
    assert len(hub.gets) == count / 100
    assert not list(out.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("data_files", "patterns"),
    [
        ("a/*", ["a/*"]),
        (["a/*", "b/*"], ["a/*", "b/*"]),
        ([{"split": "train", "path": ["a/*", "b/*"]}], ["a/*", "b/*"]),
        ([{"split": "test", "path": "t/*"}, {"split": "train", "path": "a/*"}], ["a/*"]),
        ([{"path": "a/*"}], ["a/*"]),
    ],
)
def test_the_training_files_of_a_subset_are_those_that_the_card_names(data_files, patterns):
    other = {"config_name": "other", "data_files": "o/*"}
    configs = [other, {"config_name": "small", "data_files": data_files}]
    assert prepare_data.patterns_of(configs, "small") == patterns


def test_downloads_can_be_kept(tmp_path, hub):
    out = tmp_path / "out"
    assert run("--hub", "o/d", "--keep-downloads", "--out", out, *bytes_of()) == 0
    assert len(list(out.rglob("*.parquet"))) == 3


def test_after_an_interruption_the_revision_is_the_same_and_what_is_done_not_downloaded_again(
    tmp_path, hub, monkeypatch, capsys
):
    out, known = tmp_path / "out", hub.files.pop("some/two/0.parquet")
    hub.files["some/two/0.parquet"] = None  # listed, but not available
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr("nanogpt.data.text.encode.BATCH", 5000)
    arguments = ["--hub", "o/d", "--out", out, *bytes_of()]
    assert run(*arguments) == 2
    assert "some/two/0.parquet" in one_sentence(capsys)
    hub.files["some/two/0.parquet"] = known
    hub.newest = "2" * 40
    assert run(*arguments) == 0
    assert contents(out) == expected_shards(hub.texts, 10**8, "d")
    assert hub.gets.count("some/one/0.parquet") == 1


def test_a_subset_that_does_not_exist_is_told_with_those_that_do(tmp_path, hub, capsys):
    assert run("--hub", "o/d", "--subset", "big", "--out", tmp_path / "out") == 2
    assert "no Parquet file in subset big: its subsets are small" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("configs", "told"),
    [
        ("x", ' must be a list, not "x"'),
        ({"small": 1}, ' must be a list, not {"small": 1}'),
        ([{"config_name": 3}], ": [0].config_name must be a string, not 3"),
        ([{"data_files": "some/*"}], ": [0].config_name is missing"),
        (
            [{"config_name": "small", "data_files": [{"path": 3}]}],
            ": [0].data_files[0].path must be a string or a list, not 3",
        ),
    ],
)
def test_a_card_that_declares_no_subsets_is_one_sentence(tmp_path, hub, capsys, configs, told):
    hub.configs = configs
    assert run("--hub", "o/d", "--subset", "small", "--out", tmp_path / "out") == 2
    sentence = one_sentence(capsys)
    assert sentence.startswith(f"The card of o/d{told}: choose another dataset.")
    assert not (tmp_path / "out").exists()


def test_a_damaged_note_of_the_revision_is_named(tmp_path, hub, capsys):
    note = tmp_path / "out" / "o--d.revision"
    note.parent.mkdir()
    for content in (b"", b"\xff\0", b"main\n"):
        note.write_bytes(content)
        assert run("--hub", "o/d", "--out", tmp_path / "out") == 2
        assert str(note) in one_sentence(capsys)


def test_a_data_set_that_does_not_exist_is_one_sentence(tmp_path, hub, capsys):
    assert run("--hub", "o/e", "--out", tmp_path / "out") == 2
    assert "o/e" in one_sentence(capsys)
