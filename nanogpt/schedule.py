"""A run as data: a few stages, and what holds at each step.

A stage is a stretch of the run in which the shape of its batches, its windows and its targets stay
the same: one compiled program. Early steps learn what is easy, from few tokens with short windows;
later ones take larger batches, which are less noisy, and look further back (modded-nanogpt,
2024-11-24 and 2025-11-29). Learning rates and momentum change from step to step, and are given to
the program as numbers.

No JAX here, so that wrong settings answer at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

from nanogpt.config import ConfigError, GPTConfig, from_json

FIRST_MOMENTUM = 0.85  # the first gradients turn quickly and are best forgotten quickly


@dataclass(frozen=True)
class Stage:
    """A stretch of a run. What it leaves out is as in the rest of the settings."""

    share: float = 1.0
    """How many of the steps it takes, in proportion to the shares of the others."""

    batch: float = 1.0
    """Tokens per step, as a share of total_batch_size."""

    length: float = 1.0
    """Tokens per row, as a share of sequence_length."""

    rate: float = 1.0
    """What all learning rates are multiplied with before they fall."""

    windows: tuple[int, ...] | None = None
    """Instead of the windows of the model."""

    target_weights: tuple[float, ...] = (1.0,)
    """Weights of the losses of the next token, the one after it, and so on."""


class Rates(NamedTuple):
    """What the optimizer is told at each step."""

    rate: float  # what all learning rates are multiplied with
    momentum: float  # Muon's


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, and the rates of its steps, which count from 1."""

    stages: tuple[Stage, ...]
    num_steps: int
    total_batch_size: int
    sequence_length: int
    cooldown_fraction: float
    """Share of the steps, the last ones, in which the rates fall linearly to their final value."""
    final_learning_rate_factor: float
    momentum: float
    momentum_warmup_steps: int
    """First steps, in which the momentum rises from 0.85."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for a schedule that makes no sense."""
        if self.momentum_warmup_steps < 0:
            raise ConfigError(
                f"momentum_warmup_steps must not be negative, but is {self.momentum_warmup_steps}."
            )
        for name in ("cooldown_fraction", "final_learning_rate_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, not at {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be 0 or more, below 1: {self.momentum}.")
        if not self.stages:
            raise ConfigError("stages must hold at least one stage.")
        if len({stage.windows is None for stage in self.stages}) > 1:
            raise ConfigError("Either every stage has windows, or none.")
        for number, stage in enumerate(self.stages, start=1):
            if stage.windows is not None and min(stage.windows, default=0) < 1:
                raise ConfigError(f"windows of stage {number} must be at least 1: {stage.windows}.")
            for name in ("share", "batch", "length", "rate"):
                if not 0 < getattr(stage, name) < inf:
                    raise ConfigError(f"{name} of stage {number} must be positive: {stage}.")
            for name, whole in (("batch", self.total_batch_size), ("length", self.sequence_length)):
                part = whole * getattr(stage, name)
                if round(part) < 1 or abs(part - round(part)) > 1e-6 * part:
                    raise ConfigError(
                        f"{name} of stage {number}, {getattr(stage, name)} * {whole:,}, makes no "
                        "whole number of tokens."
                    )
            if self.sequence_length % self.row_length(number - 1):
                raise ConfigError(
                    f"length of stage {number}, {stage.length}, must be one over a whole number: "
                    "its rows take the place of long ones."
                )
            weights = stage.target_weights
            if not weights or not all(0 < weight < inf for weight in weights):
                raise ConfigError(f"target_weights of stage {number} must be positive: {weights}.")
            if len(weights) > self.row_length(number - 1):
                raise ConfigError(f"stage {number} has more target_weights than tokens in a row.")

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The last step of each stage; a stage may have none, where they are few."""
        shares = list(accumulate(stage.share for stage in self.stages))
        return tuple(round(self.num_steps * share / shares[-1]) for share in shares)

    def stage(self, step: int) -> int:
        """Which stage a step belongs to."""
        return next(stage for stage, end in enumerate(self.ends) if step <= end)

    def tokens_per_step(self, stage: int) -> int:
        """Tokens of each batch of a stage."""
        return round(self.total_batch_size * self.stages[stage].batch)

    def row_length(self, stage: int) -> int:
        """Tokens of each row of a stage, T."""
        return round(self.sequence_length * self.stages[stage].length)

    def first_step(self, stage: int) -> int:
        """The first step of a stage."""
        return 1 + (self.ends[stage - 1] if stage else 0)

    def tokens(self, step: int) -> int:
        """How many tokens were trained on when this step is done."""
        steps = (
            max(0, min(step, end) - self.first_step(stage) + 1)
            for stage, end in enumerate(self.ends)
        )
        return sum(n * self.tokens_per_step(stage) for stage, n in enumerate(steps))

    def rates(self, step: int) -> Rates:
        """What holds at a step: constant, then linearly down (Hägele et al., arXiv:2405.18392)."""
        N, before = self.num_steps, step - 1  # updates made before it
        left = min(1.0, (N - before) / max(1.0, self.cooldown_fraction * N))
        first, last = self.stages[self.stage(step)].rate, self.final_learning_rate_factor
        warmup = self.momentum_warmup_steps
        warm = min(1.0, before / warmup) if warmup else 1.0
        momentum = FIRST_MOMENTUM + (self.momentum - FIRST_MOMENTUM) * warm
        return Rates(last + (first - last) * left, momentum)

    def model(self, config: GPTConfig, stage: int) -> GPTConfig:
        """The model as a stage trains it, with rotations that remember the windows before."""
        windows = [each.windows for each in self.stages[: stage + 1]]
        if windows[-1] is None:
            return config
        earlier = tuple(max(each) for each in windows[:-1])
        return replace(config, windows=windows[-1], earlier_windows=earlier)


def stages_from_json(stages: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """The stages as they were before they were written to config.json."""
    return tuple(from_json(Stage, stage) for stage in stages)
