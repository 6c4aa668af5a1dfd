"""A run as data: its stages, and the rates of each step.

A stage is a part of the run with a fixed batch shape, fixed windows and fixed targets: one compiled
program. Early stages use small batches and short windows, which suffice for what is easy to learn;
later ones use larger batches, with less gradient noise, and longer windows (modded-nanogpt,
2024-11-24 and 2025-11-29). Learning rates and momentum change at every step and are inputs of the
program.

JAX is not imported here, so that errors in the settings appear at once.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Annotated, ClassVar, NamedTuple

from msgspec import Meta

from nanogpt.checks import (
    AboveZero,
    ConfigError,
    Count,
    Decay,
    NotNegative,
    Positive,
    Share,
    checked,
)
from nanogpt.config import GPTConfig

FIRST_MOMENTUM = 0.85  # early gradients change quickly and should be forgotten quickly


Windows = Annotated[tuple[Positive, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class Stage:
    """One stage of a run. What it does not set comes from the run's other settings."""

    ADDED: ClassVar = {"max_document_length"}

    share: AboveZero = 1.0
    """Its share of the steps, relative to the shares of the other stages."""

    batch: AboveZero = 1.0
    """Tokens per step, as a fraction of total_batch_size."""

    length: AboveZero = 1.0
    """Tokens per row, as a fraction of sequence_length."""

    rate: AboveZero = 1.0
    """Factor on all learning rates before the cooldown."""

    windows: Windows | None = None
    """Attention windows, instead of the model's."""

    validation_windows: Windows | None = None
    """Attention windows for validation and inference, instead of these."""

    target_weights: Annotated[tuple[AboveZero, ...], Meta(min_length=1)] = (1.0,)
    """Loss weights of the next token, the one after it, and so on. The last of several decays to
    zero by the end of the stage (modded-nanogpt, 2025-12-22)."""

    max_document_length: Positive | None = None
    """Most tokens of a document in a row, if fewer than the run's max_document_length."""

    split_head: bool = False
    """Untie the head from the embedding from here on."""


Stages = Annotated[tuple[Stage, ...], Meta(min_length=1)]


class Rates(NamedTuple):
    """Inputs of a training step that follow the schedule."""

    rate: float  # factor on all learning rates
    momentum: float  # Muon's
    target_weights: tuple[float, ...] = (1.0,)  # see Stage


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, and the rates of its steps, counted from 1."""

    stages: Stages
    num_steps: Positive
    total_batch_size: Positive
    sequence_length: Positive
    hold_fraction: Annotated[float, Meta(ge=0, lt=1)]
    """Fraction of the steps, at the end, for which the rates stay at their minimum."""
    cooldown_fraction: Share
    """Fraction of the steps before the hold over which the rates decay linearly."""
    final_learning_rate_factor: Share
    momentum: Decay
    momentum_warmup_steps: Count
    """Number of steps over which the momentum warms up from 0.85."""
    momentum_cooldown_steps: Count
    """Number of final steps over which the momentum falls back to 0.85."""
    learning_rate_factor: NotNegative = 1.0
    """Factor on all learning rates."""

    def check(self) -> None:
        """Raise ConfigError, with a sentence for the user, if the schedule is invalid."""
        checked(asdict(self), Schedule)
        if len({stage.windows is None for stage in self.stages}) > 1:
            raise ConfigError("Either every stage has windows, or none.")
        for number, stage in enumerate(self.stages, start=1):
            for name, whole in (("batch", self.total_batch_size), ("length", self.sequence_length)):
                part = whole * getattr(stage, name)
                if round(part) < 1 or abs(part - round(part)) > 1e-6 * part:
                    raise ConfigError(
                        f"{name} of stage {number}, {getattr(stage, name)} * {whole:,}, is not a "
                        "whole number of tokens."
                    )
            if self.sequence_length % self.row_length(number - 1):
                raise ConfigError(
                    f"length of stage {number}, {stage.length}, must be one over a whole number, "
                    "such as 0.5 or 0.25."
                )
            if stage.validation_windows and stage.windows is None:
                raise ConfigError(f"stage {number} has validation_windows, but no windows.")
            if len(stage.target_weights) > self.row_length(number - 1):
                raise ConfigError(f"stage {number} has more target_weights than tokens in a row.")

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The last step of each stage; in short runs a stage may have no steps."""
        shares = list(accumulate(stage.share for stage in self.stages))
        return tuple(round(self.num_steps * share / shares[-1]) for share in shares)

    def stage(self, step: int) -> int:
        """Return the stage of a step."""
        return next(stage for stage, end in enumerate(self.ends) if step <= end)

    def tokens_per_step(self, stage: int) -> int:
        """Return the number of tokens in each batch of a stage."""
        return round(self.total_batch_size * self.stages[stage].batch)

    def row_length(self, stage: int) -> int:
        """Return the number of tokens in each row of a stage, T."""
        return round(self.sequence_length * self.stages[stage].length)

    def row_kind(self, stage: int) -> tuple[int, int | None]:
        """Return T and the longest document in a row, None if the stage does not limit it."""
        return self.row_length(stage), self.stages[stage].max_document_length

    def first_step(self, stage: int) -> int:
        """Return the first step of a stage."""
        return 1 + (self.ends[stage - 1] if stage else 0)

    def tokens(self, step: int) -> int:
        """Return the number of tokens trained on up to and including this step."""
        steps = (
            max(0, min(step, end) - self.first_step(stage) + 1)
            for stage, end in enumerate(self.ends)
        )
        return sum(n * self.tokens_per_step(stage) for stage, n in enumerate(steps))

    def rates(self, step: int) -> Rates:
        """Return a step's rates: constant, then linear decay (Hägele et al., arXiv:2405.18392)."""
        before, number = step - 1, self.stage(step)  # updates made before it; its stage
        N, stage = self.num_steps * (1 - self.hold_fraction), self.stages[number]
        left = min(1.0, max(0.0, N - before) / max(1.0, self.cooldown_fraction * N))
        first, last = stage.rate, self.final_learning_rate_factor
        warmup, cooldown = self.momentum_warmup_steps, self.momentum_cooldown_steps
        warm = min(1.0, before / warmup) if warmup else 1.0
        cool = min(1.0, (self.num_steps - before) / cooldown) if cooldown else 1.0
        momentum = FIRST_MOMENTUM + (self.momentum - FIRST_MOMENTUM) * min(warm, cool)
        weights, begin = stage.target_weights, self.first_step(number)
        if len(weights) > 1:
            fallen = (step - begin) / (self.ends[number] - begin + 1)
            weights = *weights[:-1], weights[-1] * (1 - fallen)
        rate = self.learning_rate_factor * (last + (first - last) * left)
        return Rates(rate, momentum, weights)

    def model(self, config: GPTConfig, stage: int) -> GPTConfig:
        """Return the model that a stage trains, with its and earlier stages' longest windows."""
        windows = [each.windows for each in self.stages[: stage + 1]]
        if windows[-1] is None:
            return config
        longest = tuple(max(each) for each in windows if each)
        return replace(config, windows=windows[-1], rotary_windows=longest)

    def ties_head(self, config: GPTConfig, stage: int) -> bool:
        """Return whether embedding and head are tied in a stage."""
        return config.tied_head and not any(each.split_head for each in self.stages[: stage + 1])

    def used(self, config: GPTConfig, stage: int) -> GPTConfig:
        """Return the model used in and after a stage for validation, evaluation and sampling."""
        windows = self.stages[stage].validation_windows
        model = replace(self.model(config, stage), tied_head=self.ties_head(config, stage))
        return model if windows is None else replace(model, windows=windows)
