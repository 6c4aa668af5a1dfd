"""The size of a run from the minutes it may take, on machines whose speed is known."""

import re
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

import train_gpt
from nanogpt.checks import ConfigError, DoesNotFit
from nanogpt.devices.hardware import flops_per_token
from nanogpt.sizes import at_depth
from nanogpt.training import budget
from nanogpt.training.budget import afford, validations
from tests.programs import run_to_end
from tests.small_runs import shared_cache
from train_gpt import PRESETS

LAPTOP = PRESETS["laptop"]


@dataclass
class Machine:
    """A machine with a fixed time for each step, token and FLOP, and a clock of its own."""

    per_step: float
    per_token: float
    per_flop: float
    compiling: float = 20.0
    now: float = 1000.0

    def training(self, hp):
        tokens = hp.schedule.tokens(hp.num_steps)
        flops = tokens * flops_per_token(hp.model, hp.sequence_length)
        return hp.num_steps * self.per_step + tokens * self.per_token + flops * self.per_flop

    def validating(self, hp):
        """Return the time of one validation."""
        flops = hp.val_tokens * flops_per_token(hp.model, hp.sequence_length)
        return hp.val_tokens * self.per_token / 3 + flops * self.per_flop / 3

    def running(self, hp):
        """Return the time of compiling, training and validating."""
        return self.compiling + self.training(hp) + validations(hp) * self.validating(hp)

    def use(self, monkeypatch):
        def try_out(hp, console):
            self.now += self.compiling
            programs = SimpleNamespace(plan=SimpleNamespace(hp=hp))
            return budget.Trial(programs, self.compiling, self.training(hp))

        monkeypatch.setattr(budget, "try_out", try_out)
        monkeypatch.setattr(budget, "validation_seconds", lambda trial: self.validating(trial.hp))
        monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(budget, "use_compilation_cache", lambda: None)


MACHINES = {
    "a fast one": (1e-3, 1e-6, 5e-12),
    "a slow one": (5e-3, 5e-5, 1e-10),
    "one with slow steps": (0.1, 1e-7, 1e-13),
}


def choose(depth, tokens):
    return replace(at_depth(LAPTOP, depth, tokens), minutes=1.0)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("minutes", [3, 10, 30, 480])
def test_the_run_takes_the_time_asked_for(monkeypatch, machine, minutes):
    here = Machine(*MACHINES[machine])
    here.use(monkeypatch)
    begun = here.now
    hp = afford(replace(LAPTOP, minutes=minutes), choose, begun)
    assert here.now - begun + here.running(hp) == pytest.approx(60 * minutes, rel=0.05)
    # The depth is the rule's for that time, but for rounding.
    rule = here.training(at_depth(LAPTOP, hp.model.num_layers))
    assert 1 / 4 < rule / here.training(hp) < 4


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "by_hand",
    [{}, {"total_batch_size": 1024}, {"total_batch_size": 16384}, {"val_loss_every": 10}],
    ids=str,
)
def test_what_is_set_by_hand_stays_and_so_does_the_time(monkeypatch, machine, by_hand):
    here = Machine(*MACHINES[machine])
    here.use(monkeypatch)
    begun = here.now

    def choose(depth, tokens):
        return replace(at_depth(LAPTOP, 3, tokens), minutes=10.0, **by_hand)

    hp = afford(choose(3, None), choose, begun)
    assert hp.model.num_layers == 3
    assert {name: getattr(hp, name) for name in by_hand} == by_hand
    assert here.now - begun + here.running(hp) == pytest.approx(600, rel=0.05)


def test_a_depth_that_does_not_fit_into_memory_is_left_out(monkeypatch, capsys):
    here = Machine(*MACHINES["a fast one"])
    here.use(monkeypatch)
    enough = budget.try_out

    def try_out(hp, console):
        if hp.model.num_layers > 3:
            raise DoesNotFit("too little memory.")
        return enough(hp, console)

    monkeypatch.setattr(budget, "try_out", try_out)
    begun = here.now
    hp = afford(replace(LAPTOP, minutes=10), choose, begun)
    assert re.search(r"^depth [4-9]: too little memory\.$", capsys.readouterr().out, re.M)
    assert hp.model.num_layers <= 3
    assert here.now - begun + here.running(hp) == pytest.approx(600, rel=0.05)


def test_too_short_a_time_is_refused_in_a_sentence(monkeypatch):
    Machine(*MACHINES["a slow one"]).use(monkeypatch)
    with pytest.raises(ConfigError, match=r"^0\.5 minutes are too few: .*--minutes [1-9]\.\d\.$"):
        afford(replace(LAPTOP, minutes=0.5), choose, 1000.0)


def with_a_stopped_clock(arguments):
    """Train as a user does, but nothing before the first step takes time, however slow it is."""
    now, budget.TIMED_SECONDS = time.monotonic(), 0.1
    budget.time = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    return train_gpt.main(arguments)


def test_what_is_chosen_is_trained_and_can_be_repeated(tmp_path, tmp_path_factory):
    arguments = "--preset laptop --depth 1 --minutes 0.02 --val-tokens 512 --sample-tokens 0 "
    arguments += "--batch-size 1 --total-batch-size 128"
    cache = shared_cache(tmp_path_factory)
    ran = run_to_end(arguments.split(), tmp_path, cache, main=with_a_stopped_clock)
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"^chosen: depth 1, ([\d,]+) tokens, for ", ran.stdout, re.M)
    assert f" {found[1]} in " in ran.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    again = ["--config", str(folder / "config.json"), "--dry-run"]
    planned = run_to_end(again, tmp_path, cache)
    assert planned.returncode == 0, planned.stderr
    assert f"tokens: {found[1]} in " in planned.stdout
