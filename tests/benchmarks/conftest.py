"""Fixtures for tests of the benchmarks."""

import multiprocessing
import sys

import pytest

from benchmarks import processes
from benchmarks.command import ROOT, Mistake
from tests.programs import FORKED, run_to_end


@pytest.fixture
def forked(monkeypatch, cache):
    """Fork the runs that a benchmark starts, so that they need not import everything again."""
    start = processes.output_of

    def output_of(command, folder, environment=None, *, shown=True):
        if [*command[:2]] != [sys.executable, str(ROOT / "train_gpt.py")]:
            return start(command, folder, environment, shown=shown)
        done = run_to_end(command[2:], folder, cache)
        if done.returncode:
            raise Mistake("A run failed:", done.stderr)
        return done.stdout

    monkeypatch.setattr(processes, "output_of", output_of)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKED)
