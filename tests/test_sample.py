"""Continuing a prompt with a small run, and messages about mistakes."""

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import asdict
from pathlib import Path

import jax
import pytest

import export
import sample
from nanogpt.config import ConfigError
from tests.programs import Process, run_to_end
from train_gpt import PRESETS


@pytest.fixture
def run(base):
    return base.folder


@pytest.fixture
def text(capsys):
    """Return the output of sample.py with these arguments."""

    def text(*arguments):
        assert sample.main([*map(str, arguments), "--max-new-tokens", "12"]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return text


def test_the_page_says_how_far_its_model_was_trained(base):
    _, about = sample.load_writer(str(base.folder))
    loss = base.metrics[-1]["val_loss"]
    assert about.endswith(f"32-token context, trained for 6 steps, val loss {loss:.4f}")


def test_the_prompt_is_printed_with_its_continuation(run, text):
    printed = text(run, "--prompt", "def f(x):\n  é")
    assert printed.startswith("def f(x):\n  é")
    # 12 bytes: as many characters, or fewer where they form longer ones or separators.
    assert 0 < len(printed.removeprefix("def f(x):\n  é").removesuffix("\n")) <= 12


def test_a_seed_gives_one_text_and_another_seed_another(run, text):
    texts = [text(run, "--prompt", "def ", "--seed", seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_at_temperature_zero_and_with_one_choice_the_seed_does_not_matter(run, text):
    how = run, "--prompt", "def ", "--seed"
    cold = [text(*how, seed, "--temperature", 0) for seed in (0, 1)]
    one = [text(*how, seed, "--top-k", 1, "--temperature", 5) for seed in (0, 1)]
    assert len({*cold, *one}) == 1


def test_a_prompt_comes_from_a_file_or_any_input_and_is_shown_on_any_terminal(
    run, text, tmp_path, monkeypatch
):
    prompt, shown = "def f(x):\r\n\té", io.BytesIO()
    written = text(run, "--prompt", prompt)
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    assert text(run, "--prompt-file", tmp_path / "prompt.txt") == written
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode()), "ascii"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert sample.main([str(run), "--max-new-tokens", "12", "--prompt-file", "-"]) == 0
    sys.stdout.flush()
    assert shown.getvalue() == written.encode("ascii", "replace")  # no error


def test_it_is_a_script_that_runs_anywhere(tmp_path):
    script = [sys.executable, Path(sample.__file__).resolve(), "--stop", ""]
    done = subprocess.run([*script, tmp_path], cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 2 and b"stop must not be empty" in done.stderr


def test_several_samples_come_under_their_headings_and_the_first_is_that_of_one(run, text):
    several = text(run, "--prompt", "def ", "--num-samples", 3)
    pieces = re.split(r"--- sample (\d) ---\n", several)
    assert pieces[:1] + pieces[1::2] == ["", "1", "2", "3"]
    assert pieces[2] == text(run, "--prompt", "def ")
    assert len(set(pieces[2::2])) == 3
    assert all(piece.startswith("def ") for piece in pieces[2::2])


def test_a_text_ends_before_a_stop_string(run, text):
    whole = text(run, "--prompt", "def ", "--seed", 3)
    written = whole.removeprefix("def ").removesuffix("\n")
    stop = written[4:6]
    ended = text(run, "--prompt", "def ", "--seed", 3, "--stop", "never", "--stop", stop)
    assert ended == "def " + written[: written.index(stop)] + "\n"
    assert len(ended) < len(whole)


def test_an_exported_model_writes_what_its_run_writes(run, text, tmp_path):
    assert export.main([str(run), "--out", str(tmp_path / "model")]) == 0
    assert text(tmp_path / "model", "--prompt", "def ").endswith(text(run, "--prompt", "def "))


def endless(run, tmp_path, cache):
    """A text that would go on for hours."""
    arguments = [run, "--prompt", "def ", "--seed", "1", "--max-new-tokens", "100000000"]
    return Process(arguments, tmp_path, cache, main=sample.main)


def test_text_is_shown_as_it_is_written(run, tmp_path, cache):
    with endless(run, tmp_path, cache) as process:
        process.read(200)
        process.close_console()  # as `head` does
        assert (process.end(), process.stderr) == (0, "")


def test_ctrl_c_ends_a_text_quietly(run, tmp_path, cache):
    with endless(run, tmp_path, cache) as process:
        process.read(20)
        process.send(signal.SIGINT)
        assert (process.end(), process.stderr) == (130, "")
    assert process.output.endswith("\n")


def on_a_full_disk(arguments):
    """Run it with a disk that is always full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    status = sample.main(arguments)
    sys.stdout.flush()  # as Python does at its end
    return status


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_told_in_one_sentence(run, tmp_path, cache):
    arguments = [run, "--prompt", "a", "--max-new-tokens", "12"]
    done = run_to_end(arguments, tmp_path, cache, main=on_a_full_disk)
    assert done.returncode == 2
    assert re.fullmatch(r"The text cannot be written \(No space left on device\)\.\n", done.stderr)


@pytest.mark.parametrize(
    "words", ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: Out of memory allocating 9 bytes."]
)
def test_too_little_memory_is_told_in_one_sentence(run, capsys, monkeypatch, words):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(words)

    monkeypatch.setattr("nanogpt.inference.text.generate", fail)
    assert sample.main([str(run), "--num-samples", "1000"]) == 2
    assert re.fullmatch(
        r".* too little memory .* 1,000 .*num_samples.*\.\n", capsys.readouterr().err
    )


def test_another_error_of_a_program_is_not_taken_for_want_of_memory(run, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell over")

    monkeypatch.setattr("nanogpt.inference.text.generate", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="fell over"):
        sample.main([str(run)])


@pytest.mark.parametrize("script", ["sample", "evaluate", "export"])
def test_a_gpu_is_not_filled_before_it_is_needed_for_a_trainer_may_be_there(
    run, tmp_path, monkeypatch, script
):
    found = []

    def first_use_of_a_device(*_):
        found.append(os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"))
        raise ConfigError("That is enough.")

    monkeypatch.setattr("nanogpt.devices.mesh.make_mesh", first_use_of_a_device)
    more = ["--out", str(tmp_path / "gpt")] if script == "export" else []
    for wish in (None, "true"):  # the default, and what a user asks for
        if wish is None:
            monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
        else:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", wish)
        assert importlib.import_module(script).main([str(run), *more]) == 2
    assert found == ["false", "true"]


@pytest.mark.parametrize("prompt", ["\udcff", None])
def test_a_prompt_that_cannot_be_read_is_told_in_one_sentence(run, tmp_path, capsys, prompt):
    arguments = ["--prompt", prompt] if prompt else ["--prompt-file", str(tmp_path / "none")]
    assert sample.main([str(run), *arguments]) == 2
    told = "is not UTF-8" if prompt else "No such file"
    assert re.fullmatch(rf"The prompt .*{told}.*\.\n", capsys.readouterr().err)


def test_a_prompt_given_twice_and_an_empty_stop_are_told_in_one_sentence(tmp_path, capsys):
    assert sample.main([str(tmp_path), "--prompt", "a", "--prompt-file", "b"]) == 2
    assert "Give either --prompt or --prompt-file, not both." in capsys.readouterr().err
    assert sample.main([str(tmp_path), "--stop", ""]) == 2
    assert "stop must not be empty" in capsys.readouterr().err


def test_the_page_is_served_with_the_model(run, tmp_path, cache):
    pytest.importorskip("starlette", reason="needs the extra serve")
    arguments = [run, "--serve", "--port", "0"]
    with Process(arguments, tmp_path, cache, main=sample.main) as process:
        address = re.search(r"http://\S+", process.read_until("http://"))[0]
        tokens, end = generated(address)
        process.send(signal.SIGINT)
        assert (process.end(), process.stderr) == (0, "")
    assert end == {"done": "length"}
    assert len(tokens) == 12
    for token in tokens:  # at temperature zero each is the most likely
        assert token["probability"] == pytest.approx(token["alternatives"][0][1], rel=1e-5)


def generated(address):
    """Return the tokens that the page receives, and the end."""
    order = {"prompt": "def ", "num_tokens": 12, "temperature": 0, "top_k": None, "top_p": 1}
    request = urllib.request.Request(
        f"{address}/generate",
        json.dumps(order | {"seed": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        *tokens, end = map(json.loads, answer)
    return tokens, end


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("everything", "it does not exist"),
        ("config.json", "it has no config.json"),
        ("checkpoints", "has no checkpoint yet"),
    ],
)
def test_a_folder_without_a_run_that_got_somewhere_is_told_in_one_sentence(
    tmp_path, capsys, missing, told
):
    folder = tmp_path / "runs" / "a"
    if missing != "everything":
        (folder / "checkpoints").mkdir(parents=True)
    if missing == "checkpoints":
        (folder / "config.json").write_text(json.dumps(asdict(PRESETS["laptop"])))
    assert sample.main([str(folder)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(rf"{folder} .*{told}.*\.\n", output.err)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max-new-tokens", "0"),
        ("num-samples", "0"),
        ("num-samples", "1025"),
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("top-k", "0"),
        ("top-p", "0"),
        ("top-p", "1.01"),
        ("top-p", "nan"),
        ("seed", "-1"),
    ],
)
def test_an_option_that_makes_no_sense_is_named_with_its_value(tmp_path, capsys, option, value):
    assert sample.main([str(tmp_path), f"--{option}", value]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    told = output.err.replace(",", "")  # as in 1,025
    assert re.fullmatch(rf"{option.replace('-', '_')} must .*{value}.*\.\n", told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Required options"),
        (["runs/a", "--nonsense"], "--nonsense"),
        (["runs/a", "--top-k", "few"], "few"),
    ],
)
def test_arguments_that_cannot_be_read_end_with_status_two(capsys, monkeypatch, arguments, told):
    monkeypatch.setenv("COLUMNS", "200")  # so that no word is broken between lines
    with pytest.raises(SystemExit) as end:
        sample.main(arguments)
    assert end.value.code == 2
    assert told in capsys.readouterr().err
