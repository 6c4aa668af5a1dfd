"""The first minutes on a GPU: a tiny run of all sections, and reasons to end early."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import processes, results
from benchmarks.command import Mistake
from benchmarks.gpu import first_light
from benchmarks.gpu.expected import ratio_expected, step_ms
from benchmarks.gpu.first_light import Report, in_a_process, main
from benchmarks.gpu.rows import Unmeasured
from benchmarks.gpu.sections import SECTIONS, Context, curve, gpu_tests, run
from benchmarks.gpu.sections.alternatives import neighbours
from benchmarks.gpu.variants import FULL, stage_alone
from nanogpt.data.shards import write_shard
from tests.programs import Process, wait_until
from train_gpt import PRESETS


class ForkedRun(Process):
    """Replace processes.Watched: train_gpt.py is forked, and pytest's output is made up."""

    def __new__(cls, command, folder, settings):
        return super().__new__(cls if command[1] != "-m" else Printed)

    def __init__(self, command, folder, settings):
        cache = settings["JAX_COMPILATION_CACHE_DIR"]
        super().__init__(command[2:], folder, cache)

    def stop(self):
        self._process.kill()


class Printed:
    """A command with the output of one test."""

    output = "tests/model/test_loss.py::test_of_a_loss PASSED [100%]\n"

    def end(self):
        return 0


def nothing(tiny):
    """Use small shards instead of writing them in another process."""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder for results."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


ONE_PASS = "speedrun, stage 3: pallas loss"  # a row of the section "alternatives"


def saved(folder):
    """Return the JSON and the table."""
    (file,) = folder.glob("first_light_*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_a_tiny_run_measures_every_section(folder, forked, monkeypatch, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    files = shards / "train.bin", shards / "val.bin"
    for file in files:
        write_shard(file, np.arange(2000) % 1000)

    def here(section, context, record, place):
        run(section, context, record)

    monkeypatch.setattr(curve, "python_sources", lambda tiny: files)
    monkeypatch.setattr(first_light, "python_sources", nothing)
    monkeypatch.setattr(first_light, "in_a_process", here)
    monkeypatch.setattr(processes, "Watched", ForkedRun)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert main(["--tiny"]) == 0

    figures, table = saved(folder)
    assert figures["device"] == "cpu" and list(figures["sections"]) == list(SECTIONS)
    failed = {
        (section, row): found["failed"]
        for section, each in figures["sections"].items()
        for row, found in each["rows"].items()
        if "failed" in found
    }
    assert {section for section, _ in failed} <= {"pytorch", "curve"}
    assert all("pip install torch" in why for why in failed.values())
    rows = {name: each["rows"] for name, each in figures["sections"].items()}
    assert rows["kernels"]["choice for baseline"]["kernel"] == "xla"
    assert rows["whole_run"]["launch to first step, cold"]["seconds"] > 0
    assert rows["whole_run"]["its steps"]["tokens_per_s"] > 0
    assert rows["whole_run"]["launch to first step, warm"]["seconds"] > 0
    step, one_pass = rows["steps"]["speedrun, stage 3"], rows["alternatives"][ONE_PASS]
    assert one_pass["variant"] == step["variant"] | {"loss": "pallas"}
    assert one_pass["ratio"] == pytest.approx(one_pass["ms"] / step["ms"])
    assert one_pass["last_loss"] == pytest.approx(step["last_loss"], abs=0.1)
    assert rows["gpu_tests"]["tests of loss kernels"]["passed"] == 1
    assert len(rows["curve"]["train_gpt.py, baseline"]["losses"]) == 2
    for each in rows.values():
        assert all(f"| {row} |" in table for row in each)


# Ending early


def that_starts_another_and_hangs(section, context, record):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    record("child", {"pid": child.pid})
    time.sleep(100)


def that_crashes(section, context, record):
    record("first", {"ms": 1.0})
    print("F0000 Check failed: no such kernel", file=sys.stderr, flush=True)
    os.abort()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except OSError:
        return False


def test_a_section_that_crashes_keeps_its_rows_and_says_how_it_ended(forked, tmp_path):
    rows = {}
    context = Context(True, 60.0, {})
    why = in_a_process("steps", context, rows.__setitem__, tmp_path, that_crashes)
    assert rows == {"first": {"ms": 1.0}}
    assert why.startswith("It ended with status -6.") and "no such kernel" in why


def test_a_section_whose_time_is_over_ends_with_all_that_it_started(forked, tmp_path, monkeypatch):
    rows, now = {}, [0.0]

    def record(row, figures):
        rows[row], now[0] = figures, 100.0

    monkeypatch.setattr(first_light, "time", SimpleNamespace(monotonic=lambda: now[0]))
    context, work = Context(True, 90.0, {}), that_starts_another_and_hangs
    why = in_a_process("steps", context, record, tmp_path, work)
    assert why.startswith("Its time ran out after 90 s.")
    wait_until(lambda: not is_running(rows["child"]["pid"]))


def that_measures_one_row(section, context, record, folder):
    record("device", {"device": "NVIDIA H200", "platform": "gpu"})
    time.sleep(100)


def main_in(arguments):
    """Run `main` with one slow section, which writes to the first argument."""
    results.FOLDER = type(results.FOLDER)(arguments[0])
    first_light.in_a_process = that_measures_one_row
    return main(["--only", "device"])


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_what_was_measured_is_on_disk_when_the_command_is_cut_off(folder, cache, number, status):
    with Process([folder], folder, cache, main=main_in) as process:
        process.read_until("device | device |")
        process.send(number)
        assert process.end() == status
    assert process.stderr == ("Interrupted.\n" if number == signal.SIGINT else "")
    figures, table = saved(folder)
    assert figures["sections"]["device"]["ended"] == "cut off"
    assert figures["device"] == "NVIDIA H200" and "| device | NVIDIA H200 |" in table


def test_a_closed_terminal_does_not_end_what_was_started_by_nohup(folder, cache):
    started = Process([folder], folder, cache, main=main_in, ignored=[signal.SIGHUP])
    with started as process:
        process.read_until("device | device |")
        process.send(signal.SIGHUP)
        process.send(signal.SIGTERM)
        assert process.end() == 128 + signal.SIGTERM


def test_a_second_measurement_on_a_day_keeps_the_first(folder):
    for _ in range(2):
        report = Report(tiny=False)
        report.begin("device")
        report.record("device", {"device": "NVIDIA H200", "platform": "gpu"})
    assert len([*folder.glob("first_light_NVIDIA_H200_*.json")]) == 2
    assert len([*folder.glob("first_light_NVIDIA_H200_*.md")]) == 2


def test_without_a_gpu_nothing_is_measured_unless_it_is_tiny(folder):
    report = Report(tiny=False)
    report.begin("device")
    with pytest.raises(Mistake, match="JAX finds no GPU"):
        report.record("device", {"device": "cpu", "platform": "cpu"})
    assert not list(folder.iterdir())


# Results


def test_lines_of_pytest_are_counted_and_failures_named():
    found = gpu_tests.results(
        "a/test_b.py::test_c[1-None] PASSED [ 33%]\na/test_b.py::test_c[2-x y] FAILED [ 66%]\n"
        "a/test_b.py::test_d SKIPPED (needs a GPU) [100%]\n"
    )
    assert found == {"passed": 1, "skipped": 1, "failures": ["a/test_b.py::test_c[2-x y]"]}
    with pytest.raises(Unmeasured, match="pytest ran no test: no such file"):
        gpu_tests.results("no such file\n")


def test_a_step_is_predicted_from_its_flops_and_a_one_pass_loss_from_its_bytes():
    hp = replace(PRESETS["baseline"], batch_size=64)
    baseline = replace(FULL, hp=stage_alone(hp, 0))
    # 0.8 GFLOPs a token, and 1.6 TFLOPs of Muon, at 45% of 989 TFLOP/s.
    assert step_ms(baseline, "NVIDIA H200") == pytest.approx(945, rel=0.05)
    assert step_ms(baseline, "cpu") is None
    third = replace(FULL, hp=stage_alone(FULL.hp, 2))
    ratios = {
        row: ratio_expected(third, row, "NVIDIA H200").get("ratio")
        for row in ("pallas loss", "FP8 head", "plain Muon")
    }
    assert 0.95 < ratios["pallas loss"] < 1 and 0.8 < ratios["FP8 head"] < 0.9
    assert ratios["plain Muon"] is None


def test_other_micro_batches_divide_the_rows_of_a_step():
    assert [neighbours(rows, 24) for rows in (1, 8, 24)] == [[2], [6, 12], [12]]
