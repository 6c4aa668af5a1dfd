"""Checkpoints that can be trusted after any fault: written whole by saving.py, checked before use.

    runs/<name>/checkpoints/00000500/    the state after step 500
        params/, rest/, ...              nested arrays, by Orbax: JSON and numbers, no code
        manifest.json                    size and SHA-256 of every file, written last

A folder without a manifest is what an interrupted save left. Files are on disk before the manifest
names them, so not even a power cut makes half a checkpoint look whole; and a file that changed
later no longer has its SHA-256.
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

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax prints what it also raises


class CheckpointError(ConfigError):
    """A checkpoint that was not written or cannot be used; the message is one sentence."""


class Facts(TypedDict, total=False):
    """What a run notes beside its state."""

    tokens: Total  # trained on so far
    training_seconds: float
    unvalidated: dict[str, float] | None  # metrics of a step that is validated afterwards
    shards: dict[str, list[Shard]]  # those that it trains on, "train", and validates on, "val"
    settings: dict[str, Any]  # those that decide what it learns


class File(TypedDict):
    """A file of a checkpoint as it was written."""

    bytes: Total
    sha256: str


class Manifest(TypedDict):
    """What is read of manifest.json."""

    format: int
    step: Count
    facts: Facts
    arrays: dict[str, str]
    files: dict[str, File]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was found as it was written."""

    folder: Path
    step: int
    facts: dict[str, Any]  # what `save` was given
    arrays: dict[str, str]  # type and shape of each array, by name


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> Checkpoint:
    """The newest good checkpoint of a run; `say` is told why newer ones are passed over.

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
    found = f"none of {len(flaws)} is whole ({'; '.join(flaws)})" if flaws else "there is none"
    raise CheckpointError(
        f"{run} has no checkpoint that can be used: {found}. Restore one, or start another run."
    )


def run_of(folder: Path) -> Path:
    """The run's folder: this one, or that of the checkpoint runs/<name>/checkpoints/<step>."""
    is_run = folder.parent.name != "checkpoints" or os.path.exists(folder / "config.json")
    return folder if is_run else folder.parent.parent


def checkpoint_in(folder: Path, say: Callable[[str], None]) -> Checkpoint:
    """The newest good checkpoint of a run, or the one that the folder is.

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
    """The state that was saved, bit for bit, onto the devices that the `shapes` name."""
    loaded = _load(checkpoint, parts_of(shapes))
    return TrainState(params=loaded["params"], **loaded["rest"])


def load_params(checkpoint: Checkpoint, shapes: Params) -> Params:
    """Only the parameters of a state, onto the devices that the `shapes` name."""
    return _load(checkpoint, {"params": shapes})["params"]


def parts_of(state: TrainState) -> dict[str, Any]:
    """What is written side by side: the parameters, which can be read alone, and the rest."""
    rest = dict(vars(state))
    return {"params": rest.pop("params"), "rest": rest}


def kinds_of(parts: dict[str, Any]) -> dict[str, str]:
    """Type and shape of each array, by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{a.dtype}{list(a.shape)}"
        for path, a in jax.tree.leaves_with_path(parts)
    }


def check_model(checkpoint: Checkpoint, params: Params) -> None:
    """Raise CheckpointError unless a checkpoint has parameters of these shapes and dtypes."""
    _check_kinds(checkpoint, {"params": params})


def _check_kinds(checkpoint: Checkpoint, shapes: dict[str, Any]) -> None:
    """Raise CheckpointError unless the parts of a state that are asked for are as in the shapes."""
    wanted = kinds_of(shapes)
    saved = {name: k for name, k in checkpoint.arrays.items() if name.split(".")[0] in shapes}
    if different := saved.items() ^ wanted.items():
        name, _ = min(different)
        raise CheckpointError(
            f"{checkpoint.folder} is not of the model in config.json, which has "
            f"{wanted.get(name, 'nothing')} as {name} where it has {saved.get(name, 'nothing')}: "
            "restore config.json, or give another run."
        )


def _load(checkpoint: Checkpoint, shapes: dict[str, Any]) -> dict[str, Any]:
    """The parts of a state that are asked for, if they are what the shapes say."""
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
    """The folders of all saves, finished or not, newest first."""
    name = re.compile(r"(\d{8,})(\.orbax-checkpoint-tmp.*)?")
    saves = [path for path in checkpoints.glob("*") if name.fullmatch(path.name)]
    return sorted(saves, key=lambda path: int(path.name.partition(".")[0]), reverse=True)


def examined(folder: Path) -> Checkpoint | str:
    """The checkpoint in a folder if all of it is as it was written, else what is wrong with it."""
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
