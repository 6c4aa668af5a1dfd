"""Curves are read from runs' files; unreadable files are named in one sentence."""

import json

import numpy as np
import pytest

from nanogpt.report.__main__ import main
from nanogpt.report.curves import read_run

CIRCUMSTANCES = {
    "date": "2026-11-22T19:42:06+00:00",
    "commit": "bea878c",
    "hardware": "2 x AMD EPYC",
    "accelerators": ["8 x NVIDIA H200"],
}


def records(num_steps, seed=0, first=10.8, last=3.2):
    """Return a learning run's records: one per step, every tenth with a validation loss."""
    rng = np.random.default_rng(seed)
    made = []
    for step in range(1, num_steps + 1):
        seconds = float(rng.uniform(0.4, 0.6))
        loss = last + (first - last) * float(np.exp(-8 * step / num_steps))
        made.append(
            {
                "step": step,
                "train_loss": loss + float(rng.normal()) / 20,
                "grad_norm": float(rng.uniform(0.1, 9)),
                "spike": 0.0,
                "learning_rate_factor": 1 - step / num_steps,
                "tokens": 300_000 * step,
                "time_s": (made[-1]["time_s"] if made else 0.0) + seconds,
                "step_time_s": seconds,
                "tokens_per_s": 300_000 / seconds,
            }
        )
        if step % 10 == 0:
            made[-1]["val_loss"] = loss
    return made


def write(folder, made, tokenizer="gpt2", **config):
    """Create a run's folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in made))
    config = {"preset": "speedrun", "tokenizer": tokenizer, **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(CIRCUMSTANCES))
    (folder / "log.txt").write_text("run: x\nparameters: 275,742,772\nstep 1/9 | ...\n")
    return folder


def failure(capsys, *arguments):
    """Return the sentence with which the command refuses its arguments."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err.strip()


def test_a_folder_that_is_no_runs_is_named(tmp_path, capsys):
    said = failure(capsys, tmp_path / "none")
    assert "none cannot be read (No such file or directory): give run folders" in said
    assert f"{tmp_path} is not a run folder: give run folders" in failure(capsys, tmp_path)
    assert failure(capsys) == "Nothing to draw. Give one or more run folders, e.g. runs/<name>."


def test_a_run_without_numbers_is_told_from_one_that_cannot_be_read(tmp_path, capsys):
    folder = write(tmp_path / "run", [])
    assert "has no metrics yet: wait" in failure(capsys, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_l')
    assert "has no metrics yet: wait" in failure(capsys, folder)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"step": 3, "tra', " is not valid JSON (Unterminated"),
        ("[3]", " must be an object, not [3]"),
        ('{"step": "three"}', ': step must be an integer, not "three"'),
        ('{"step": 3, "tokens": null}', ": tokens must be an integer, not null"),
        ("{}", ": step is missing"),
        ("", " is not valid JSON (empty)"),
        ("\0\0", " is not valid JSON (Expecting value"),
        ("[" * 10_000, " is not valid JSON (nested too deeply)"),
    ],
)
def test_a_broken_line_is_named_but_the_last_one_is_not_read(tmp_path, capsys, line, told):
    folder = write(tmp_path / "run", records(4))
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, line]))
    np.testing.assert_array_equal(read_run(folder, "run").metrics["step"], [1, 2, 3, 4])
    if line:
        metrics.write_text("\n".join([*lines, line, ""]))  # it was written completely, but is wrong
        assert f"{metrics}, line 5{told}" in failure(capsys, folder)
    metrics.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    said = failure(capsys, folder)
    assert f"{metrics}, line 3{told}" in said and said.endswith(": repair or remove it.")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "must be an object, not [1]"),
        ('{"a"', "is not valid JSON"),
        ("7", "must be an object, not 7"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, capsys, text, told):
    folder = write(tmp_path / "run", records(4))
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'} {told}" in failure(capsys, folder)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("run.json", {"hardware": []}, "hardware must be a string, not []"),
        ("run.json", {"accelerators": "8 x H200"}, 'accelerators must be a list, not "8 x H200"'),
        ("run.json", {"date": 2026}, "date must be a string, not 2026"),
        ("config.json", {"num_steps": "9"}, 'num_steps must be an integer, not "9"'),
        ("config.json", {"data": {}}, "data must be a list, not {}"),
    ],
)
def test_a_field_that_is_not_as_declared_is_named(tmp_path, capsys, name, change, told):
    file = write(tmp_path / "run", records(4)) / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    said = failure(capsys, file.parent)
    assert said == f"{file}: {told}: restore it or remove it."
