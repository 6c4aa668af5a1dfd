"""The progress of a job: what is shown, and where."""

import io
import sys

import pytest

from nanogpt.data.text import eta
from nanogpt.data.text.eta import Pace, progress_line


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(eta, "time", clock)
    return clock


class Console(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


def test_share_speed_and_time_left_are_those_since_the_first_line(clock):
    # Three files of 1, 3 and 4 MB; the job continues where another stopped, inside the second.
    job = Pace([1_000_000, 3_000_000, 4_000_000])
    assert job.line(1, 1 / 3, 2_000_000, 600_000) == "encoded 25.0% | 600,000 tokens"
    clock.now += 4
    line = job.line(2, 0.0, 4_000_000, 1_200_000)
    assert line == "encoded 50.0% | 1,200,000 tokens | 0.5 MB/s | ETA 0:00:08"
    clock.now += 8
    line = job.line(3, 0.0, 8_000_000, 2_400_000)
    assert line == "encoded 100.0% | 2,400,000 tokens | 0.5 MB/s | ETA 0:00:00"


def test_files_without_a_byte_have_a_pace_all_the_same(clock):
    assert Pace([0]).line(0, 0.0, 0, 0) == "encoded 0.0% | 0 tokens"
    assert Pace([]).line(0, 0.0, 0, 0) == "encoded 0.0% | 0 tokens"


def test_on_a_terminal_a_line_takes_the_place_of_the_one_before_and_leaves_in_the_end(
    clock, monkeypatch
):
    monkeypatch.setattr(sys, "stderr", Console(True))
    with progress_line() as show:
        for line in ("one", "too soon", "two"):
            show(line)
            clock.now += 0.15
    assert sys.stderr.getvalue() == "\rone\x1b[K\rtwo\x1b[K\r\x1b[K"


def test_elsewhere_there_is_a_line_every_ten_seconds(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Console(False))
    with progress_line() as show:
        for second in range(25):
            show(f"{second}")
            clock.now += 1.001
    assert sys.stderr.getvalue().split() == ["0", "10", "20"]


def test_a_console_that_is_gone_ends_nothing(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Console(False))
    with progress_line() as show:
        sys.stderr.close()
        show("nobody reads this")
