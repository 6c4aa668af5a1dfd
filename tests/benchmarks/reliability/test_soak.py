"""A small soak test: a run that is killed three times ends like an uninterrupted one."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1 as ocp

from benchmarks import results
from benchmarks.reliability import killing, soak
from benchmarks.reliability.killing import Different
from benchmarks.reliability.left_behind import digest, metrics
from tests.programs import Process


class Forked(Process):
    """In place of Popen: forked with everything imported, which takes longer than the rest."""

    send_signal = Process.send
    returncode = property(Process.poll)

    def __init__(self, command, cwd, env, stdout, stderr, encoding):
        super().__init__(command[2:], cwd, cwd / "cache", environment=env)
        self.stdout = open(self._read, encoding=encoding)  # noqa: SIM115

    def wait(self, timeout):
        self._process.join(timeout)
        return self.poll()


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Use one device, as on a laptop, and another folder for the figures."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setattr(soak, "EVERY", 8)
    for module in (soak, killing):
        monkeypatch.setattr(module, "VALIDATE", 6)
    monkeypatch.setattr(killing, "subprocess", SimpleNamespace(PIPE=-1, STDOUT=-2, Popen=Forked))
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    return tmp_path


def test_a_run_that_is_killed_three_times_ends_like_one_that_is_not(alone, capsys):
    arguments = ["--tiny", "--kills", "3", "--steps", "24", "--seed", "1"]
    assert soak.main(arguments) == 0, capsys.readouterr().out
    figures = json.loads((alone / "results" / "soak_tiny.json").read_text())
    assert figures["identical"] is True
    assert figures["kills"] == len(figures["deaths"]) == 3
    assert figures["checkpoints_compared"] > 0
    counts = figures["kills_by_phase_and_signal"]
    assert sum(sum(kinds.values()) for kinds in counts.values()) == 3
    assert "identical to the last bit" in capsys.readouterr().out


def test_a_single_bit_of_a_checkpoint_is_told_apart(tmp_path):
    digests = set()
    for name, value in {"a": 1.0, "b": 1.0, "c": jnp.nextafter(jnp.float32(1), 2)}.items():
        tree = {"params": {"w": jnp.full(3, value)}, "rest": {"step": jnp.int32(7)}}
        ocp.save_checkpointables(tmp_path / name, tree)
        digests.add(digest(tmp_path / name))
    assert len(digests) == 2


def test_metrics_are_compared_but_for_times_and_torn_lines(tmp_path):
    lines = [{"step": 1, "train_loss": 5.5, "time_s": 0.1}, {"step": 2, "train_loss": 5.25}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tra'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert metrics(tmp_path) == [
        {"step": 1, "train_loss": 5.5},
        {"step": 2, "train_loss": 5.25},
    ]
    assert metrics(tmp_path / "nowhere") == []


def test_a_difference_ends_the_soak_with_an_error_and_saves_nothing(alone, monkeypatch, capsys):
    def find(options, place):
        raise Different("the metrics at the end")

    monkeypatch.setattr(soak, "soak", find)
    assert soak.main(["--tiny"]) == 1
    assert capsys.readouterr().out == "DIFFERENT: the metrics at the end\n"
    assert not results.FOLDER.exists()
