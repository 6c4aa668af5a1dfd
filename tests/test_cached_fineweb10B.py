"""The downloader with a fake hub on the loopback interface.

The hub answers as the real one does: a shard's address redirects to a storage server, and the
redirect carries size and SHA-256. Sizes and hashes come from the hub, so shards here are small.
"""

import hashlib
import http.server
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import numpy as np
import pytest

import cached_fineweb10B
from nanogpt.data import hub as requests
from tests.programs import Process, wait_until

SCRIPT = Path(__file__).parent.parent / "cached_fineweb10B.py"
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
SENT = 200_000  # bytes of a larger shard that are sent before a fault


def shard_bytes(count, seed):
    tokens = np.random.default_rng(seed).integers(0, 50257, count).astype("<u2")
    return struct.pack("<3i", 20240520, 1, count) + bytes(4 * 253) + tokens.tobytes()


def impatient(arguments):
    """Run the script, except for the time it waits for a busy hub.

    Here the hub's library, which reads the environment, must not be imported before.
    """
    requests.WAITS = (0.02, 0.04)
    return cached_fineweb10B.main(arguments)


class Hub:
    """A hub and its storage server, with faults set by tests."""

    def __init__(self):
        self.files = {VAL: shard_bytes(50, 0), ONE: shard_bytes(60, 1), TWO: shard_bytes(70, 2)}
        self.claims = {}  # name -> headers that differ from the truth
        self.status = {}  # "HEAD" or "GET" -> the status to fail with
        self.moods = {"HEAD": [], "GET": []}  # statuses to fail with at first
        self.ranges = True  # whether the storage server knows what a Range is
        self.stop_at = None  # offset in bytes where the next answer with a file stops ...
        self.stop = lambda: None  # ... and does this, before the connection closes
        self.resets = False  # whether that is by a reset
        self.ending = None  # sent after a file, repeatedly
        self.pause = 0.0  # seconds between the bytes of a file
        self.retry_after = 0  # seconds, where it fails at first
        self.delay = 0.0  # seconds before a file is sent
        self.gets = []  # (name, Range header or None) of each file sent
        self.released = threading.Event()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_HEAD(self):
                hub.answer_resolve(self)

            def do_GET(self):
                if self.server is hub.storage:
                    hub.answer_storage(self)
                else:
                    hub.answer_resolve(self)

            def log_message(self, *_):
                pass

        self.front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.storage = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        for server in (self.front, self.storage):
            server.handle_error = lambda *_: None  # clients that leave early
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.released.set()
        for server in (self.front, self.storage):
            server.shutdown()
            server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.front.server_port}"

    @staticmethod
    def answer(request, status, headers):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, str(value))
        request.end_headers()

    def answer_resolve(self, request):
        folder, _, name = request.path.rpartition("/")
        if folder != "/datasets/kjj0/fineweb10B-gpt2/resolve/main":
            self.answer(request, 404, {"Content-Length": 0})
        elif self.moods[request.command]:
            status = self.moods[request.command].pop(0)
            self.answer(request, status, {"Content-Length": 0, "Retry-After": self.retry_after})
        elif request.command in self.status:
            self.answer(request, self.status[request.command], {"Content-Length": 0})
        elif name not in self.files:
            self.answer(request, 404, {"Content-Length": 0, "X-Error-Code": "EntryNotFound"})
        else:
            truth = {
                "Content-Length": 0,
                "Location": f"http://127.0.0.1:{self.storage.server_port}/blobs/{name}",
                "X-Repo-Commit": "0123456789abcdef0123456789abcdef01234567",
                "X-Linked-Size": len(self.files[name]),
                "X-Linked-ETag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"',
            }
            self.answer(request, 302, truth | self.claims.get(name, {}))

    def answer_storage(self, request):
        name = request.path.rpartition("/")[2]
        content, wanted = self.files[name], request.headers["Range"]
        self.gets.append((name, wanted))
        wanted = wanted if self.ranges else None
        time.sleep(self.delay)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1)) if wanted else 0
        headers = {} if self.ending else {"Content-Length": len(content) - start}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(request, 206 if wanted else 200, headers)
        stop_at, self.stop_at = self.stop_at, None
        for at in range(start, len(content)) if self.pause else ():
            request.wfile.write(content[at : at + 1])
            if self.released.wait(self.pause):
                return
        request.wfile.write(content[start:stop_at])
        while self.ending:
            request.wfile.write(self.ending)
        if stop_at is not None:
            request.wfile.flush()
            self.stop()
            if self.resets:
                request.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("2i", 1, 0))
                request.connection.close()
            request.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and an empty working directory, without the user's settings and secrets."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for name in [name for name in os.environ if name.upper().startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(requests, "WAITS", (0.02, 0.04))
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    yield hub
    close_session()
    hub.close()


@pytest.fixture
def start(hub, tmp_path, cache):
    """Start the script in a process of its own."""

    def start(*arguments, endpoint=hub.url, **settings):
        names = "HF_ENDPOINT", "HF_HOME", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"
        values = endpoint, str(tmp_path / "hf_home"), "2", "1"
        environment = dict(zip(names, values, strict=True))
        settings |= {"environment": environment, "main": impatient}
        return Process(arguments, tmp_path, cache, **settings)

    return start


@pytest.fixture
def run(hub, monkeypatch, capsys):
    """Run the script to its end; return exit status, standard output and standard error."""
    from huggingface_hub import constants

    def run(*arguments, endpoint=hub.url):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        try:
            status = cached_fineweb10B.main([*arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "fineweb10B"


@pytest.fixture
def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".bin"}


def assert_one_sentence(err, *mentions):
    assert len(err.splitlines()) == 1, err
    assert err.endswith(".\n")
    for mention in mentions:
        assert mention in err


# When all is well


def test_n_training_shards_and_the_validation_shard_arrive_byte_for_byte(run, hub, folder):
    status, out, err = run("2")
    assert (status, err) == (0, "")
    assert contents(folder) == hub.files
    assert out.splitlines() == [
        f"1/3 {VAL} 0.0 MB verified",
        f"2/3 {ONE} 0.0 MB verified",
        f"3/3 {TWO} 0.0 MB verified",
    ]


def test_nothing_but_the_shards_their_digests_and_the_lock_is_left_in_the_folder(run, hub, folder):
    run("2")
    assert set(os.listdir(folder)) - {".lock"} == {*hub.files, "SHA256SUMS"}
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
    assert done.stdout.count(b": OK\n") == 3


def test_a_second_run_needs_no_hub(run, hub, folder, closed_port):
    run("2")
    status, out, err = run("2", endpoint=closed_port)
    assert (status, err) == (0, "")
    assert out.count("already here") == 3
    assert len(hub.gets) == 3


def test_only_the_shards_that_are_missing_are_downloaded(run, hub, folder):
    run("1")
    status, _, _ = run("2")
    assert status == 0
    assert [name for name, _ in hub.gets] == [VAL, ONE, TWO]


def test_all_103_training_shards_are_the_default(run, hub, folder):
    names = {VAL} | {f"fineweb_train_{i:06d}.bin" for i in range(1, 104)}
    hub.files = {name: shard_bytes(1, seed) for seed, name in enumerate(sorted(names))}
    status, _, _ = run()
    assert status == 0
    assert contents(folder) == hub.files


def test_the_folder_can_be_chosen(run, hub, tmp_path):
    status, _, _ = run("1", "--folder", "here/there")
    assert status == 0
    assert sorted(contents(tmp_path / "here" / "there")) == [ONE, VAL]


def test_a_damaged_shard_that_was_there_is_replaced(run, hub, folder):
    folder.mkdir()
    (folder / ONE).write_bytes(hub.files[ONE][:-1])
    status, _, _ = run("1")
    assert status == 0
    assert contents(folder) == {name: hub.files[name] for name in (VAL, ONE)}


def test_two_downloads_into_one_folder_do_not_disturb_each_other(start, hub, folder):
    hub.delay = 0.5
    with start("1") as one, start("1") as other:
        assert [(each.end(), each.stderr) for each in (one, other)] == [(0, "")] * 2
    assert contents(folder) == {name: hub.files[name] for name in (VAL, ONE)}
    assert len(hub.gets) == 2


# When a download stops halfway


@pytest.fixture
def large(hub):
    """The validation shard, half of which is sent before a test's fault."""
    hub.files[VAL] = shard_bytes(SENT, 0)
    hub.stop_at = SENT
    return hub.files[VAL]


@pytest.mark.parametrize("resets", [False, True])
def test_a_cut_connection_is_resumed_within_the_run(run, hub, folder, large, resets):
    hub.resets = resets
    status, _, err = run("1")
    assert status == 0
    assert "Traceback" not in err
    (_, first), (_, second), *_ = hub.gets
    assert first is None
    came = int(re.fullmatch(r"bytes=(\d+)-", second)[1])
    assert came == SENT or (resets and 0 < came < SENT)  # what the system discarded
    assert contents(folder)[VAL] == large


def test_a_run_that_lost_its_hub_is_resumed_by_the_next(run, hub, folder, large):
    hub.stop = lambda: hub.status.update(GET=503)
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err.splitlines(keepends=True)[-1], VAL, "503")
    assert contents(folder) == {}

    hub.status.clear()
    status, _, _ = run("1")
    assert status == 0
    assert hub.gets[:2] == [(VAL, None), (VAL, f"bytes={SENT}-")]
    assert contents(folder)[VAL] == large


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_a_stopped_run_is_resumed_by_the_next(start, run, hub, folder, large, sent, status):
    hub.stop = hub.released.wait
    partial = folder / f".{VAL}.partial"
    with start("1") as process:
        wait_until(lambda: partial.exists() and partial.stat().st_size == SENT)
        process.send(sent)
        assert process.end() == status
        assert "Traceback" not in process.stderr
    assert contents(folder) == {}

    assert run("1")[0] == 0
    assert hub.gets[:2] == [(VAL, None), (VAL, f"bytes={SENT}-")]
    assert contents(folder)[VAL] == large


def test_a_partial_file_longer_than_the_shard_is_not_built_upon(run, hub, folder):
    folder.mkdir()
    (folder / f".{VAL}.partial").write_bytes(b"x" * 10_000)
    status, _, _ = run("1")
    assert status == 0
    assert contents(folder)[VAL] == hub.files[VAL]


# When the shard is not what it should be


def test_a_shard_with_another_hash_is_named_and_deleted(run, hub, folder):
    right = hub.files[ONE]
    hub.claims[ONE] = {"X-Linked-ETag": f'"{hashlib.sha256(right).hexdigest()}"'}
    hub.files[ONE] = right[:1100] + bytes([right[1100] ^ 1]) + right[1101:]
    status, _, err = run("2")
    assert status == 1
    assert_one_sentence(err, ONE, "damaged")
    assert set(os.listdir(folder)) - {".lock", "SHA256SUMS"} == {VAL}

    hub.files[ONE] = right
    assert run("2")[0] == 0
    assert contents(folder)[ONE] == right


@pytest.mark.parametrize("extra", [-2, 2])
def test_a_shard_of_another_size_never_gets_its_name(run, hub, folder, extra):
    hub.claims[ONE] = {"X-Linked-Size": len(hub.files[ONE]) + extra}
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, ONE, "bytes")
    assert sorted(contents(folder)) == [VAL]


def test_a_file_that_is_no_shard_never_gets_its_name(run, hub, folder):
    hub.files[ONE] = b"<html>" * 500
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, ONE, "not a shard")
    assert sorted(contents(folder)) == [VAL]


def test_an_answer_without_end_is_stopped_at_the_size_that_was_promised(run, hub, folder):
    hub.ending = b"more" * 2**14
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, VAL, f"longer than the hub's {len(hub.files[VAL]):,} bytes")
    assert sum(path.stat().st_size for path in folder.iterdir()) == 0


def test_a_hub_that_sends_next_to_nothing_is_given_up_and_what_came_is_kept(
    run, hub, folder, monkeypatch
):
    monkeypatch.setattr(cached_fineweb10B, "SLOW", 0.25)
    hub.pause = 0.05
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, VAL, "bytes per second", "continue where it stopped")
    assert (folder / f".{VAL}.partial").read_bytes() in (hub.files[VAL][:n] for n in range(3, 20))


def test_a_hub_that_asks_for_more_patience_than_there_is_is_one_sentence(run, hub):
    hub.moods["GET"], hub.retry_after = [429], 3600
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, VAL, "HTTP 429 and asks to wait 3,600 s")


def test_an_answer_without_a_hash_is_not_trusted(run, hub, folder):
    hub.claims[VAL] = {"X-Linked-ETag": '"abc"'}
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, VAL, "SHA-256")
    assert hub.gets == []


# When the hub, the disk or the user fails


@pytest.mark.parametrize("code", [401, 404, 500, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_error_of_the_hub_is_one_sentence(run, hub, folder, method, code):
    hub.status[method] = code
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, VAL, str(code))


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("moods", [[429, 503], [500, 502]])
def test_a_hub_that_is_busy_or_broken_for_a_while_is_asked_again(run, hub, folder, method, moods):
    hub.moods[method] = list(moods)
    status, out, err = run("1")
    assert status == 0
    assert err == ""
    assert [f"HTTP {mood}): " in line for mood in moods for line in out.splitlines()].count(
        True
    ) == 2
    assert contents(folder)[VAL] == hub.files[VAL]


def test_a_server_that_sends_the_whole_instead_of_the_rest_does_no_harm(run, hub, folder):
    folder.mkdir()
    (folder / f".{VAL}.partial").write_bytes(hub.files[VAL][:500])
    hub.ranges = False
    status, _, _ = run("1")
    assert status == 0
    assert hub.gets[0] == (VAL, "bytes=500-")
    assert contents(folder)[VAL] == hub.files[VAL]


def test_a_shard_the_hub_lacks_is_named(run, hub, folder):
    del hub.files[TWO]
    status, _, err = run("2")
    assert status == 1
    assert_one_sentence(err, TWO, "404")
    assert hub.gets == []


def test_being_offline_is_one_sentence(run, closed_port):
    status, _, err = run("1", endpoint=closed_port)
    assert status == 1
    assert_one_sentence(err, VAL, "network connection")


def test_a_hub_that_never_answers_is_given_up(start):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = time.monotonic()
        with start("1", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}") as process:
            assert process.end() == 1
    assert_one_sentence(process.stderr, VAL)
    assert time.monotonic() - before < 10


def test_a_disk_too_small_is_said_before_the_download(run, hub, folder):
    hub.claims[ONE] = {"X-Linked-Size": 10**18}
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, "1000000000.0 GB", str(folder.name))
    assert hub.gets == []


def test_a_disk_that_fills_up_is_one_sentence(start, hub, folder):
    hub.files[ONE] = shard_bytes(SENT, 1)
    with start("1", limit=SENT) as process:
        assert process.end() == 1
    assert_one_sentence(process.stderr, folder.name, "File too large", "make room")
    assert sorted(contents(folder)) == [VAL]


def test_a_folder_that_cannot_be_made_is_one_sentence(run, hub, folder):
    folder.write_text("a file is in the way")
    status, _, err = run("1")
    assert status == 1
    assert_one_sentence(err, folder.name, "File exists")


@pytest.mark.parametrize("n", ["0", "-1", "104", "1.5", "many", ""])
def test_an_impossible_number_of_shards_is_refused(run, hub, n):
    status, _, err = run(n)
    assert status == 2
    assert_one_sentence(err, n, "not a number from 1 to 103")


def test_the_script_itself_starts(tmp_path):
    command = [sys.executable, str(SCRIPT), "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "not a number from 1 to 103" in done.stderr


def test_help_says_what_it_does(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "FineWeb10B" in out
    assert "--folder" in out
