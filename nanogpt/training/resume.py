"""Going on with a run: which one, with which settings, and on the same data as before.

Or with its weights only: the settings of another run that begins with them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from nanogpt.config import ConfigError, GPTConfig, from_json
from nanogpt.schedule import stages_from_json

Settings = TypeVar("Settings")  # train_gpt.Hyperparameters

# What may change when a run is resumed: nothing of what it learns from its next batches, but for
# num_steps, which says how far it goes, and what says how its work is divided.
CHANGEABLE = {
    "batch_size",
    "num_steps",
    "val_loss_every",
    "val_tokens",
    "device",
    "verify_data",
    "resume",
    "dry_run",
    "checkpoint_every",
    "keep_checkpoints",
    "profile",
    "coordinator_address",
    "num_processes",
    "process_id",
    "mesh",
    "shard_params",
    "rematerialize",
    "sample_tokens",
    "sample_prompt",
    "tensorboard",
    "wandb",
}


def run_to_resume(resume: str) -> Path:
    """The folder that `--resume` names, or for "auto" the run in runs/ that was started last.

    Raises ConfigError if there is no run.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds no run to resume: it has no config.json.")
        return folder
    runs = [config.parent for config in Path("runs").glob("*/config.json")]
    if not runs:
        raise ConfigError(f"There is no run to resume in {Path('runs').resolve()}.")
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime_ns)


def saved_settings(kind: type[Settings], path: Path) -> Settings:
    """The settings in a run's config.json; ConfigError if they cannot be read."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        nested = {
            "model": from_json(GPTConfig, saved["model"]),
            "stages": stages_from_json(saved["stages"]),
        }
        return from_json(kind, saved | nested)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): name a run that has it, or with "
            "--config the file itself."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not what this version of train_gpt.py writes ({type(error).__name__}: "
            f"{error}): restore it, or name another run."
        ) from error


def resumed_settings(
    kind: type[Settings], run: Path, override: Callable[[Settings], Settings]
) -> Settings:
    """The settings that the run was started with, overridden where that is allowed.

    Raises ConfigError if they cannot be read, or if `override` changes what may not change.
    """
    before = saved_settings(kind, run / "config.json")
    after = override(before)
    for name in (field.name for field in fields(kind)):
        old, new = getattr(before, name), getattr(after, name)
        if old != new and name not in CHANGEABLE:
            raise ConfigError(
                f"{name} cannot change from {old} to {new} while {run} is resumed: leave it as it "
                "was, or start another run."
            )
    return replace(after, resume=str(run))


def check_same_data(
    run: Path, before: Sequence[tuple[str, int]], now: Sequence[tuple[str, int]]
) -> None:
    """Raise ConfigError if the shards (name, tokens) are not those that the run began with."""
    for had, has in zip_longest(map(tuple, before), now):
        if had != has:
            name = (had or has)[0]
            told = [f"{x[1]:,} tokens" if x and x[0] == name else "nothing" for x in (had, has)]
            raise ConfigError(
                f"{run} was trained on other data: of shard {name} there was {told[0]}, now there "
                f"is {told[1]}. Restore the data, or start another run."
            )
