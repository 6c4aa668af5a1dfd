"""Resuming a run: which run, with which settings, and on the same data as before.

Also the settings of a new run that starts from another run's weights.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanogpt.adam import AdamGroups
from nanogpt.checks import ConfigError, checked
from nanogpt.data.dataset import Dataset, difference
from nanogpt.files import found_in, read_json

if TYPE_CHECKING:
    from train_gpt import Hyperparameters

Settings = TypeVar("Settings", bound="Hyperparameters")

RESTORE = "restore it, or give another run"

# Settings that may change when a run is resumed. Apart from num_steps, they do not affect what it
# learns, only how its work is distributed and what it validates, saves and reports.
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
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_best",
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
# Names, paths and sources of settings. Data is identified by its content instead.
PLACES = {"run_name", "preset", "config", "init_from", "train_files", "val_files", "data"}
# Settings that older runs do not have, with values that do not change those runs.
ADDED = {
    "depth": None,
    "minutes": None,
    "learning_rate_factor": 1.0,
    "checkpoint_minutes": None,
    "keep_best": False,
    "canonical_masking": False,
    "heads_together": None,
}


def run_to_resume(resume: str) -> Path:
    """Return the folder given by `--resume`, or for "auto" the run in runs/ that started last.

    Raises ConfigError if there is no run.
    """
    if resume != "auto":
        folder = Path(resume)
        if any(os.path.isfile(folder / f"model.safetensors{end}") for end in ("", ".index.json")):
            raise ConfigError(
                f"{folder} is an exported model, not a run: give the run that it comes from, or "
                "start from its weights (--init-from)."
            )
        if not os.path.isfile(folder / "config.json"):  # false also for invalid paths
            raise ConfigError(f"{folder} is not a run folder: it has no config.json.")
        return folder
    runs = [config.parent for config in Path("runs").glob("*/config.json")]
    if not runs:
        raise ConfigError(f"There is no run to resume in {Path('runs').resolve()}.")
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime_ns)


def refuse_earlier_version(path: Path) -> None:
    """Raise ConfigError for a config.json of an earlier version, whose model is computed otherwise.

    The message names the commit that can use it, if run.json or the exported folder has it.
    """
    found: dict[str, Any] = {}
    with suppress(ConfigError):  # anything else wrong with it is reported when it is read
        found = read_json(path, dict[str, Any], "")
    model, circumstances = found.get("model"), found.get("from")
    if not isinstance(model, dict):
        return
    # Late attentions, which dynamic models have, saw other embeddings.
    late = model.get("attention_source") is not None or bool(model.get("exclusive"))
    earlier = late and "composed" not in model
    earlier = earlier or ("dynamic" not in model and bool(model.get("mlp_only")))
    if not earlier and "earlier_windows" not in model:
        return
    with suppress(ConfigError):
        circumstances = circumstances or read_json(path.with_name("run.json"), dict[str, Any], "")
    commit = circumstances.get("commit") if isinstance(circumstances, dict) else None
    known = isinstance(commit, str) and commit != "unknown"
    use = f"check out its commit, {commit.removesuffix('-dirty')}," if known else "use that version"
    raise ConfigError(
        f"{path} is from an earlier version, whose models were different: {use} to continue "
        "with it, or give another run."
    )


def saved_settings(kind: type[Settings], path: Path) -> Settings:
    """Read the settings in a run's config.json; raises ConfigError if they are invalid."""
    refuse_earlier_version(path)
    values = ADDED | read_json(path, dict[str, Any], RESTORE)
    if isinstance(adam := values.get("adam"), dict) and "scalars" in adam:  # as in older runs
        values["adam"] = dict.fromkeys(AdamGroups.LATER, adam["scalars"]) | adam
    saved = checked(values, kind, path, RESTORE)
    with found_in(path, RESTORE):
        saved.check()
    return saved


def resumed_settings(
    kind: type[Settings], run: Path, override: Callable[[Settings], Settings]
) -> Settings:
    """Return the settings that the run was started with, overridden where allowed.

    Raises ConfigError if they cannot be read, or if `override` changes one that must not change.
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


def check_same_data(run: Path, before: dict[str, Any], now: Dataset) -> None:
    """Raise ConfigError if the shards are not those the run started with."""
    for side, verb in (("train", "trained"), ("val", "validated")):
        if what := difference(before[side], getattr(now, side)):
            raise ConfigError(
                f"{run} was {verb} on different data: {what}. Restore the data, or start another "
                "run."
            )
