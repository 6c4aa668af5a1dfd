"""The lines and records of steps, and the arithmetic of their times."""

import io
import json
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from nanogpt.runs import progress
from nanogpt.runs.progress import BadNumbers, Progress
from nanogpt.schedule import Schedule, Stage

CALM = {"spike": 0.0, "applied": True}  # of a step like those before it


def log(run):
    return (run.folder / "log.txt").read_text()


def records(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


class Loss:
    """A number on the device, which records that it was waited for."""

    def __init__(self, value, reads):
        self.value, self.reads = value, reads

    def __float__(self):
        self.reads.append(self.value)
        return self.value


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only when a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


# Two steps of 1,000 tokens, and two of 3,000 at twice the rate, which decays from the start.
SCHEDULE = Schedule(
    stages=(Stage(batch=1 / 3), Stage(rate=2.0)),
    num_steps=4,
    total_batch_size=3000,
    sequence_length=100,
    hold_fraction=0.0,
    cooldown_fraction=1.0,
    final_learning_rate_factor=0.0,
    momentum=0.9,
    momentum_warmup_steps=0,
    momentum_cooldown_steps=0,
)


def progress_of(run, utilization=lambda step, tokens_per_s: None, **more):
    return Progress(run, SCHEDULE, 4000, utilization, **more)


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
    progress.report()  # nothing is left to report
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
    progress.validate(validate)  # reports 2: 102 to 105; validation lasts until 155
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
    # The fraction of steps left at the start of each, twice that in the second stage.
    assert [r["learning_rate_factor"] for r in records(run)] == [1, 3 / 4, 2 * 2 / 4, 2 * 1 / 4]
    assert [r.get("val_loss") for r in records(run)] == [None, 3.25, None, None]
    assert [r["epoch"] for r in records(run)] == [0.25, 0.5, 1.25, 2.0]  # of 4,000 tokens

    lines = log(run).splitlines()
    steps = [line for line in lines if "train loss" in line]
    assert [re.search(r"^step (\d/4) .*train loss ([\d.]+) ", s).groups() for s in steps] == [
        ("1/4", "5.0000"),
        ("2/4", "4.0000"),
        ("3/4", "3.0000"),
        ("4/4", "2.0000"),
    ]
    assert [re.search(r"([\d,]+) tok/s", s)[1] for s in steps] == ["500", "333", "750", "3,000"]
    # Time left at the mean rate of tokens so far: 7 * 2/1, 6 * 5/2, 3 * 9/5 and zero.
    assert [s.split("ETA ")[1] for s in steps] == ["0:00:14", "0:00:15", "0:00:05", "0:00:00"]
    (validation,) = (line for line in lines if "val loss" in line)
    assert re.search(r"^step 2/4 .*val loss 3\.2500 .*2,000 tokens .*5\.0 s", validation)


def test_utilization_is_shown_where_it_is_known_and_not_where_it_is_not(run, clock):
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


def test_the_summary_has_the_mean_utilization_over_the_time_of_training(run, clock):
    known = {(1, 1000.0): 0.2, (2, 250.0): 0.05}
    progress = progress_of(run, lambda *of: known[of])
    for step, seconds in ((1, 1), (2, 4)):
        progress.started(step, {"loss": 5.0, "grad_norm": 1.0, **CALM})
        clock.now += seconds
    progress.report()
    assert progress.summary(2) == {
        "final loss": "train 5.0000",
        "tokens": "2,000",
        "time": "train 5.0 s",
        "speed": "400 tok/s, MFU 8.0%",
    }


def test_the_summary_of_a_resumed_run_is_of_all_of_it_and_says_what_is_of_this_process(run, clock):
    progress = progress_of(run, training_seconds=7.0)
    progress.started(2, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 2
    progress.report()
    told = progress.summary(2)
    assert told["tokens"] == "2,000, 1,000 since resuming"
    assert told["speed"].endswith(", since resuming")
    assert told["time"] == "train 2.0 s since resuming; 9.0 s of training in total"


def test_a_fast_run_shows_a_line_a_second_on_a_terminal_and_each_in_its_log(run, monkeypatch):
    screen, now = io.StringIO(), iter((5.0, 5.5, 6.0))
    run.console = Console(file=screen, force_terminal=True, width=60, highlight=False)
    monkeypatch.setattr("nanogpt.runs.folder.time.monotonic", lambda: next(now))
    for step in (1, 2, 3):
        run.say_often(f"step {step} | in full", f"step {step}")
    assert screen.getvalue().splitlines() == ["step 1", "step 3"]
    assert log(run).splitlines() == [f"step {step} | in full" for step in (1, 2, 3)]


def test_a_line_with_a_short_form_is_short_on_a_narrow_terminal_and_whole_in_the_log(run):
    for width, shown in ((60, "val loss 4"), (80, "val loss 4 | in full")):
        screen = io.StringIO()
        run.console = Console(file=screen, force_terminal=True, width=width, highlight=False)
        run.say("val loss 4 | in full", short="val loss 4")
        assert screen.getvalue() == f"{shown}\n"
    assert log(run).splitlines() == ["val loss 4 | in full"] * 2


def test_on_a_terminal_a_line_with_the_time_left_follows_the_steps_and_validation_stands_out(
    run, clock
):
    screen = io.StringIO()
    run.console = Console(file=screen, force_terminal=True, width=80, highlight=False)
    progress = progress_of(run)
    progress.started(1, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 2
    progress.validate(lambda: 4.5)
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
    with pytest.raises(BadNumbers, match=rf"^step 2: loss {loss}, .* norm {norm}, .* x 0\.750\."):
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
    assert "SPIKE: 6.5 standard deviations above the mean" in spiking and "SKIPPED" not in spiking
    assert "SPIKE: 9.0 standard deviations above the mean, SKIPPED" in skipped
    assert [record["spike"] for record in records(run)] == [5.9, 6.5, 9.0]


def test_a_record_waits_for_its_validation_even_where_that_is_broken_off(run, clock):
    progress = progress_of(run)
    progress.started(1, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 1
    progress.report(validates=True)
    kept = progress.unvalidated
    progress.validate(lambda: None)
    assert records(run) == []
    assert progress.unvalidated == kept
    again = progress_of(run, unvalidated=kept)
    again.validate(lambda: 3.5)
    assert again.unvalidated is None
    assert [(r["step"], r["train_loss"], r["val_loss"]) for r in records(run)] == [(1, 5.0, 3.5)]


def test_time_goes_on_from_where_earlier_processes_left_it(run, clock):
    progress = progress_of(run, training_seconds=10.0)
    clock.now += 50
    progress.paused("compile")  # the time before is not training
    progress.started(3, {"loss": 5.0, "grad_norm": 1.0, **CALM})
    clock.now += 2
    progress.report()
    assert [(r["time_s"], r["step_time_s"]) for r in records(run)] == [(12.0, 2.0)]
