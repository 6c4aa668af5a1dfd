"""Fixtures for tests of the benchmarks."""

import multiprocessing
import sys

import pytest

from benchmarks import processes
from benchmarks.command import ROOT, Mistake
from tests.programs import FORKED, run_to_end
from train_gpt import main


def execute(arguments):
    """Do what Python's option -c does."""
    exec(arguments[0], {})


@pytest.fixture
def forked(monkeypatch, cache):
    """Fork the runs that a benchmark starts, so that they need not import everything again."""
    start = processes.output_of
    forks = {str(ROOT / "train_gpt.py"): main, "-c": execute}

    def output_of(command, folder, environment=None, *, shown=True):
        if command[0] != sys.executable or command[1] not in forks:
            return start(command, folder, environment, shown=shown)
        done = run_to_end(command[2:], folder, cache, main=forks[command[1]])
        if done.returncode:
            raise Mistake("A run failed:", done.stderr)
        return done.stdout

    monkeypatch.setattr(processes, "output_of", output_of)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKED)
