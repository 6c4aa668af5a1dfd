"""The stages of a run as they are on its devices, which share the rows of each step."""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nanogpt.config import ConfigError, GPTConfig, mesh_axes
from nanogpt.devices.hardware import flops_per_token

if TYPE_CHECKING:
    from train_gpt import Hyperparameters


@dataclass(frozen=True)
class StagePlan:
    """A stage of the run: one compiled program."""

    first_step: int
    last_step: int
    """Less than first_step for a stage without steps."""
    model: GPTConfig
    used_model: GPTConfig
    """The model as used for validation, evaluation and sampling."""
    tied_head: bool
    """Whether embedding and head are tied."""
    row_length: int
    """Tokens per row, T."""
    tokens_per_step: int
    flops_per_token: float


def division(mesh: str | None, num_devices: int) -> tuple[int, int]:
    """Return the sizes of the mesh axes: devices with different rows, and devices sharing rows.

    Raises ConfigError if the mesh needs more devices, or leaves some of them idle.
    """
    axes = mesh_axes(mesh)
    sharers = axes.get("model") or 1
    readers = axes.get("data") or num_devices // sharers or 1
    if readers * sharers > num_devices:
        raise ConfigError(
            f"A mesh of data={readers},model={sharers} needs {readers * sharers} devices, but JAX "
            f"finds {num_devices}."
        )
    if readers * sharers < num_devices:
        raise ConfigError(
            f"mesh {mesh} leaves {num_devices - readers * sharers} of {num_devices} devices idle: "
            "choose one that uses all of them, or make fewer visible to JAX."
        )
    return readers, sharers


def stages_of(hp: "Hyperparameters", readers: int) -> tuple[StagePlan, ...]:
    """Plan the stages; raises ConfigError if a step is not a whole number of micro-batches."""
    schedule, stages = hp.schedule, []
    for number, stage in enumerate(hp.stages):
        tokens = schedule.tokens_per_step(number)
        rows = rows_asked(hp, readers) or 1
        per_pass = rows * hp.sequence_length * readers
        if tokens % per_pass:
            below = tokens // per_pass * per_pass
            nearest = [f"{round(n / stage.batch)}" for n in (below, below + per_pass) if n]
            in_stage = f" in stage {number + 1}, {tokens:,}," if stage.batch != 1 else ""
            raise ConfigError(
                f"total_batch_size {hp.total_batch_size:,}{in_stage} is not a multiple of "
                f"batch_size * sequence_length * num_devices = {rows} * "
                f"{hp.sequence_length} * {readers} = {per_pass:,}: use --total-batch-size "
                f"{' or '.join(nearest)}."
            )
        model, T = schedule.model(hp.model, number), schedule.row_length(number)
        stages.append(
            StagePlan(
                first_step=schedule.first_step(number),
                last_step=schedule.ends[number],
                model=model,
                used_model=schedule.used(hp.model, number),
                tied_head=schedule.ties_head(hp.model, number),
                row_length=T,
                tokens_per_step=tokens,
                flops_per_token=flops_per_token(model, T),
            )
        )
    return tuple(stages)


def with_whole_passes(hp: "Hyperparameters", readers: int) -> "Hyperparameters":
    """Return the settings with the nearest total_batch_size that this many devices can share.

    Unchanged if there is none up to twice as large.
    """
    rows = round(hp.total_batch_size / hp.sequence_length)
    for near in sorted(range(1, 2 * max(1, rows)), key=lambda n: (abs(n - rows), -n)):
        new = replace(hp, total_batch_size=near * hp.sequence_length)
        with suppress(ConfigError):
            new.schedule.check()
            stages_of(new, readers)
            return new
    return hp


def rows_asked(hp: "Hyperparameters", readers: int) -> int | None:
    """Return the batch_size of the settings, or fewer rows if a step has fewer per device."""
    smallest = min(map(hp.schedule.tokens_per_step, range(len(hp.stages))))
    return hp.batch_size and min(hp.batch_size, max(1, smallest // (hp.sequence_length * readers)))
