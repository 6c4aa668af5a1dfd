"""Checkpoints that are safe after any fault: written atomically by saving.py, checked before use.

    runs/<name>/checkpoints/00000500/    the state after step 500
        params/, rest/, ...              nested arrays, by Orbax: JSON and numbers, no code
        manifest.json                    size and SHA-256 of every file, written last

A folder without a manifest is from an interrupted save. Files are on disk before the manifest is
written, so that even after a power cut a partial checkpoint is recognized; a file that changes
later no longer matches its SHA-256.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jax
from orbax.checkpoint import v1 as ocp

from nanogpt.checks import ConfigError, Count, Total, checked
from nanogpt.data.dataset import Shard
from nanogpt.files import read_json, sha256_of
from nanogpt.training.step import Params, TrainState

FORMAT = 1
RESTORE = "restore it"
MANIFEST = "manifest.json"

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the errors that it also raises


class CheckpointError(ConfigError):
    """A checkpoint that was not written or cannot be used; the message is one sentence."""


class Facts(TypedDict, total=False):
    """What a checkpoint records besides the state."""

    tokens: Total  # trained on so far
    training_seconds: float
    unvalidated: dict[str, float] | None  # metrics of the step, if it is still to be validated
    shards: dict[str, list[Shard]]  # training shards, "train", and validation shards, "val"
    settings: dict[str, Any]  # the settings that determine what the run learns


class File(TypedDict):
    """Size and hash of a checkpoint file when it was written."""

    bytes: Total
    sha256: str


class Manifest(TypedDict):
    """The fields of manifest.json that are read."""

    format: int
    step: Count
    facts: Facts
    arrays: dict[str, str]
    files: dict[str, File]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which every file is intact."""

    folder: Path
    step: int
    facts: dict[str, Any]  # as given to `save`
    arrays: dict[str, str]  # dtype and shape of each array, by name


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> Checkpoint:
    """Return the newest intact checkpoint of a run; `say` reports why newer ones are skipped.

    Raises CheckpointError if there is none.
    """
    flaws = []
    for folder in saves_in(run / "checkpoints"):
        checkpoint = examined(folder)
        if isinstance(checkpoint, Checkpoint):
            for flaw in flaws:
                say(f"WARNING: checkpoint {flaw}: step {checkpoint.step} is used instead.")
            return checkpoint
        flaws.append(f"{folder.name} {checkpoint}")
    if not flaws:
        raise CheckpointError(f"{run} has no checkpoint yet: start another run.")
    raise CheckpointError(
        f"{run} has no usable checkpoint: none of {len(flaws)} is intact ({'; '.join(flaws)}). "
        "Restore one, or start another run."
    )


def run_of(folder: Path) -> Path:
    """Return the run's folder: this one, or that of a checkpoint runs/<name>/checkpoints/<step>."""
    is_run = folder.parent.name != "checkpoints" or os.path.exists(folder / "config.json")
    return folder if is_run else folder.parent.parent


def checkpoint_in(folder: Path, say: Callable[[str], None]) -> Checkpoint:
    """Return the newest intact checkpoint of a run, or the checkpoint in this folder.

    Raises CheckpointError if there is none, or if it is damaged.
    """
    if (run := run_of(folder)) == folder:
        return newest_checkpoint(run, say)
    found = examined(folder) if folder.name.isdecimal() else "is not a checkpoint"
    if not os.path.exists(folder):
        found = "does not exist"
    if isinstance(found, str):
        raise CheckpointError(f"{folder} {found}: give another checkpoint, or the run {run}.")
    return found


def load_state(checkpoint: Checkpoint, shapes: TrainState) -> TrainState:
    """Load a state, bit for bit as it was saved, onto the devices given by `shapes`."""
    loaded = _load(checkpoint, parts_of(shapes))
    return TrainState(params=loaded["params"], **loaded["rest"])


def load_params(checkpoint: Checkpoint, shapes: Params) -> Params:
    """Load only the parameters of a state, onto the devices given by `shapes`."""
    return _load(checkpoint, {"params": shapes})["params"]


def parts_of(state: TrainState) -> dict[str, Any]:
    """Split a state into parameters, which can be loaded separately, and the rest."""
    rest = dict(vars(state))
    return {"params": rest.pop("params"), "rest": rest}


def kinds_of(parts: dict[str, Any]) -> dict[str, str]:
    """Return the dtype and shape of each array, by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{a.dtype}{list(a.shape)}"
        for path, a in jax.tree.leaves_with_path(parts)
    }


def check_model(checkpoint: Checkpoint, params: Params) -> None:
    """Raise CheckpointError unless a checkpoint's parameters have these shapes and dtypes."""
    _check_kinds(checkpoint, {"params": params})


def _check_kinds(checkpoint: Checkpoint, shapes: dict[str, Any]) -> None:
    """Raise CheckpointError unless the parts of the state in `shapes` match the checkpoint's."""
    wanted = kinds_of(shapes)
    saved = {name: k for name, k in checkpoint.arrays.items() if name.split(".")[0] in shapes}
    if different := saved.items() ^ wanted.items():
        name, _ = min(different)
        raise CheckpointError(
            f"{checkpoint.folder} does not match the model in config.json: {name} is "
            f"{saved.get(name, 'missing')}, but should be {wanted.get(name, 'absent')}: "
            "restore config.json, or give another run."
        )


def _load(checkpoint: Checkpoint, shapes: dict[str, Any]) -> dict[str, Any]:
    """Load the parts of a state in `shapes`, after checking them."""
    folder = checkpoint.folder.resolve()
    _check_kinds(checkpoint, shapes)
    try:
        return {
            part: ocp.load(str(folder), shapes[part], checkpointable_name=part) for part in shapes
        }
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} changed while it was read ({type(error).__name__}): try again."
        ) from error


def saves_in(checkpoints: Path) -> list[Path]:
    """Return the folders of all saves, finished or not, newest first."""
    name = re.compile(r"(\d{8,})(\.orbax-checkpoint-tmp.*)?")
    saves = [path for path in checkpoints.glob("*") if name.fullmatch(path.name)]
    return sorted(saves, key=lambda path: int(path.name.partition(".")[0]), reverse=True)


def examined(folder: Path) -> Checkpoint | str:
    """Return the checkpoint in a folder if it is intact, otherwise what is wrong with it."""
    try:
        found = read_json(folder / MANIFEST, dict[str, Any], RESTORE)
        if found.pop("sha256", None) != digest_of(found):
            return f"has a changed {MANIFEST}"
        if found.get("format", FORMAT) != FORMAT:
            return f"is in format {found['format']}, not {FORMAT}"
        manifest = checked(found, Manifest, MANIFEST)
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return f"has no {MANIFEST}, so its save was interrupted"
        flaw = str(error).removesuffix(".").removesuffix(f": {RESTORE}")
        return f"has an unreadable {MANIFEST} ({flaw})"
    if manifest["step"] != int(folder.name):
        return f"is of step {manifest['step']}"
    for name, file in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != file["bytes"]:
                return f"has {size:,} bytes instead of {file['bytes']:,} in {name}"
            if sha256_of(folder / name) != file["sha256"]:
                return f"has changed bytes in {name}"
        except OSError as error:
            return f"lacks {name} ({error.strerror})"
    return Checkpoint(folder, manifest["step"], found["facts"], manifest["arrays"])


def digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
