"""`--minutes`: the depth and the number of tokens that this machine can train in a given time."""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, log
from statistics import median
from typing import TYPE_CHECKING

import jax
import numpy as np
from rich.console import Console
from scipy.optimize import nnls

from nanogpt.checks import ConfigError, DoesNotFit
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

DEEPEST = 128  # as Hyperparameters.depth allows
MOST_DEPTHS = 3
MOST_BATCHES = 2
TIMED_SECONDS = 2.0  # per stage


@dataclass(frozen=True)
class Trial:
    """The time that training at a depth takes, from a few timed steps of each stage."""

    programs: Programs
    preparing: float
    """Seconds to compile and try the programs, as the run itself will do again."""
    training: float
    """Seconds for all training steps."""

    @property
    def hp(self) -> "Hyperparameters":
        """The settings that were timed."""
        return self.programs.plan.hp

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.hp.model.num_layers

    @property
    def per_token(self) -> float:
        """Seconds of training per token."""
        return self.training / tokens_of(self.hp)

    @property
    def seconds(self) -> float:
        """Approximate seconds for training and validation."""
        return self.training * (1 + validation_share(self.hp))


def afford(hp: "Hyperparameters", choose: "Choose", begun: float) -> "Hyperparameters":
    """Return settings whose run ends about `hp.minutes` after it has begun, sample excluded.

    Times a few steps at up to three depths, from small to large. The depth whose run would be
    nearest to that time gets as many tokens as fit, up to a few times more or fewer than the rule
    gives.

    Args:
        hp: the preset's settings; with `hp.depth`, only that depth is timed.
        choose: (depth, tokens, or None for the rule's) -> settings.
        begun: time.monotonic() at the start of the command.

    Raises ConfigError if the time is too short.
    """
    minutes, own = hp.minutes or 0.0, hp.model.num_layers
    use_device(hp.device)
    use_compilation_cache()
    quiet = jax.process_index() > 0
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)

    def left() -> float:
        """Return the seconds that are left, the same in all processes."""
        return float(told_by_first(lambda: f"{begun + 60 * minutes - time.monotonic()}"))

    def trial(new: "Hyperparameters") -> Trial:
        same = {"train_files": hp.train_files, "val_files": hp.val_files}
        tried = try_out(replace(new, **same, verify_data=False, profile=None), console)
        console.print(
            f"depth {tried.depth}: {tokens_of(tried.hp):,} tokens would take "
            f"{tried.seconds / 60:.1f} min"
        )
        return tried

    console.print(f"timing a few steps, for a run that ends {minutes:g} min after the start")
    depth = own if hp.depth else own // 3 + 1
    trials = [trial(choose(depth, None))]
    while not hp.depth and len(trials) < MOST_DEPTHS and (wanted := left()) > 0:
        depth = suited(trials, wanted, lambda depth: choose(depth, None))
        if depth in [each.depth for each in trials]:
            break
        try:
            trials.append(trial(choose(depth, None)))
        except DoesNotFit as error:
            console.print(f"depth {depth}: {error}")
            break
    wanted = left()
    best = min(trials, key=lambda each: distance(each.seconds, wanted))
    validation = validation_seconds(best)
    chosen = filling(best, validation, choose, left())
    for _ in range(MOST_BATCHES):
        if chosen and chosen.total_batch_size == best.hp.total_batch_size:
            break
        if chosen:  # this number of tokens implies another batch, whose steps must be timed
            best = trial(chosen)
            chosen = filling(best, validation, choose, left())
    if not chosen:
        used, needed = minutes - left() / 60, best.preparing + 2 * validation
        raise ConfigError(
            f"{minutes:g} minutes are too few: finding the settings took {used:.1f}; give at least "
            f"--minutes {2 * used + needed / 60 + 0.1:.1f}."
        )
    console.print(
        f"chosen: depth {best.depth}, {tokens_of(chosen):,} tokens, for the {left() / 60:.1f} of "
        f"{minutes:g} min that are left"
    )
    return replace(chosen, train_files=hp.train_files, val_files=hp.val_files)


def filling(
    best: Trial, validation: float, choose: "Choose", wanted: float
) -> "Hyperparameters | None":
    """Return the settings with as many tokens as fit into the time; None if not even two steps do.

    The time includes compilation and all validations, each of which takes `validation` seconds.
    """
    per_step = tokens_of(best.hp) / best.hp.num_steps

    def with_steps(steps: int) -> "Hyperparameters":
        tokens = steps * per_step
        new = choose(best.depth, tokens)  # in other steps, if these tokens imply another batch
        return replace(new, num_steps=max(1, round(new.num_steps * tokens / tokens_of(new))))

    def seconds(steps: int) -> float:
        new = with_steps(steps)
        return best.preparing + tokens_of(new) * best.per_token + validations(new) * validation

    most = int((wanted - best.preparing) / best.per_token / per_step)  # without validations
    steps = bisect_right(range(1, max(1, most) + 1), wanted, key=seconds)
    return with_steps(steps) if steps >= 2 else None


def distance(seconds: float, wanted: float) -> float:
    """Return how far two times are apart, as a ratio; 0 if they are equal."""
    return abs(log(seconds / max(1.0, wanted)))


def suited(
    trials: Sequence[Trial], wanted: float, at_depth: "Callable[[int], Hyperparameters]"
) -> int:
    """Return the depth expected to take the wanted time, extrapolated from the trials.

    A step is assumed to take a constant time plus a time proportional to its FLOPs. Both are fitted
    if there are at least two trials.
    """
    only_flops = len(trials) == 1
    known = np.array([(each.hp.num_steps * (not only_flops), flops(each.hp)) for each in trials])
    times = np.array([each.training for each in trials])
    per_step, per_flop = nnls(known / times[:, None], np.ones(len(trials)))[0]

    def expected(depth: int) -> float:
        hp = at_depth(depth)
        return (hp.num_steps * per_step + flops(hp) * per_flop) * (1 + validation_share(hp))

    enough = min(DEEPEST, 1 + bisect_left(range(1, DEEPEST), wanted, key=expected))
    return min(max(1, enough - 1), enough, key=lambda depth: distance(expected(depth), wanted))


def tokens_of(hp: "Hyperparameters") -> int:
    """Return the training tokens of a run."""
    return hp.schedule.tokens(hp.num_steps)


def flops(hp: "Hyperparameters") -> float:
    """Return the training FLOPs of a run."""
    return training_flops(hp.model, hp.schedule, hp.num_steps)


def validations(hp: "Hyperparameters") -> int:
    """Return how often a run validates."""
    return ceil(hp.num_steps / hp.val_loss_every) if hp.val_loss_every else 1


def validation_share(hp: "Hyperparameters") -> float:
    """Return roughly how much longer a run takes for its validations, forward passes only."""
    return validations(hp) * hp.val_tokens / 3 / tokens_of(hp)


def try_out(hp: "Hyperparameters", console: Console) -> Trial:
    """Compile the programs of a run and time a few steps of each stage."""
    hp.check()
    plan = plan_here(hp)
    mesh = make_mesh(plan.readers, plan.sharers)
    inputs = Inputs(plan, mesh)
    begun = time.monotonic()
    programs = prepare_programs(plan, mesh, inputs, Start(), console, console.print)
    preparing = agreed(time.monotonic() - begun)
    state = programs.first_state(Start())
    seconds = {}
    for stage, train_step in programs.train.items():
        step = plan.stages[stage].first_step
        batch, rates = programs.batch(step), hp.schedule.rates(step)
        times = []
        while sum(times) < TIMED_SECONDS:
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(train_step(state, batch, rates))
            times.append(agreed(time.perf_counter() - begun))
        seconds[stage] = median(times)
    timed = replace(programs, step_seconds=seconds)
    return Trial(timed, preparing, timed.seconds_from(1))


def validation_seconds(trial: Trial) -> float:
    """Return the seconds of one validation."""
    programs = trial.programs
    params = programs.first_state(Start()).params
    begun = time.perf_counter()
    programs.validation_loss(params, trial.hp.num_steps, lambda: False)
    return agreed(time.perf_counter() - begun)


def agreed(seconds: float) -> float:
    """Return the time that process 0 measured, in all processes."""
    return float(told_by_first(lambda: f"{seconds}"))
