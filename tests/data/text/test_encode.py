"""The number of processes that encode text."""

import os

import pytest

from nanogpt.data.text import encode


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
