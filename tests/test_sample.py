"""Continuing a prompt with the run that test_train_gpt.py made, and the answers to mistakes."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from test_train_gpt import base_run

import sample
from train_gpt import PRESETS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return base_run(tmp_path_factory).folder


@pytest.fixture
def text(capsys):
    """What sample.py prints with these arguments."""

    def text(*arguments):
        assert sample.main([*map(str, arguments), "--num-tokens", "12"]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return text


def test_the_prompt_is_printed_with_its_continuation(run, text):
    printed = text(run, "--prompt", "def f(x):\n    é")
    assert printed.startswith("def f(x):\n    é")
    # 12 bytes: as many characters, or fewer where they form longer ones or separators.
    assert 0 < len(printed.removeprefix("def f(x):\n    é").removesuffix("\n")) <= 12


def test_a_seed_gives_one_text_and_another_seed_another(run, text):
    texts = [text(run, "--prompt", "def ", "--seed", seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_at_temperature_zero_and_with_one_choice_the_seed_does_not_matter(run, text):
    cold = [text(run, "--temperature", 0, "--seed", seed) for seed in (0, 1)]
    one = [text(run, "--top-k", 1, "--temperature", 5, "--seed", seed) for seed in (0, 1)]
    assert len({*cold, *one}) == 1


def test_it_is_a_script_that_runs_from_anywhere(run, text, tmp_path):
    script = Path(sample.__file__).resolve()
    done = subprocess.run(
        [sys.executable, script, run, "--prompt", "def ", "--num-tokens", "12"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text(run, "--prompt", "def ")


@pytest.mark.parametrize("missing", ["everything", "config.json", "checkpoints"])
def test_a_folder_without_a_run_that_got_somewhere_is_told_in_one_sentence(
    tmp_path, capsys, missing
):
    folder = tmp_path / "runs" / "a"
    if missing != "everything":
        (folder / "checkpoints").mkdir(parents=True)
    if missing == "checkpoints":
        (folder / "config.json").write_text(json.dumps(asdict(PRESETS["laptop"])))
    told = "has no checkpoint" if missing == "checkpoints" else "it has no config.json"
    assert sample.main([str(folder)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(rf"{folder} .*{told}.*\.\n", output.err)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num-tokens", "0"),
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("top-k", "0"),
    ],
)
def test_an_option_that_makes_no_sense_is_named_with_its_value(tmp_path, capsys, option, value):
    assert sample.main([str(tmp_path), f"--{option}", value]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(rf"{option.replace('-', '_')} must .*{value}.*\.\n", output.err)


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
