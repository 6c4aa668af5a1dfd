"""Where a run starts: at its first step, or after its newest intact checkpoint."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from nanogpt.checks import ConfigError
from nanogpt.data.dataset import content_of
from nanogpt.devices.processes import told_by_first
from nanogpt.training.checkpoint import Checkpoint, check_model, newest_checkpoint
from nanogpt.training.plan import Plan
from nanogpt.training.records import validation_losses
from nanogpt.training.resume import CHANGEABLE, PLACES, check_same_data
from nanogpt.training.step import param_shapes


@dataclass(frozen=True)
class Start:
    """Where this process starts to train."""

    checkpoint: Checkpoint | None = None
    validated: bool = False
    """Whether the step of the checkpoint was validated after it was saved."""

    @property
    def facts(self) -> dict[str, Any]:
        """The facts saved with the state."""
        return self.checkpoint.facts if self.checkpoint else {}

    @property
    def first_step(self) -> int:
        """The first step to train."""
        return self.checkpoint.step + 1 if self.checkpoint else 1

    @property
    def unvalidated(self) -> dict[str, Any] | None:
        """The record of the step before, if it is still to be validated."""
        return None if self.validated else self.facts.get("unvalidated")

    @property
    def training_seconds(self) -> float:
        """Training time of earlier processes of this run."""
        return self.facts.get("training_seconds", 0.0)

    @property
    def first_record(self) -> int:
        """The step of the first record that will be written."""
        return self.first_step - 1 if self.unvalidated else self.first_step


def facts_to_save(
    plan: Plan, step: int, training_seconds: float, unvalidated: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the facts to save with the state, so that a later process can resume.

    `unvalidated` is the record of the step if it is still to be validated.
    """
    return {
        "tokens": plan.hp.schedule.tokens(step),
        "training_seconds": training_seconds,
        "unvalidated": unvalidated,
        "shards": content_of(plan.dataset),
        "settings": settings_of(plan),
    }


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return the settings that determine what a run learns, flat, to identify its checkpoints."""
    settings = {k: v for k, v in asdict(plan.hp).items() if k not in CHANGEABLE | PLACES}
    settings["stages"] = {f"{number}": stage for number, stage in enumerate(settings["stages"])}
    return flatten_dict(json.loads(json.dumps(settings)), sep=".")


def where_to_begin(plan: Plan, folder: Path, say: Callable[[str], None]) -> Start:
    """Return where the run in this folder starts; beyond its last step if it is complete.

    Raises ConfigError if it cannot resume as planned: there is no intact checkpoint, the data has
    changed, or its stages would have had other numbers of tokens by now.
    """
    hp = plan.hp
    if not hp.resume:
        return Start()
    checkpoint = newest_checkpoint(folder, say)
    saved, current = checkpoint.facts.get("settings", {}), settings_of(plan)
    for name in saved.keys() & current.keys():  # another version may have more
        if saved[name] != current[name]:
            raise ConfigError(
                f"{checkpoint.folder} is from another run, with {name} {saved[name]} instead of "
                f"{current[name]}: restore the run's own checkpoint, or delete this one."
            )
    check_model(checkpoint, param_shapes(hp.model))
    start = Start(checkpoint)
    if start.unvalidated:
        step = checkpoint.step
        validated = told_by_first(lambda: f"{step in validation_losses(folder)}")
        start = Start(checkpoint, validated == "True")
    if start.first_step > hp.num_steps and not start.unvalidated:
        return start
    if "shards" in start.facts:
        check_same_data(folder, start.facts["shards"], plan.dataset)
    else:
        say(f"WARNING: {checkpoint.folder} does not record its data, which may have changed.")
    had, has = start.facts["tokens"], hp.schedule.tokens(checkpoint.step)
    if had != has:
        raise ConfigError(
            f"num_steps cannot change to {hp.num_steps} while {folder} is resumed: its stages "
            f"would have had {has:,} tokens by now instead of {had:,}."
        )
    return start
