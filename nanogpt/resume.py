"""Going on with a run: which one, with which settings, and on the same data as before.

Or with its weights only: the settings of another run that begins with them.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nanogpt.config import ConfigError, GPTConfig, from_json
from nanogpt.schedule import Stage, stages_from_json

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

# What weights bind whoever begins with them: the settings on which their shapes depend, or their
# meaning. The vocabulary counts as padded, and of mlp_only and backout how many layers they name.
BOUND = {
    "tokenizer": lambda hp: hp.tokenizer,
    "model.vocab_size": lambda hp: hp.model.padded_vocab_size,
    "model.num_layers": lambda hp: hp.model.num_layers,
    "model.num_heads": lambda hp: hp.model.num_heads,
    "model.width": lambda hp: hp.model.width,
    "model.mlp_width": lambda hp: hp.model.mlp_width,
    "model.mlp_only": lambda hp: hp.model.num_attentions,
    "model.value_embeddings": lambda hp: hp.model.value_embeddings,
    "model.bigram_buckets": lambda hp: hp.model.bigram_buckets,
    "model.smear": lambda hp: hp.model.smear,
    "model.attention_gate": lambda hp: hp.model.attention_gate,
    "model.backout": lambda hp: hp.model.backout is None,
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


class Weights(NamedTuple):
    """What a run can begin with instead of random numbers, and what binds it."""

    folder: Path
    settings: Any | None  # of the run that made them; an exported folder does not tell
    model: GPTConfig  # as they were trained last
    tokenizer: str
    sequence_length: int


def weights_in(kind: type[Settings], folder: Path) -> Weights:
    """What `--init-from` names: a run's newest weights, or an exported folder's; none are read.

    Raises ConfigError if there are none.
    """
    from nanogpt.checkpoint import newest_checkpoint
    from nanogpt.export import is_exported, model_in

    if is_exported(folder):
        settings, model = model_in(folder)
        return Weights(folder, None, model, settings["tokenizer"], settings["sequence_length"])
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds no weights to begin with: it has neither a run's config.json nor an "
            "exported model."
        )
    saved = saved_settings(kind, folder / "config.json")
    step = newest_checkpoint(folder, lambda line: print(line, file=sys.stderr)).step
    stage = saved.schedule.stage(min(step, saved.num_steps))
    model = saved.schedule.model(saved.model, stage)
    return Weights(folder, saved, model, saved.tokenizer, saved.sequence_length)


def settings_with(
    weights: Weights, start: Settings, override: Callable[[Settings], Settings]
) -> Settings:
    """The settings of a run that begins with these weights: those of `start`, overridden.

    The model is that of the weights, and one stage takes the place of all. Raises ConfigError if
    `override` asks for a model or a tokenizer that the weights do not fit.
    """
    # At the full rates: when the laptop's model of Python went on with 2 MB of English, lower ones
    # left the loss higher after 150 steps, 1.39 at 0.3 times the rates and 1.50 at 0.1, not 1.34.
    # With so little text that it is read five times, they were better.
    before = replace(
        start,
        model=weights.model,
        tokenizer=weights.tokenizer,
        sequence_length=weights.sequence_length,
        stages=(Stage(),),
        run_name="",
    )
    after = override(before)
    for name, bound in BOUND.items():
        if bound(after) != bound(before):
            has, asked = attrgetter(name)(before), attrgetter(name)(after)
            raise ConfigError(
                f"{name} cannot be {asked}: the weights in {weights.folder} were trained with "
                f"{has}; leave it so, or begin without --init-from."
            )
    return after
