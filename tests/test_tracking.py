"""Run folders, what goes to the console and the files, and the arithmetic of the step lines."""

import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
from rich.console import Console

from nanogpt import tracking
from nanogpt.schedule import Schedule, Stage
from nanogpt.tracking import BadNumbers, Progress, Run, RunError, new_folder


@pytest.fixture
def run(tmp_path):
    with Run(new_folder(tmp_path / "runs", "some", "laptop")) as run:
        yield run


CALM = {"spike": 0.0, "applied": True}  # of a step like those before it


def log(run):
    return (run.folder / "log.txt").read_text()


def records(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


# Folders


@pytest.mark.parametrize("name", ["a", "lr-0.1", "v1.2_b+c", "größe", "..a"])
def test_a_run_has_the_folder_it_was_given_and_its_configuration_in_there(tmp_path, name):
    config = {"lr": 0.1, "files": None, "model": {"windows": (8, 0)}}
    with Run(new_folder(tmp_path / "runs", name, "laptop")) as run:
        run.configure(config, {"commit": "abc", "accelerators": []})
        assert run.folder == tmp_path / "runs" / name
    assert json.loads((run.folder / "config.json").read_text()) == {
        "lr": 0.1,
        "files": None,
        "model": {"windows": [8, 0]},
    }
    everything = json.loads((run.folder / "run.json").read_text())
    config = json.loads((run.folder / "config.json").read_text())
    assert everything == {"commit": "abc", "accelerators": [], "config": config}
    assert {file.name for file in run.folder.iterdir()} == {
        "config.json",
        "run.json",
        "log.txt",
        "metrics.jsonl",
        "holder",
        "lock",
    }


@pytest.mark.parametrize("name", ["a/b", "/tmp/a", "..", ".", "-", "a b", "a\n", "a*", "~", "é/.."])
def test_a_name_that_is_no_folders_name_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(RunError, match="run_name") as refusal:
        new_folder(tmp_path / "runs", name, "laptop")
    assert repr(name) in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_is_refused_and_its_folder_left_alone(tmp_path):
    taken = tmp_path / "runs" / "a"
    taken.mkdir(parents=True)
    (taken / "log.txt").write_text("precious")
    with pytest.raises(RunError, match=f"{taken} exists already"):
        new_folder(tmp_path / "runs", "a", "laptop")
    assert [file.name for file in taken.iterdir()] == ["log.txt"]
    assert (taken / "log.txt").read_text() == "precious"


def test_where_no_folder_can_be_made_the_error_says_so(tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(RunError, match="cannot be made"):
        new_folder(tmp_path / "runs", "a", "laptop")


def test_without_a_name_runs_are_called_after_the_preset_and_the_time(tmp_path):
    before = datetime.now().replace(microsecond=0)
    stamp = re.fullmatch(r"laptop-(\d{8}-\d{6})", new_folder(tmp_path, "", "laptop").name)
    assert before <= datetime.strptime(stamp[1], "%Y%m%d-%H%M%S") <= datetime.now()


def start_at_once(parent, name, count):
    """The folders, or errors, of this many runs that start at the same time."""

    def start(_):
        try:
            return new_folder(parent, name, "laptop")
        except RunError as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(start, range(count)))


@pytest.fixture
def slow_looks(monkeypatch):
    """Whoever looks whether a path exists acts on an old answer, as in the worst of races."""
    look = Path.exists

    def slow(path):
        answer = look(path)
        sleep(0.05)
        return answer

    monkeypatch.setattr(Path, "exists", slow)


def test_of_runs_that_start_at_once_with_one_name_exactly_one_gets_it(tmp_path, slow_looks):
    for attempt in range(10):
        outcomes = start_at_once(tmp_path / "runs", f"same{attempt}", 8)
        assert sum(not isinstance(outcome, RunError) for outcome in outcomes) == 1


def test_runs_without_names_that_start_at_once_each_get_a_folder(tmp_path, slow_looks):
    folders = start_at_once(tmp_path / "runs", "", 8)
    assert len(set(folders)) == 8
    assert set(folders) == set((tmp_path / "runs").iterdir())


# One process at a time


def test_a_folder_that_is_held_says_by_whom_and_is_not_touched(run):
    (run.folder / "config.json").write_text("the first one's")
    with pytest.raises(RunError, match=f"trained by process {os.getpid()} on .* since 2"):
        Run(run.folder)
    assert (run.folder / "config.json").read_text() == "the first one's"


def test_a_folder_is_free_again_when_its_run_has_ended_or_was_killed(run):
    hold = (
        "import sys, time; from pathlib import Path; from nanogpt.tracking import Run\n"
        "run = Run(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    run.__exit__(None, None, None)
    command = [sys.executable, "-c", hold, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"process {other.pid} on"):
            Run(run.folder)
        other.kill()
    with Run(run.folder):
        assert f"process {os.getpid()} " in (run.folder / "holder").read_text()


# Going on with a run


def test_a_run_that_goes_on_keeps_the_records_of_the_steps_before_and_appends(run):
    for step in (1, 2, 3, 4):
        run.record({"step": step, "loss": 0.5})
    run.say("first")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the last breath of a process
    run.__exit__(None, None, None)
    with Run(run.folder) as again:
        again.rewind(2)
        again.record({"step": 3, "loss": 0.25})
        again.say("second")
    assert [tuple(record.values()) for record in records(again)] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert log(again) == "first\nsecond\n"


# Faults


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from nanogpt.tracking import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))
for step in range(1, 5):
    run.record({"step": step, "text": 80 * "x"})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
run.record({"step": 5, "text": 80 * "x"})
"""


def test_records_wait_while_the_disk_is_full_and_none_is_lost_or_torn(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.count("WARNING") == 1 and "metrics.jsonl cannot be written" in done.stdout
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_without_a_console_the_run_goes_on_and_the_log_is_whole(tmp_path):
    talk = (
        "import sys; from pathlib import Path; from nanogpt.tracking import Run\n"
        "run = Run(Path(sys.argv[1])); input()\n"
        "for number in range(100): run.say(f'line {number}')"
    )
    command = [sys.executable, "-c", talk, str(tmp_path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
        assert process.stderr.read() == ""
    assert (tmp_path / "log.txt").read_text().splitlines() == [f"line {n}" for n in range(100)]


# What is told


@pytest.mark.parametrize(
    "text",
    [
        "step 1/2 | train loss 5.5",
        "word " * 100,
        "x" * 300,
        "two\nlines",
        "rows[0:x:2] = [bold]:smile:[/bold]  # no markup, no emoji",
        "café ±√ �",
    ],
)
def test_off_a_terminal_a_line_is_printed_and_logged_to_the_letter(
    tmp_path, capsys, monkeypatch, text
):
    monkeypatch.setenv("COLUMNS", "40")
    with Run(new_folder(tmp_path, "a", "laptop")) as run:
        run.say(text, style="bold green")
    assert capsys.readouterr().out == text + "\n"
    assert log(run) == text + "\n"


def test_the_log_can_be_followed_while_the_run_goes_on(run):
    run.say("hello")
    run.record({"step": 1})
    assert log(run) == "hello\n"
    assert records(run) == [{"step": 1}]


def test_the_log_tells_what_ended_a_run_before_its_time(tmp_path):
    with (
        pytest.raises(BadNumbers),
        Run(new_folder(tmp_path, "a", "laptop")) as run,
    ):
        run.say("step 1")
        raise BadNumbers("step 2: loss nan")
    assert log(run) == "step 1\nended by BadNumbers('step 2: loss nan')\n"


def test_a_terminal_gets_colours_and_the_log_does_not(run):
    run.console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    run.say("val loss 3.2", style="bold green")
    run.table({"parameters": "12"})
    shown = run.console.file.getvalue()
    assert "\x1b[1;32mval loss 3.2\x1b[0m" in shown
    assert re.search(r"parameters.*12", shown)
    assert log(run) == "val loss 3.2\nparameters: 12\n"


def test_off_a_terminal_the_rows_of_a_table_are_lines(run, capsys):
    run.table({"parameters": "12", "dtype": "float32"})
    assert capsys.readouterr().out == "parameters: 12\ndtype: float32\n"
    assert log(run) == "parameters: 12\ndtype: float32\n"


def test_a_record_is_one_line_of_json_with_every_digit(run):
    metrics = [{"step": 1, "train_loss": 0.1 + 0.2}, {"step": 2, "train_loss": 1e-300}]
    for each in metrics:
        run.record(each)
    assert records(run) == metrics


# Progress


class Loss:
    """A number on the device: remembers that it was waited for."""

    def __init__(self, value, reads):
        self.value, self.reads = value, reads

    def __float__(self):
        self.reads.append(self.value)
        return self.value


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


# Two steps of 1,000 tokens, and two of 3,000 at twice the rate, which falls from the start.
SCHEDULE = Schedule(
    stages=(Stage(batch=1 / 3), Stage(rate=2.0)),
    num_steps=4,
    total_batch_size=3000,
    sequence_length=100,
    cooldown_fraction=1.0,
    final_learning_rate_factor=0.0,
    momentum=0.9,
    momentum_warmup_steps=0,
)


def progress_of(run, utilization=lambda step, tokens_per_s: None, **more):
    return Progress(run, SCHEDULE, utilization, **more)


def test_a_step_is_reported_when_the_next_has_started_and_not_waited_for_before(run, clock):
    reads, progress = [], progress_of(run)
    clock.now += 1
    progress.started(1, {"loss": Loss(5.0, reads), "grad_norm": 1.0, **CALM})
    assert (reads, records(run), log(run)) == ([], [], "")
    clock.now += 1
    progress.started(2, {"loss": Loss(4.0, reads), "grad_norm": 1.0, **CALM})
    assert reads == [5.0]
    assert [record["step"] for record in records(run)] == [1]
    clock.now += 1
    progress.report()
    progress.report()  # nothing is left to tell
    assert reads == [5.0, 4.0]
    assert [record["step"] for record in records(run)] == [1, 2]


def test_times_are_those_between_arrivals_and_leave_validation_out(run, clock):
    progress = progress_of(run)

    def validate():
        clock.now += 50
        return 3.25

    progress.started(1, {"loss": 5.0, "grad_norm": 0.5, **CALM})
    clock.now = 102
    progress.started(2, {"loss": 4.0, "grad_norm": 0.25, **CALM})  # reports 1: 100 to 102
    clock.now = 105
    progress.report(validate)  # reports 2: 102 to 105; validation lasts until 155
    clock.now = 156
    progress.started(3, {"loss": 3.0, "grad_norm": 0.125, **CALM})
    clock.now = 159
    progress.started(4, {"loss": 2.0, "grad_norm": 0.0625, **CALM})  # reports 3: 155 to 159
    clock.now = 160
    progress.report()  # reports 4: 159 to 160

    keys = ("step", "train_loss", "grad_norm", "tokens", "step_time_s", "time_s", "tokens_per_s")
    assert [tuple(record[key] for key in keys) for record in records(run)] == [
        (1, 5.0, 0.5, 1000, 2.0, 2.0, 500.0),
        (2, 4.0, 0.25, 2000, 3.0, 5.0, 1000 / 3),
        (3, 3.0, 0.125, 5000, 4.0, 9.0, 750.0),
        (4, 2.0, 0.0625, 8000, 1.0, 10.0, 3000.0),
    ]
    # The share of the steps that is left when each begins, twice that in the second stage.
    assert [r["learning_rate_factor"] for r in records(run)] == [1, 3 / 4, 2 * 2 / 4, 2 * 1 / 4]
    assert [r.get("val_loss") for r in records(run)] == [None, 3.25, None, None]

    lines = log(run).splitlines()
    steps = [line for line in lines if "train loss" in line]
    assert [re.search(r"^step (\d/4) .*train loss ([\d.]+) ", s).groups() for s in steps] == [
        ("1/4", "5.0000"),
        ("2/4", "4.0000"),
        ("3/4", "3.0000"),
        ("4/4", "2.0000"),
    ]
    assert [re.search(r"([\d,]+) tok/s", s)[1] for s in steps] == ["500", "333", "750", "3,000"]
    # What is left at the tokens' mean pace so far: 7 * 2/1, 6 * 5/2, 3 * 9/5 and nothing.
    assert [s.split("ETA ")[1] for s in steps] == ["0:00:14", "0:00:15", "0:00:05", "0:00:00"]
    (validation,) = (line for line in lines if "val loss" in line)
    assert re.search(r"^step 2/4 .*val loss 3\.2500 .*2,000 tokens .*5\.0 s", validation)


def test_utilisation_is_shown_where_it_is_known_and_not_where_it_is_not(run, clock):
    # 1,000 tokens in 2 s and 3,000 in 2 s: 500 and 1,500 tok/s.
    known = {(2, 500.0): 0.25, (3, 1500.0): 0.5}
    progress = progress_of(run, lambda step, tokens_per_s: known.get((step, tokens_per_s)))
    for step in (1, 2, 3):
        progress.started(step, {"loss": 5.0, "grad_norm": 1.0, **CALM})
        clock.now += 2
    progress.report()
    first, second, third = log(run).splitlines()
    assert "MFU" not in first
    assert "MFU 25.0% | " in second
    assert "MFU 50.0% | " in third


def test_the_summary_has_the_mean_utilisation_over_the_time_of_training(run, clock):
    known = {(1, 1000.0): 0.2, (2, 250.0): 0.05}
    progress = progress_of(run, lambda *of: known[of])
    for step, seconds in ((1, 1), (2, 4)):
        progress.started(step, {"loss": 5.0, "grad_norm": 1.0, **CALM})
        clock.now += seconds
    progress.report()
    assert progress.summary() == {
        "final loss": "train 5.0000",
        "tokens": "2,000",
        "time": "train 5.0 s",
        "speed": "400 tok/s, MFU 8.0%",
    }


def test_on_a_terminal_a_line_with_the_time_left_follows_the_steps_and_validation_stands_out(
    run, clock
):
    screen = io.StringIO()
    run.console = Console(file=screen, force_terminal=True, width=80, highlight=False)
    progress = progress_of(run)
    progress.started(1, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 2
    progress.report(lambda: 4.5)
    run.progress_ended()
    shown = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
    assert re.search(r"1/4 \S+ +25% train loss 5\.0000 \| ETA 0:00:14\s", shown)
    assert "\x1b[1;32mstep 1/4 | val loss 4.5000" in screen.getvalue()
    assert "25%" not in log(run)


@pytest.mark.parametrize(("loss", "norm"), [("nan", 1.0), (2.0, "inf"), ("-inf", "nan")])
def test_a_step_that_is_not_finite_ends_the_run_and_is_not_recorded(run, clock, loss, norm):
    progress = progress_of(run)
    progress.started(1, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 1
    progress.started(2, {"loss": float(loss), "grad_norm": float(norm), **CALM, "applied": False})
    clock.now += 1
    with pytest.raises(BadNumbers, match=rf"^step 2: loss {loss}, .* norm {norm}, at 0\.750 times"):
        progress.started(3, {"loss": 4.0, "grad_norm": 1.0, **CALM})
    assert [record["step"] for record in records(run)] == [1]


def test_a_spike_is_remarked_upon_and_so_is_a_step_that_was_skipped(run, clock):
    progress = progress_of(run)
    for step, (spike, applied) in enumerate([(5.9, True), (6.5, True), (9.0, False)], start=1):
        clock.now += 1
        progress.started(step, {"loss": 5.0, "grad_norm": 1.0, "spike": spike, "applied": applied})
    clock.now += 1
    progress.report()
    calm, spiking, skipped = log(run).splitlines()
    assert "SPIKE" not in calm and "SKIPPED" not in calm
    assert "SPIKE, 6.5 standard deviations" in spiking and "SKIPPED" not in spiking
    assert "SPIKE, 9.0 standard deviations, SKIPPED" in skipped
    assert [record["spike"] for record in records(run)] == [5.9, 6.5, 9.0]


def test_a_validation_that_was_broken_off_leaves_its_record_for_later(run, clock):
    progress = progress_of(run)
    progress.started(1, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 1
    progress.report(lambda: None)
    assert records(run) == []
    kept = progress.unvalidated
    progress.validate(kept, lambda: 3.5)
    assert progress.unvalidated is None
    assert [(r["step"], r["train_loss"], r["val_loss"]) for r in records(run)] == [(1, 5.0, 3.5)]


def test_time_goes_on_from_where_earlier_processes_left_it(run, clock):
    progress = progress_of(run, training_seconds=10.0)
    clock.now += 50
    progress.paused("compile")  # what was before is no training
    progress.started(3, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 2
    progress.report()
    assert [(r["time_s"], r["step_time_s"]) for r in records(run)] == [(12.0, 2.0)]
