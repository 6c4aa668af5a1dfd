"""Exported models, pushed to a hub on the loopback interface and used from there."""

import base64
import hashlib
import http.server
import json
import math
import re
import threading

import pytest

import evaluate
import export
import sample
import train_gpt
from tests.programs import Process
from tests.run_folders import records
from tests.small_runs import SMALL, VAL_TOKENS

NAME, COMMIT, TOKEN = "ada/gpt", "0123456789abcdef0123456789abcdef01234567", "hf_onlyForTests"


class Hub:
    """A hub that stores what is pushed, and serves it."""

    def __init__(self):
        self.files, self.status, self.requests, self.tokens = {}, 200, [], set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                hub.requests.append(f"{self.command} {path}")
                hub.tokens.add(self.headers.get("Authorization"))
                found = hub.answer_to(path, content) if hub.status == 200 else b""
                status = 404 if found is None else hub.status
                self.send_response(status)
                if path.endswith(".safetensors") or f"/{NAME}/resolve/" in path:
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("ETag", f'"{hashlib.sha256(found or b"").hexdigest()}"')
                self.send_header("Content-Length", str(len(found or b"")))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(found or b"")

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer_to(self, path, content):
        """Return the body of an answer; None for status 404."""
        api, name = f"/api/models/{NAME}", path.rpartition("/")[2]
        if path == "/api/repos/create":
            found = {"url": f"{self.url}/{NAME}"}
        elif path == "/api/validate-yaml":
            found = {"errors": [], "warnings": []}
        elif path == f"{api}/preupload/main":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            found = {"files": [{"path": f["path"]} | how for f in json.loads(content)["files"]]}
        elif path == f"{api}/commit/main":
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{self.url}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT}
        elif path in (api, f"{api}/revision/main") and self.files:
            found = {"id": NAME, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
        elif path == f"{api}/tree/{COMMIT}":
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": 40 * "a"}
                for name, content in self.files.items()
            ]
        else:
            return self.files.get(name) if f"/{NAME}/resolve/" in path else None
        return json.dumps(found).encode()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def program(hub, cache, tmp_path):
    """Runs a program to its end, in a process that only knows this hub."""

    def program(main, *arguments, **environment):
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        } | environment
        with Process(arguments, tmp_path, cache, environment=environment, main=main) as process:
            status = process.end()
        assert TOKEN not in process.output + process.stderr
        return status, process.output, process.stderr

    return program


@pytest.fixture
def here(hub, tmp_path, monkeypatch, capsys):
    """Runs a program in this process, where the hub's library is imported once."""
    from huggingface_hub import constants, utils

    def here(main, *arguments, url=hub.url):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
        return main([*map(str, arguments)]), *capsys.readouterr()

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    utils.disable_progress_bars()
    yield here
    utils.enable_progress_bars()
    utils.close_session()


def one_sentence(done, *told):
    status, stdout, stderr = done
    assert status == 2 and TOKEN not in stdout + stderr
    assert re.fullmatch(r"[^\n]+\.\n", stderr), stderr
    for words in told:
        assert words in stderr


def test_a_pushed_model_is_sampled_evaluated_and_fine_tuned_by_its_name(
    base, hub, program, tmp_path
):
    pushed = program(export.main, base.folder, "--out", "gpt", "--push-to-hub", NAME)
    assert (pushed[0], pushed[2]) == (0, "")
    assert f"{hub.url}/{NAME}" in pushed[1]
    folder = {file.name: file.read_bytes() for file in (tmp_path / "gpt").iterdir()}
    assert hub.files == folder
    assert f"Bearer {TOKEN}" in hub.tokens

    how = "--prompt", "def ", "--max-new-tokens", "12"
    written = program(sample.main, f"hf://{NAME}", *how)
    assert written == program(sample.main, "gpt", *how)
    assert written[0] == 0
    downloaded = {each.rpartition("/")[2] for each in hub.requests if each.startswith("GET /ada")}
    assert downloaded == {"config.json", "model.safetensors"}

    status, told, _ = program(evaluate.main, f"hf://{NAME}", "--val-tokens", VAL_TOKENS)
    loss = base.metrics[-1]["val_loss"]
    assert (status, f"val loss {loss:.4f}" in told) == (0, True)
    assert not [*(tmp_path / "hf").rglob("evaluation.json")]

    tuned = "--init-from", f"hf://{NAME}", *SMALL, "--num-steps", "1", "--run-name", "tuned"
    assert program(train_gpt.main, *tuned)[0] == 0
    (first,) = records(tmp_path / "runs" / "tuned")
    assert first["train_loss"] < 5 < math.log(256)  # as random weights have

    # Without the hub the cache is used; damaged files are deleted.
    hub.status = 503
    assert program(sample.main, f"hf://{NAME}", *how, HF_HUB_OFFLINE="1") == written
    (arrays,) = (tmp_path / "hf").rglob("model.safetensors")
    content = arrays.read_bytes()
    arrays.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    one_sentence(program(sample.main, f"hf://{NAME}", HF_HUB_OFFLINE="1"), "damaged", NAME)
    assert not arrays.exists()


def test_what_the_hub_refuses_is_told_in_one_sentence_before_anything_is_written(
    base, hub, here, tmp_path, monkeypatch
):
    taken = here(export.main, base.folder, "--out", base.folder, "--push-to-hub", NAME)
    one_sentence(taken, "already exists")
    assert not hub.requests
    told = "HTTP 401", NAME, "hf auth login"
    hub.status = 401
    one_sentence(here(export.main, base.folder, "--out", "gpt", "--push-to-hub", NAME), *told)
    assert not (tmp_path / "gpt").exists()
    one_sentence(here(sample.main, f"hf://{NAME}"), *told)
    hub.status = 200
    one_sentence(here(sample.main, f"hf://{NAME}"), "HTTP 404", "check the name")
    for wrong in ("hf://a/b/c", "hf://a", "hf:/a/b", "HF://a/b", "hf://a b/c"):
        one_sentence(here(sample.main, wrong), "is hf://user/name", repr(wrong))
    for wrong in ("b", "", "a/b/c"):
        pushed = here(export.main, base.folder, "--out", "gpt", "--push-to-hub", wrong)
        one_sentence(pushed, "--push-to-hub takes user/name", repr(wrong))
    nobody = "http://127.0.0.1:9"  # the discard port
    one_sentence(here(sample.main, f"hf://{NAME}", url=nobody), NAME, "network")
    hub.files = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"large"}
    one_sentence(here(sample.main, f"hf://{NAME}"), f"hf://{NAME} is a model of type gpt2")
    assert not any("model.safetensors" in each for each in hub.requests)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))  # a folder
    args = base.folder, "--out", "gpt", "--push-to-hub", NAME
    one_sentence(here(export.main, *args), "Is a directory", str(tmp_path))
