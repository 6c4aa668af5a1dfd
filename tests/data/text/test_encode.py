"""The processes that encode text: how many there are, and what reaches them."""

import os
import signal

import pytest

from nanogpt.data.text import encode
from nanogpt.data.text.encode import in_order


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [
        (24, None, 24),  # a machine without containers
        (1, None, 1),  # taskset -c 0
        (24, "max 100000", 24),
        (24, "250000 100000", 2),
        (24, "50000 100000", 1),
        (2, "800000 100000", 2),
    ],
)
def test_as_many_as_this_process_may_keep_busy(affinity, quota, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(encode, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert encode.usable_cpus() == expected


def hears_ctrl_c(_):
    """Return whether Ctrl-C can reach this process."""
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_no_ctrl_c_reaches_a_worker_at_any_time_but_one_reaches_the_parent():
    assert [heard for heard, _ in in_order(hears_ctrl_c, [([], 0)] * 3, 2)] == [False] * 3
    assert hears_ctrl_c(None)
