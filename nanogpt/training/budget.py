"""`--minutes`: the depth and the number of tokens that this machine can train in a given time."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, log
from statistics import median
from typing import TYPE_CHECKING

import jax
import numpy as np
from rich.console import Console
from scipy.optimize import nnls

from nanogpt.checks import ConfigError
from nanogpt.devices.accelerator import use_device
from nanogpt.devices.compilation import use_compilation_cache
from nanogpt.devices.hardware import training_flops
from nanogpt.devices.mesh import make_mesh
from nanogpt.devices.processes import told_by_first
from nanogpt.training.inputs import Inputs
from nanogpt.training.plan import plan_here
from nanogpt.training.programs import Programs, prepare_programs
from nanogpt.training.start import Start

if TYPE_CHECKING:
    from train_gpt import Hyperparameters

    Choose = Callable[[int, float | None], Hyperparameters]

MOST_TRIALS = 3
TIMED_SECONDS = 2.0  # per stage
DEEPEST = 128  # as Hyperparameters.depth allows
MOST_BATCHES = 5


@dataclass(frozen=True)
class Trial:
    """What training a depth would take, from a few steps of each of its stages."""

    programs: Programs
    seconds: float
    """Time of all training steps."""

    @property
    def hp(self) -> "Hyperparameters":
        """The settings that were timed."""
        return self.programs.plan.hp

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.hp.model.num_layers

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.hp.schedule.tokens(self.hp.num_steps)


def afford(hp: "Hyperparameters", choose: "Choose") -> "Hyperparameters":
    """Return settings whose run ends about `hp.minutes` after this call, sample excluded.

    Times the depth of `hp`, then depths that should suit the time better, at most three in all.
    With the best of them, the number of tokens is what fits, so that it may be up to about twice or
    half of the rule's.

    Args:
        hp: settings at the first depth to time; with `hp.depth`, no other is tried.
        choose: (depth, tokens, or None for the rule's) -> settings.

    Raises ConfigError if the time is too short.
    """
    minutes = hp.minutes or 0.0
    use_device(hp.device)
    use_compilation_cache()
    first = jax.process_index() == 0
    console = Console(highlight=False, quiet=not first)
    begun = time.monotonic()

    def left() -> float:
        """Return the seconds that are left, the same in all processes."""
        return float(told_by_first(lambda: f"{begun + 60 * minutes - time.monotonic()}"))

    def trial(new: "Hyperparameters") -> Trial:
        files = {"train_files": hp.train_files, "val_files": hp.val_files}
        tried = try_out(replace(new, **files), console)
        console.print(
            f"depth {tried.depth}: {tried.tokens:,} tokens would take "
            f"{tried.seconds / 60:.1f} minutes"
        )
        return tried

    trials = [trial(hp)]
    while not hp.depth and len(trials) < MOST_TRIALS:
        depth = suited(trials, left(), lambda depth: choose(depth, None))
        if depth in [each.depth for each in trials]:
            break
        try:
            trials.append(trial(choose(depth, None)))
        except ConfigError as error:  # it does not fit into memory
            console.print(f"depth {depth}: {error}")
            break
    wanted = left()
    best = min(trials, key=lambda each: distance(each.seconds, wanted))
    validation = validation_seconds(best)

    def filling(best: Trial) -> "Hyperparameters":
        tokens = best.tokens * (left() - validation) / best.seconds
        new = choose(best.depth, max(1.0, tokens))
        if tokens < 1 or new.num_steps < 2:
            raise ConfigError(
                f"minutes must be more than {minutes:g}: {minutes - left() / 60:.1f} were "
                f"used to time the steps, and validation takes {validation / 60:.1f}."
            )
        return new

    chosen = filling(best)
    for _ in range(MOST_BATCHES):
        if chosen.total_batch_size == best.hp.total_batch_size:
            break
        best = trial(chosen)  # so many tokens have another batch, which takes another time
        chosen = filling(best)
    console.print(
        f"chosen for {minutes:g} minutes: depth {best.depth}, "
        f"{chosen.schedule.tokens(chosen.num_steps):,} tokens"
    )
    return replace(chosen, train_files=hp.train_files, val_files=hp.val_files)


def distance(seconds: float, wanted: float) -> float:
    """Return how far two times are apart, as a ratio; 0 if they are equal."""
    return abs(log(seconds / max(1.0, wanted)))


def suited(
    trials: Sequence[Trial], wanted: float, at_depth: "Callable[[int], Hyperparameters]"
) -> int:
    """Return the depth that should take the time that is wanted, from the times of others.

    A step is assumed to take a constant time and a time in proportion to its FLOPs, both of which
    follow from two trials or more.
    """
    only_flops = len(trials) == 1
    known = np.array([(each.hp.num_steps * (not only_flops), flops(each.hp)) for each in trials])
    seconds = np.array([each.seconds for each in trials])
    per_step, per_flop = nnls(known / seconds[:, None], np.ones(len(trials)))[0]

    def expected(depth: int) -> float:
        hp = at_depth(depth)
        return hp.num_steps * per_step + flops(hp) * per_flop

    enough = 1 + bisect_left(range(1, DEEPEST), wanted, key=expected)
    return min(max(1, enough - 1), enough, key=lambda depth: distance(expected(depth), wanted))


def flops(hp: "Hyperparameters") -> float:
    """Return the FLOPs of a run."""
    return training_flops(hp.model, hp.schedule, hp.num_steps)


def try_out(hp: "Hyperparameters", console: Console) -> Trial:
    """Compile the programs of a run and time a few steps of each stage."""
    hp.check()
    plan = plan_here(hp)
    mesh = make_mesh(plan.readers, plan.sharers)
    inputs = Inputs(plan, mesh)
    programs = prepare_programs(plan, mesh, inputs, Start(), console, console.print)
    state = programs.first_state(Start())
    seconds = {}
    for stage, train_step in programs.train.items():
        step = plan.stages[stage].first_step
        batch, rates = programs.batch(step), hp.schedule.rates(step)
        times = []
        while sum(times) < TIMED_SECONDS:
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(train_step(state, batch, rates))
            took = time.perf_counter() - begun
            times.append(float(told_by_first(lambda took=took: f"{took}")))
        seconds[stage] = median(times)
    timed = replace(programs, step_seconds=seconds)
    return Trial(timed, timed.seconds_from(1))


def validation_seconds(trial: Trial) -> float:
    """Return the time of all validations of a run, from that of one."""
    hp, programs = trial.hp, trial.programs
    params = programs.first_state(Start()).params
    begun = time.perf_counter()
    programs.validation_loss(params, hp.num_steps, lambda: False)
    took = float(told_by_first(lambda: f"{time.perf_counter() - begun}"))
    return took * (ceil(hp.num_steps / hp.val_loss_every) if hp.val_loss_every else 1)
