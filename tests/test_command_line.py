"""Command lines: names from elsewhere, the defaults of a preset, help that is cut short."""

import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train_gpt
from nanogpt.command_line import ELSEWHERE
from nanogpt.config import GPTConfig
from train_gpt import Hyperparameters

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("main", "argument", "here"),
    [
        (train_gpt.main, "--lr", "--learning-rate"),
        (train_gpt.main, "--n_layer=3", "--model.num-layers"),
        (train_gpt.main, "--out-dir", "--run-name"),
        (sample.main, "--start=a", "--prompt"),
    ],
)
def test_a_name_that_other_trainers_use_is_answered_with_the_one_here(main, argument, here, capsys):
    with pytest.raises(SystemExit) as end:
        main([argument, "1"])
    given = argument.partition("=")[0].replace("_", "-")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{given} is called {here} here; see --help.\n"


def test_every_name_that_is_answered_exists_and_none_is_one_of_ours():
    ours = {name.replace("_", "-") for name in (*vars(Hyperparameters), *vars(sample.Options))}
    model = {f"model.{name.replace('_', '-')}" for name in vars(GPTConfig)}
    assert set(ELSEWHERE.values()) <= ours | model
    assert not set(ELSEWHERE) & ours


@pytest.mark.parametrize("preset", ["laptop", "speedrun"])
def test_help_has_the_defaults_of_the_preset_that_would_run(preset, capsys):
    with pytest.raises(SystemExit) as end:
        train_gpt.main(["--preset", preset, "--help"])
    assert end.value.code == 0
    steps = train_gpt.PRESETS[preset].num_steps
    assert f"Optimizer steps. (default: {steps})" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train_gpt.py", "sample.py"])
def test_help_whose_reader_is_gone_ends_quietly(script):
    process = subprocess.Popen(
        [sys.executable, script, "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
