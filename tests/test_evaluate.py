"""evaluate.py on small runs, and with HellaSwag from a fake hub."""

import hashlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

import evaluate
import export
import nanogpt.devices.mesh
from nanogpt.data.shards import read_shard, write_shard
from nanogpt.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference import hellaswag
from nanogpt.inference.hellaswag import FILE, REPOSITORY, REVISION, Item
from nanogpt.inference.weights import load_run
from tests.inference.test_hellaswag import file_of
from tests.programs import run_to_end
from tests.run_folders import mean_loss
from tests.small_runs import STAGED_VAL_TOKENS, VAL_TOKENS, T, shared_folder

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary",
)


@pytest.fixture
def cache(cache, monkeypatch):
    """The folder with the embedded corpus that the runs were trained on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def base(base, tmp_path, cache):
    """A copy of the run, because other tests read it."""
    return shutil.copytree(base.folder, tmp_path / "base")


@pytest.fixture
def staged(staged, tmp_path, cache):
    return shutil.copytree(staged.folder, tmp_path / "staged")


@pytest.fixture
def shard(tmp_path):
    """Other validation data of bytes: the end of a document of ASCII, then four more."""
    random, tokens = np.random.default_rng(0), [*b"it."]
    for _ in range(4):
        tokens += [0xFF, *random.integers(32, 127, 200)]
    write_shard(tmp_path / "other.bin", tokens)
    return tmp_path / "other.bin"


def results(run, *arguments):
    """Return the contents of evaluation.json afterwards."""
    assert evaluate.main([str(run), *map(str, arguments)]) == 0
    return json.loads((run / "evaluation.json").read_text())


def logged(run, step):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(record["val_loss"] for record in records if record["step"] == step)


# The loss


def test_the_loss_is_the_one_that_training_logged_last(base, capsys):
    found = results(base)
    assert found["val_loss"] == pytest.approx(logged(base, 6), abs=1e-5)
    assert (found["step"], found["val_tokens"]) == (6, VAL_TOKENS)
    assert not found["canonical_masking"]
    assert re.fullmatch("embedded corpus [0-9a-f]{12}", found["val_files"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"step 6 | val loss {found['val_loss']:.4f} | 268 tokens of embed")
    assert lines[1].startswith(f"step 6 | bits per byte {found['bits_per_byte']:.4f} | ")


def test_a_checkpoint_of_the_first_stage_can_be_named_and_the_results_are_kept_with_its_run(
    staged, capsys
):
    assert evaluate.main([str(staged / "checkpoints" / "00000006")]) == 0
    found = json.loads((staged / "evaluation.json").read_text())
    assert (found["step"], found["val_loss"]) == (6, pytest.approx(logged(staged, 6), abs=1e-5))
    (staged / "checkpoints" / "x").mkdir()
    for wrong, why in (("00000008", "does not exist"), ("x", "is not a checkpoint")):
        assert evaluate.main([str(staged / "checkpoints" / wrong)]) == 2
        assert re.fullmatch(rf".*{wrong} {why}.*: give another.*\n", capsys.readouterr().err)


def test_the_loss_is_that_of_the_last_stage_and_an_exported_model_has_it_too(
    staged, tmp_path, tmp_path_factory, capsys
):
    run = results(staged)  # with the slower rotations
    assert (run["step"], run["val_loss"]) == (28, pytest.approx(logged(staged, 28), abs=1e-5))
    tokens = read_shard(shared_folder(tmp_path_factory) / "documents" / "val.bin")
    write_shard(tmp_path / "val.bin", tokens[: STAGED_VAL_TOKENS + 1])
    assert export.main([str(staged), "--out", str(tmp_path / "gpt")]) == 0
    found = results(tmp_path / "gpt", "--val-files", tmp_path / "val.bin")  # all that there are
    assert (found["step"], found["val_tokens"]) == (28, STAGED_VAL_TOKENS)
    assert found["val_loss"] == pytest.approx(run["val_loss"], abs=1e-6)
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config | {"tokenizer": "gpt2"}))
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "gpt")]) == 2
    assert re.fullmatch(
        ".* does not say what it was validated on: .*--val-files.*\n", capsys.readouterr().err
    )


def test_ids_that_cannot_come_next_are_left_out_if_asked_for(base, capsys, monkeypatch):
    of_bytes = results(base, "--canonical-masking")  # in any order
    assert of_bytes["val_loss"] == pytest.approx(logged(base, 6), abs=1e-5)
    assert capsys.readouterr().out.splitlines()[0].endswith(", canonical masking")
    nothing_but_ascii = np.repeat(np.uint8([0, 255]), 16) * np.ones((256, 1), np.uint8)
    monkeypatch.setattr(evaluate, "impossible_next", lambda *arguments: nothing_but_ascii)
    found = results(base, "--canonical-masking")
    assert found["canonical_masking"] and found["val_loss"] < of_bytes["val_loss"] - 0.1
    config = json.loads((base / "config.json").read_text())  # of a run that was validated so
    (base / "config.json").write_text(json.dumps(config | {"canonical_masking": True}))
    assert results(base)["val_loss"] == found["val_loss"]


def test_neither_the_devices_nor_their_rows_change_the_loss(base, monkeypatch):
    """On eight devices it is the same, too: see above."""
    monkeypatch.setattr(nanogpt.devices.mesh, "make_mesh", lambda: make_mesh(1))
    found = results(base, "--batch-size", 4)["val_loss"]  # 9 rows: 4, 4 and 1
    assert found == pytest.approx(logged(base, 6), abs=1e-5)


def test_other_shards_and_another_count_of_tokens_can_be_asked_for(base, shard):
    found = results(base, "--val-files", shard, "--val-tokens", 500)
    _, graph, params, _ = load_run(base, make_mesh(1))
    loss = mean_loss(graph, params, shard, 500, T)
    assert found["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert (found["val_files"], found["val_tokens"]) == (str(shard), 500)
    # Bits per byte are all the nats over the bytes of the text.
    text = ByteTokenizer().decode(np.fromfile(shard, "<u2")[512:][1:501]).encode()
    assert len(text) == 497  # three of the targets begin a document
    bits = 500 * found["val_loss"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / 497)


def test_more_tokens_than_there_are_is_an_answer_in_one_sentence(base, shard, capsys):
    arguments = [str(base), "--val-files", str(shard), "--val-tokens", "807"]
    assert evaluate.main(arguments) == 2
    assert re.fullmatch(
        r"val_tokens is 807, but .* have 806 tokens .*\.\n", capsys.readouterr().err
    )


def test_other_data_than_the_run_was_validated_on_are_told(base, shard, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "validation_files", lambda pattern: ([shard], "other"))
    assert evaluate.main([str(base), "--val-tokens", "807"]) == 2
    warning, _ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"WARNING: the run was validated on other data: shard val_000000\.bin had "
        r"[\d,]+ tokens before and has nothing now\.",
        warning,
    )


# Bits per byte


@needs_gpt2
def test_the_bytes_of_gpt2s_tokens_are_those_of_their_text():
    tokenizer = GPT2Tokenizer()
    lengths = evaluate.bytes_per_token(tokenizer)
    text = "def f(x):\n    return 'naïve 日本語 🙂'  # <|endoftext|>\r\n" * 3
    tokens = tokenizer.encode(text)
    assert lengths[tokens].sum() == len(text.encode())
    single = [token for token in range(256, 50256, 7) if "�" not in tokenizer.decode([token])]
    assert lengths[single].tolist() == [len(tokenizer.decode([t]).encode()) for t in single]
    assert lengths[50256:].tolist() == [0] * (2**16 - 50256)


def test_a_byte_is_a_byte_and_its_separator_none():
    lengths = evaluate.bytes_per_token(ByteTokenizer())
    assert lengths[:255].tolist() == [1] * 255
    assert not lengths[255:].any()


# What is kept


def test_results_of_the_same_step_are_added_to_and_those_of_another_dropped(tmp_path):
    def write(step, **found):
        evaluate.write_results(tmp_path, step, found)
        kept = json.loads((tmp_path / "evaluation.json").read_text())
        assert kept.pop("environment").keys() >= {"commit", "date", "jax", "hardware"}
        return kept

    assert write(3, val_loss=2.0) == {"step": 3, "val_loss": 2.0}
    assert write(3, hellaswag={"items": 1}) == {
        "step": 3,
        "val_loss": 2.0,
        "hellaswag": {"items": 1},
    }
    assert write(3, val_loss=1.5) == {"step": 3, "val_loss": 1.5, "hellaswag": {"items": 1}}
    assert write(4, val_loss=1.0) == {"step": 4, "val_loss": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        "{}",
        '{"step": 3',
        '{"step": "3"}',
        '{"step": 3, "val_loss": []}',
        "[" * 10_000,
    ],
)
def test_a_file_of_results_that_cannot_be_read_is_replaced(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    evaluate.write_results(tmp_path, 3, {"val_loss": 2.0})
    assert json.loads((tmp_path / "evaluation.json").read_text())["val_loss"] == 2.0


def test_a_write_that_fails_leaves_the_earlier_results_and_no_other_file(tmp_path, monkeypatch):
    evaluate.write_results(tmp_path, 3, {"val_loss": 2.0})
    before = (tmp_path / "evaluation.json").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(evaluate.ConfigError, match=r"No space left on device.*\.$"):
        evaluate.write_results(tmp_path, 3, {"val_loss": 1.0})
    assert (tmp_path / "evaluation.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_checkpoint_that_is_saved_meanwhile_is_not_taken_for_the_one_that_was_read(
    staged, tmp_path, monkeypatch
):
    newest = tmp_path / "00000028"
    shutil.move(staged / "checkpoints" / newest.name, newest)
    mesh = make_mesh(1)
    _, _, params, checkpoint = load_run(staged, mesh)

    def read_and_save(*arguments):
        found = load_run(*arguments)
        shutil.move(newest, staged / "checkpoints" / newest.name)
        return found

    monkeypatch.setattr("nanogpt.inference.weights.load_run", read_and_save)
    run = evaluate.load(staged, mesh)
    assert run.step == checkpoint.step < 28
    np.testing.assert_array_equal(run.params["head"], params["head"])


# HellaSwag, from a hub


class Hub:
    """A hub with one file, or with other answers set by a test."""

    def __init__(self, content):
        self.content, self.status, self.requests = content, 200, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.requests.append((self.command, self.path))
                there = self.path == f"/datasets/{REPOSITORY}/resolve/{REVISION}/{FILE}"
                self.send_response(hub.status if there else 404)
                self.send_header("Content-Length", str(len(hub.content)))
                self.send_header("X-Repo-Commit", REVISION)
                self.send_header("ETag", f'"{hashlib.sha256(hub.content).hexdigest()}"')
                self.end_headers()

            def do_GET(self):
                self.do_HEAD()
                self.wfile.write(hub.content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def items():
    """Items of text in GPT-2's tokens, as llm.c made them."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with GPT-2's vocabulary")
    encode = GPT2Tokenizer().encode
    texts = [
        ("A man sits.", " He naps.", " He is a roof.", " Up he is.", " A he."),
        ("def f(x):", " return x", " import", " y", " pass"),
        ("One, two,", " three, four", " five", " six", " none at all, or so it seems to me"),
    ]
    return [
        Item(encode(context), [*map(encode, endings)], label)
        for label, (context, *endings) in enumerate(texts)
    ]


@pytest.fixture
def hub(items, tmp_path, monkeypatch):
    """A local hub and an empty cache; the expected file is the hub's."""
    from huggingface_hub import constants

    hub = Hub(file_of(items))
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(hub.content).hexdigest())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_hellaswag_is_scored_item_by_item_and_kept_beside_the_loss(base, hub, items, capsys):
    found = results(base, "--hellaswag")
    _, graph, params, _ = load_run(base, make_mesh(1))
    logits_of = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens[None])[0])
    gpt2, bytes_ = GPT2Tokenizer(), ByteTokenizer()
    correct = {"accuracy_norm": 0, "accuracy": 0}
    for item in items:
        losses = []
        for ending in item.endings:
            context, ending = (bytes_.encode(gpt2.decode(part)) for part in (item.context, ending))
            row = np.concatenate([[0xFF], context, ending])[-T - 1 :]
            logits = np.asarray(logits_of(np.pad(row, (0, 64 - len(row)))), np.float64)
            places = np.arange(len(row) - len(ending), len(row))
            loss = -log_softmax(logits, axis=-1)[places - 1, row[places]].sum()
            losses.append((loss, len(ending)))
        sums, lengths = map(np.array, zip(*losses, strict=True))
        correct["accuracy"] += np.argmin(sums) == item.label
        correct["accuracy_norm"] += np.argmin(sums / lengths) == item.label
    norm = correct["accuracy_norm"] / 3
    assert found["hellaswag"] == {
        "accuracy_norm": pytest.approx(norm),
        "accuracy": pytest.approx(correct["accuracy"] / 3),
        "standard_error": pytest.approx(math.sqrt(norm * (1 - norm) / 3)),
        "items": 3,
    }
    assert found["val_loss"] == pytest.approx(logged(base, 6), abs=1e-5)
    line = f"step 6 | hellaswag accuracy_norm {norm:.4f} +- "
    assert capsys.readouterr().out.splitlines()[2].startswith(line)


@pytest.fixture
def known(monkeypatch):
    """A loss that need not be computed."""
    monkeypatch.setattr(evaluate, "validation_nats", lambda *_: 500.0)


def test_only_the_first_items_can_be_asked_for_and_the_file_is_fetched_once(base, known, hub):
    assert results(base, "--hellaswag", "--hellaswag-items", 1)["hellaswag"]["items"] == 1
    assert [method for method, _ in hub.requests] == ["HEAD", "GET"]
    hub.status = 503
    evaluate.hellaswag_file()
    assert len(hub.requests) == 2


@pytest.mark.parametrize("status", [401, 404, 410])
def test_a_hub_without_the_file_is_told_in_one_sentence(base, known, hub, capsys, status):
    hub.status = status
    assert evaluate.main([str(base), "--hellaswag"]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(rf"Cannot download {FILE} \(.*\): check the network .*\.\n", output.err)
    assert "val loss" in output.out  # which needs no hub


def test_another_file_than_llm_cs_is_refused_before_anything_is_scored(base, hub, capsys):
    hub.content = hub.content[:-1] + b"x"
    assert evaluate.main([str(base), "--hellaswag"]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(rf".*{FILE} is not llm\.c's .* SHA-256 .*\.\n", output.err)
    assert output.out == ""


def test_being_offline_is_one_sentence(base, known, hub, capsys, monkeypatch):
    from huggingface_hub import constants

    nobody = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # the discard port
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's attempts
    assert evaluate.main([str(base), "--hellaswag"]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(rf"Cannot download {FILE} \(.*\): check .*\.\n", output.err)
    assert "val loss" in output.out  # which needs no network


def test_a_cache_that_cannot_be_written_is_one_sentence(base, known, hub, tmp_path, capsys):
    (tmp_path / "hub").write_text("a file is in the way")
    assert evaluate.main([str(base), "--hellaswag"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r".*hub.* cannot be written \(.*\): set HF_HOME to another folder\.", last)


# Mistakes


def test_ctrl_c_is_no_traceback(base, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "validation_nats", interrupted)
    assert evaluate.main([str(base)]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def on_a_full_disk(arguments):
    """Run it with a console that cannot be written."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return evaluate.main(arguments)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_console_that_cannot_be_written_ends_no_work(base, tmp_path, cache):
    (base / "evaluation.json").unlink(missing_ok=True)
    done = run_to_end([base], tmp_path, cache, main=on_a_full_disk)
    assert (done.returncode, done.stderr) == (0, "")
    kept = json.loads((base / "evaluation.json").read_text())
    assert kept.keys() >= {"val_loss", "bits_per_byte"}


def test_it_is_a_script_that_runs_from_anywhere_and_tells_mistakes_without_jax(tmp_path):
    script = Path(evaluate.__file__).resolve()
    command = [sys.executable, "-X", "importtime", script, tmp_path, "--batch-size", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    *imported, told = done.stderr.splitlines()
    assert (done.returncode, told) == (2, "batch_size must be at least 1, not 0.")
    loaded = {line.split("|")[-1].strip() for line in imported}
    assert "tyro" in loaded and "jax" not in loaded


@pytest.mark.parametrize("missing", ["everything", "checkpoints"])
def test_a_folder_without_a_run_that_got_somewhere_is_told_in_one_sentence(
    tmp_path, base, capsys, missing
):
    folder = tmp_path / "runs" / "a"
    if missing == "checkpoints":
        folder.mkdir(parents=True)
        shutil.copy(base / "config.json", folder)
    told = "has no checkpoint yet" if missing == "checkpoints" else "it does not exist"
    assert evaluate.main([str(folder)]) == 2
    assert re.fullmatch(rf"{folder} .*{told}.*\.\n", capsys.readouterr().err)
    assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--val-tokens", "0"], "val_tokens must be at least 1, not 0"),
        (["--batch-size", "-2"], "batch_size must be at least 1, not -2"),
        (["--hellaswag", "--hellaswag-items", "0"], "hellaswag_items must be at least 1, not 0"),
        (["--hellaswag-items", "5"], "needs --hellaswag"),
    ],
)
def test_an_option_that_makes_no_sense_is_told_in_one_sentence(tmp_path, capsys, arguments, told):
    assert evaluate.main([str(tmp_path), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(rf".*{told}.*\.\n", output.err)
