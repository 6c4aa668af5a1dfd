"""Command lines: option names of other trainers, a preset's defaults, truncated help."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train_gpt
from nanogpt.command_line import ELSEWHERE, NEEDLESS
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


def test_an_option_of_other_trainers_without_a_counterpart_is_answered_with_the_reason(capsys):
    for argument in ("--compile", "--epochs=3", "--gpu"):
        with pytest.raises(SystemExit) as end:
            train_gpt.main([argument, "1"])
        assert end.value.code == 2
        given = argument.partition("=")[0]
        told = f"{given} is not an option here: {NEEDLESS[given.removeprefix('--')]}.\n"
        assert capsys.readouterr().err == told


def test_every_name_that_is_answered_exists_and_none_is_one_of_ours():
    ours = {name.replace("_", "-") for name in (*vars(Hyperparameters), *vars(sample.Options))}
    model = {f"model.{name.replace('_', '-')}" for name in vars(GPTConfig)}
    assert set(ELSEWHERE.values()) <= ours | model
    assert not {*ELSEWHERE, *NEEDLESS} & ours


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


@pytest.mark.parametrize("script", ["train_gpt.py", "export.py"])
def test_where_standard_output_is_closed_a_sentence_says_so_and_nothing_begins(script, tmp_path):
    closed = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, ROOT / script, "x", "--out", "y"]
    done = subprocess.run(closed, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("Standard output is closed: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_result_that_cannot_be_printed_is_said_in_a_sentence():
    code = "import sys; from nanogpt.command_line import print_result; sys.exit(print_result('a'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "The result cannot be printed (No space left on device).\n"


def test_a_console_shows_what_it_has_no_character_for_as_a_question_mark():
    code = (
        "from export import Options, parse; parse(Options, ['x', '--out', 'y']); print('a\\u0100')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, [b"a?"])


@pytest.mark.parametrize(
    "script", ["train_gpt", "sample", "evaluate", "export", "prepare_data", "cached_fineweb10B"]
)
def test_ctrl_c_while_a_script_imports_is_a_word_and_no_traceback(script, tmp_path):
    # Every script imports msgspec; this one presses Ctrl-C meanwhile.
    (tmp_path / "msgspec.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, f"{script}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not in background
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "\nInterrupted.\n")


def test_the_package_leaves_ctrl_c_alone_where_no_script_of_its_own_runs():
    code = "import signal as s; old = s.getsignal(2); import nanogpt; print(s.getsignal(2) is old)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "True\n"
