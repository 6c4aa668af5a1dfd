"""Checkpoints that can be trusted after any fault: written whole, checked before use.

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
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, TypedDict

import jax
from jax.experimental.multihost_utils import broadcast_one_to_all
from orbax.checkpoint import v1 as ocp

from nanogpt.checks import ConfigError, Count, Total, checked
from nanogpt.data.dataset import Shard
from nanogpt.files import read_json, write_whole
from nanogpt.training.step import Params, TrainState

FORMAT = 1
RESTORE = "restore it"
MANIFEST = "manifest.json"
SPACE = 1.2  # disk space that must be free before a save, in sizes of the state
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

ORBAX = ocp.Context()
ORBAX.array.saving.use_compression = False  # gains little on weights, for much work
ORBAX.array.saving.use_replica_parallel = False  # would compile a slice per shape and device
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax prints what it also raises


class CheckpointError(ConfigError):
    """A checkpoint that was not written or cannot be used; the message is one sentence."""


class Facts(TypedDict, total=False):
    """What a run notes beside its state."""

    tokens: Total  # trained on so far
    training_seconds: float
    unvalidated: dict[str, float] | None  # metrics of a step that is validated afterwards
    shards: dict[str, list[Shard]]  # those that it trains on, "train", and validates on, "val"


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


class Checkpoints:
    """Writes the checkpoints of a run, in the background; leaving it as a context waits for that.

    With several JAX processes all must call `save` at the same steps, onto one file system; the
    first of them writes the manifest and deletes.
    """

    def __init__(self, run: Path, keep: int, say: Callable[[str], None]):
        """Keep the newest `keep` good ones, at least 1; `say` is told of saves that fail."""
        self._run, self._folder = run, run.resolve() / "checkpoints"
        self._keep, self._say = max(1, keep), say
        self._thread: Thread | None = None  # finishes the last save
        self._failure: CheckpointError | None = None  # of the last save
        self._step = -1  # of the last save

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Begin to write the state, with facts that JSON can hold; it may be donated on return.

        Waits for the save before. One that fails is told of, and is no reason to end the training.
        """
        parts, step = _parts(state), int(state.step)
        known = {"step": step, "facts": json.loads(json.dumps(facts)), "arrays": _kinds(parts)}
        self._join()
        if step == self._step and self._failure is None:
            return
        self._step, self._failure = step, None
        folder = self._folder / f"{step:08}"
        # What process 0 finds decides for all.
        if broadcast_one_to_all(isinstance(_checked(folder), Checkpoint)):
            return  # never in place of a good one, which may be the last
        try:
            self._folder.mkdir(exist_ok=True)
            self._delete_unfinished()
            needed = int(SPACE * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            free = shutil.disk_usage(self._folder).free
            if broadcast_one_to_all(free < needed):
                raise CheckpointError(
                    f"it needs {needed:,} bytes on the disk and {free:,} are free"
                )
            # This copies the arrays into host memory. On CPUs, where they are there already, it
            # looks at them as they are; JAX does not write into an array that is looked at so.
            with ORBAX:
                writing = ocp.save_checkpointables_async(str(folder), parts, overwrite=True)
        except Exception as error:  # a full disk, a forbidden folder, and what nobody thought of
            self._failed(step, error)
        else:
            self._thread = Thread(target=self._finish, args=(folder, known, writing))
            self._thread.start()

    def wait(self) -> None:
        """Return when what was begun is on disk. Raises CheckpointError if the last save failed."""
        self._join()
        if self._failure is not None:
            raise self._failure

    def last_good(self, bad: int) -> str:
        """A sentence that names the last good checkpoint, or says why there is none.

        One of step `bad`, with which something is wrong, is deleted.
        """
        try:
            self.wait()
            _delete(self._folder / f"{bad:08}")
            return f"The last good checkpoint is {newest_checkpoint(self._run, self._say).folder}."
        except ConfigError as failure:
            return str(failure)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.wait()
        else:
            self._join()  # the exception under way is the one to be seen

    def _finish(self, folder: Path, known: dict[str, Any], writing: ocp.AsyncResponse) -> None:
        """In the background: wait for the arrays, write the manifest, delete old checkpoints."""
        try:
            writing.result()
            if jax.process_index() == 0:
                _write_manifest(folder, known)
                self._delete_old(folder)
        except Exception as error:
            self._failed(known["step"], error)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _failed(self, step: int, error: Exception) -> None:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = re.sub(r"^\[Errno \d+\] ", "", reason)
        if code := re.search(r"os_error_code='(\d+)'", reason):  # a long message of TensorStore's
            reason = os.strerror(int(code[1]))
        self._failure = CheckpointError(
            f"The checkpoint of step {step} was not written: {reason}; those before it are kept."
        )
        self._delete_unfinished()
        self._say(f"WARNING: {self._failure}")

    def _delete_unfinished(self) -> None:
        """Delete what failed and interrupted saves left; none may be under way."""
        with suppress(OSError):
            for folder in _saves(self._folder):
                if not (folder / MANIFEST).exists():
                    _delete(folder)

    def _delete_old(self, new: Path) -> None:
        """Delete all but the newest good ones; `new` is known to be good."""
        good = 0
        for folder in _saves(self._folder):
            if good < self._keep and (folder == new or isinstance(_checked(folder), Checkpoint)):
                good += 1
            else:
                _delete(folder)


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> Checkpoint:
    """The newest good checkpoint of a run; `say` is told why newer ones are passed over.

    Raises CheckpointError if there is none.
    """
    flaws = []
    for folder in _saves(run / "checkpoints"):
        checkpoint = _checked(folder)
        if isinstance(checkpoint, Checkpoint):
            for flaw in flaws:
                say(f"WARNING: checkpoint {flaw}: step {checkpoint.step} is used instead.")
            return checkpoint
        flaws.append(f"{folder.name} {checkpoint}")
    found = f"none of {len(flaws)} is whole ({'; '.join(flaws)})" if flaws else "there is none"
    raise CheckpointError(
        f"{run} has no checkpoint that can be used: {found}. Restore one, or start another run."
    )


def load_state(checkpoint: Checkpoint, shapes: TrainState) -> TrainState:
    """The state that was saved, bit for bit, onto the devices that the `shapes` name."""
    loaded = _load(checkpoint, _parts(shapes))
    return TrainState(params=loaded["params"], **loaded["rest"])


def load_params(checkpoint: Checkpoint, shapes: Params) -> Params:
    """Only the parameters of a state, onto the devices that the `shapes` name."""
    return _load(checkpoint, {"params": shapes})["params"]


def _parts(state: TrainState) -> dict[str, Any]:
    """What is written side by side: the parameters, which can be read alone, and the rest."""
    rest = dict(vars(state))
    return {"params": rest.pop("params"), "rest": rest}


def _kinds(parts: dict[str, Any]) -> dict[str, str]:
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
    wanted = _kinds(shapes)
    saved = {name: k for name, k in checkpoint.arrays.items() if name.split(".")[0] in shapes}
    if different := saved.items() ^ wanted.items():
        name, _ = min(different)
        raise CheckpointError(
            f"{checkpoint.folder} is not of the model in config.json, which has "
            f"{wanted.get(name, 'nothing')} as {name} where it has {saved.get(name, 'nothing')}: "
            "restore config.json, or name another run."
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


def _saves(checkpoints: Path) -> list[Path]:
    """The folders of all saves, finished or not, newest first."""
    name = re.compile(r"(\d{8,})(\.orbax-checkpoint-tmp.*)?")
    saves = [path for path in checkpoints.glob("*") if name.fullmatch(path.name)]
    return sorted(saves, key=lambda path: int(path.name.partition(".")[0]), reverse=True)


def _delete(folder: Path) -> None:
    """Delete a save, its manifest first; what the system refuses is tried again at the next."""
    if jax.process_index() == 0:
        with suppress(OSError):
            (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path, known: dict[str, Any]) -> None:
    """Bring all files to disk, then the manifest that names them."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _file_digest(path)}
    for path in (*folder.rglob("*/"), folder, folder.parent, folder.parent.parent):
        _sync(path)
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    manifest = {"format": FORMAT, **known, "versions": versions, "files": files}
    whole = manifest | {"sha256": _digest(manifest)}
    write_whole(folder / MANIFEST, json.dumps(whole, indent=1))
    _sync(folder)


def _checked(folder: Path) -> Checkpoint | str:
    """The checkpoint in a folder if all of it is as it was written, else what is wrong with it."""
    try:
        found = read_json(folder / MANIFEST, dict[str, Any], RESTORE)
        if found.pop("sha256", None) != _digest(found):
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
            if _file_digest(folder / name) != file["sha256"]:
                return f"has changed bytes in {name}"
        except OSError as error:
            return f"lacks {name} ({error.strerror})"
    return Checkpoint(folder, manifest["step"], found["facts"], manifest["arrays"])


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
