"""Run folders, and what is written to the console and the files."""

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

import pytest
from rich.console import Console

from nanogpt.runs.folder import Run, RunError, new_folder
from nanogpt.runs.progress import BadNumbers


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
    with pytest.raises(RunError, match=f"{taken} already exists"):
        new_folder(tmp_path / "runs", "a", "laptop")
    assert [file.name for file in taken.iterdir()] == ["log.txt"]
    assert (taken / "log.txt").read_text() == "precious"


def test_where_no_folder_can_be_made_the_error_says_so(tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(RunError, match="cannot be written"):
        new_folder(tmp_path / "runs", "a", "laptop")


def test_without_a_name_runs_are_called_after_the_preset_and_the_time(tmp_path):
    before = datetime.now().replace(microsecond=0)
    stamp = re.fullmatch(r"laptop-(\d{8}-\d{6})", new_folder(tmp_path, "", "laptop").name)
    assert before <= datetime.strptime(stamp[1], "%Y%m%d-%H%M%S") <= datetime.now()


def start_at_once(parent, name, count):
    """Return the folders, or errors, of this many runs that start at the same time."""

    def start(_):
        try:
            return new_folder(parent, name, "laptop")
        except RunError as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(start, range(count)))


@pytest.fixture
def slow_looks(monkeypatch):
    """Make checks whether a path exists return an outdated answer, as in the worst race."""
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
    with pytest.raises(RunError, match=f"in use by process {os.getpid()} on .* since 2"):
        Run(run.folder)
    assert (run.folder / "config.json").read_text() == "the first one's"


def test_a_log_that_cannot_be_written_is_one_sentence_and_holds_nothing(run):
    run.__exit__(None, None, None)
    (run.folder / "log.txt").unlink()
    (run.folder / "log.txt").mkdir()
    with pytest.raises(RunError, match=r"^.*log\.txt cannot be written \(Is a directory\): .*\.$"):
        Run(run.folder)
    (run.folder / "log.txt").rmdir()
    Run(run.folder).__exit__(None, None, None)


def test_a_folder_is_free_again_when_its_run_has_ended_or_was_killed(run):
    hold = (
        "import sys, time; from pathlib import Path; from nanogpt.runs.folder import Run\n"
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


# Resuming a run


def test_a_run_that_goes_on_keeps_the_records_of_the_steps_before_and_appends(run):
    for step in (1, 2, 3, 4):
        run.record({"step": step, "loss": 0.5})
    run.say("first")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # written by a process as it was killed
    run.__exit__(None, None, None)
    with Run(run.folder) as again:
        again.rewind(2)
        again.record({"step": 3, "loss": 0.25})
        again.say("second")
    assert [tuple(record.values()) for record in records(again)] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert log(again) == "first\nsecond\n"


def test_a_damaged_record_is_dropped_with_a_warning_and_costs_no_other(run, capsys):
    lines = [b'{"step": %d, "train_loss": 0.5}' % step for step in range(1, 10)]
    lines[1:1] = [b"", b"[]", b"{}", b"\x80\xff\0", b'{"step": "2"}', b"[" * 100_000]
    lines[1:1] = [b'{"step": 99}', b'{"step": 1}']  # later lines would be lost or repeated
    path = run.folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines[:-1]) + b"\n\x80" + lines[-1])
    run.rewind(7)
    assert [record["step"] for record in records(run)] == [*range(1, 8)]
    assert capsys.readouterr().out.splitlines() == [
        f"WARNING: {path}, line {number} is damaged and is dropped." for number in range(2, 10)
    ]
    run.rewind(6)
    assert len(records(run)) == 6
    assert capsys.readouterr().out == ""


# Faults


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from nanogpt.runs.folder import Run
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
        "import sys; from pathlib import Path; from nanogpt.runs.folder import Run\n"
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


# Messages


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
