"""What is recorded about a process, also with a benchmark's figures."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import flax
import jax
import jaxlib
import numpy as np
import optax
import orbax.checkpoint
import pytest

from benchmarks import results
from nanogpt.runs import environment as module
from nanogpt.runs.environment import environment


def git(repository, *words):
    settings = ("user.name=A", "user.email=a@example.com", "commit.gpgsign=false")
    command = ["git", *(word for each in settings for word in ("-c", each)), *words]
    done = subprocess.run(command, cwd=repository, check=True, text=True, capture_output=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with this module and a benchmark's results, all committed."""
    for folder in ("nanogpt", "benchmarks/results", "records"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("as it was")
    shutil.copy(module.__file__, tmp_path / "nanogpt")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    return tmp_path


def commit_told_in(folder):
    return runpy.run_path(str(folder / "environment.py"))["environment"]()["commit"]


def test_versions_are_those_that_the_packages_give_themselves():
    told = environment()
    assert told["python"] == sys.version.split()[0]
    for name, package in {
        "jax": jax,
        "jaxlib": jaxlib,
        "flax": flax,
        "optax": optax,
        "orbax-checkpoint": orbax.checkpoint,
        "numpy": np,
    }.items():
        assert told[name] == package.__version__, name


def test_it_can_be_written_as_json():
    told = environment()
    assert json.loads(json.dumps(told)) == told


def test_the_date_is_now_in_utc_wherever_the_clock_stands(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    told = environment()["date"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told)
    assert abs(datetime.fromisoformat(told) - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("/usr/bin/python3.11 /home/a/b/train_gpt.py --seed 1", "python train_gpt.py --seed 1"),
        ("python -m benchmarks.cpu.forms --tiny", "python -m benchmarks.cpu.forms --tiny"),
        ("python a.py runs/a ../b", "python a.py runs/a ../b"),
        ("python a.py /data/fineweb/ --run=/c/d/e", "python a.py fineweb/ --run=e"),
        ("python a.py --train-files '/d/train_*.bin'", "python a.py --train-files 'train_*.bin'"),
        ("python a.py --sample-prompt 'def f(x): 1/2/3'", None),
    ],
)
def test_the_command_can_be_typed_again_and_names_no_folder_of_the_machine(
    monkeypatch, typed, told
):
    monkeypatch.setattr(sys, "orig_argv", shlex.split(typed))
    assert environment()["command"] == (told or typed)


def test_the_commit_is_the_one_that_is_checked_out(repository):
    told = commit_told_in(repository / "nanogpt")
    assert len(told) >= 7
    assert git(repository, "rev-parse", "HEAD").startswith(told)


@pytest.mark.parametrize("staged", [False, True])
def test_a_commit_whose_code_was_changed_is_dirty(repository, staged):
    (repository / "benchmarks" / "file").write_text("new")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "another file")
    clean = commit_told_in(repository / "nanogpt")
    (repository / "benchmarks" / "file").write_text("changed")
    if staged:
        git(repository, "add", ".")
    assert commit_told_in(repository / "nanogpt") == f"{clean}-dirty"


def test_what_was_measured_may_change_without_the_commit_being_dirty(repository):
    clean = commit_told_in(repository / "nanogpt")
    for folder in ("benchmarks/results", "records"):
        (repository / folder / "file").write_text("changed")
        (repository / folder / "another").write_text("new")
    assert commit_told_in(repository / "nanogpt") == clean


def test_a_copy_installed_within_another_repository_does_not_take_its_commit(repository):
    installed = repository / ".venv" / "nanogpt"
    shutil.copytree(repository / "nanogpt", installed)
    assert commit_told_in(installed) == "unknown"


def test_without_a_repository_or_without_git_the_commit_is_unknown(
    repository, tmp_path_factory, monkeypatch
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(module.__file__, elsewhere)
    assert commit_told_in(elsewhere) == "unknown"
    monkeypatch.setenv("PATH", str(elsewhere))
    assert commit_told_in(repository / "nanogpt") == "unknown"


@pytest.mark.parametrize(
    ("flags", "told"), [("fpu avx2", "Some CPU 9"), ("fpu avx512f avx512bw", "Some CPU 9, AVX-512")]
)
def test_the_processors_are_counted_and_named_with_what_the_name_need_not_tell(
    tmp_path, monkeypatch, flags, told
):
    core = f"processor\t: 0\nmodel name\t: Some CPU 9\nflags\t\t: {flags}\nbugs\t\t:\n\n"
    (tmp_path / "cpuinfo").write_text(2 * core)
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    assert environment()["hardware"] == f"{os.cpu_count()} x {told}"


@pytest.mark.parametrize("text", [None, "processor : 0\nFeatures : fp asimd\n"])
def test_a_processor_without_a_name_is_told_by_its_kind(tmp_path, monkeypatch, text):
    if text:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    assert environment()["hardware"] == f"{os.cpu_count()} x {os.uname().machine}"


def test_accelerators_are_counted_by_kind_and_processors_are_none(monkeypatch):
    assert environment()["accelerators"] == []  # JAX runs on the CPU here
    kinds = [("cpu", "cpu"), *8 * [("gpu", "NVIDIA H200")], ("gpu", "NVIDIA L4")]
    devices = [SimpleNamespace(platform=p, device_kind=kind) for p, kind in kinds]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert environment()["accelerators"] == ["8 x NVIDIA H200", "1 x NVIDIA L4"]


def test_a_process_without_jax_does_not_load_it_for_this():
    code = (
        "import sys; from nanogpt.runs.environment import environment; "
        "print(environment()['accelerators'], 'jax' in sys.modules)"
    )
    root = Path(module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[] False\n", "")


def test_figures_are_saved_beside_what_is_needed_to_repeat_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    results.save("some", {"ms": 1.5, "device": "cpu"})
    path = tmp_path / "results" / "some.json"
    assert capsys.readouterr().out == f"written to {path}\n"
    saved = json.loads(path.read_text())
    assert {"command", "date", "commit", "hardware", "python", "jax"} <= saved.keys()
    assert list(saved)[-2:] == ["ms", "device"]
    assert (saved["ms"], saved["jax"]) == (1.5, jax.__version__)
