"""Writing checkpoints, in the background, so that whatever fails the last good one remains.

checkpoint.py says what a checkpoint is, and reads it.
"""

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import jax
from jax.experimental.multihost_utils import broadcast_one_to_all
from orbax.checkpoint import v1 as ocp

from nanogpt.checks import ConfigError
from nanogpt.devices.processes import told_by_all
from nanogpt.files import sha256_of, write_whole
from nanogpt.training.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    digest_of,
    examined,
    kinds_of,
    newest_checkpoint,
    parts_of,
    saves_in,
)
from nanogpt.training.records import validation_losses
from nanogpt.training.step import TrainState

SPACE = 1.2  # disk space that must be free before a save, in sizes of the state
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
UNDER_WAY = "under way"  # what a process tells the others of its part of a save

ORBAX = ocp.Context()
ORBAX.array.saving.use_compression = False  # gains little on weights, for much work
ORBAX.array.saving.use_replica_parallel = False  # would compile a slice per shape and device


class Checkpoints:
    """Writes the checkpoints of a run, in the background; leaving it as a context waits for that.

    With several JAX processes all must call `save` at the same steps, onto one file system; the
    first of them writes the manifest and deletes. A save that fails in one fails in all.
    """

    def __init__(self, run: Path, keep: int, say: Callable[[str], None], keep_best: bool = False):
        """Keep the newest `keep` good ones, at least 1; `say` is told of saves that fail.

        With `keep_best`, the one with the lowest validation loss in the run's metrics stays, too.
        """
        self._run, self._folder = run, run.resolve() / "checkpoints"
        self._keep, self._say, self._keep_best = max(1, keep), say, keep_best
        # Of the last save:
        self._begun = time.monotonic()
        self._step, self._under_way = -1, False
        self._thread: Thread | None = None  # finishes it
        self._reason = ""  # why it failed, if it did

    @property
    def minutes(self) -> float:
        """Since the last save began, or since this process began."""
        return (time.monotonic() - self._begun) / 60

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Begin to write the state, with facts that JSON can hold; it may be donated on return.

        Waits for the save before. One that fails is told of, and is no reason to end the training.
        """
        parts, step = parts_of(state), int(state.step)
        known = {"step": step, "facts": json.loads(json.dumps(facts)), "arrays": kinds_of(parts)}
        self._join()
        if step == self._step and not self._reason:
            return
        self._step, self._reason, self._begun = step, "", time.monotonic()
        folder = self._folder / f"{step:08}"
        # What process 0 finds decides for all.
        if broadcast_one_to_all(isinstance(examined(folder), Checkpoint)):
            return  # never in place of a good one, which may be the last
        needed = int(SPACE * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        if reasons := failures(told_by_all(self._hindrance(needed))):
            self._failed(reasons[0])
            return
        self._under_way = True
        try:
            # This copies the arrays into host memory. On CPUs, where they are there already, it
            # looks at them as they are; JAX does not write into an array that is looked at so.
            with ORBAX:
                writing = ocp.save_checkpointables_async(str(folder), parts, overwrite=True)
        except Exception as error:  # a full disk, a forbidden folder, and what nobody thought of
            self._failed(reason_of(error))
        else:
            self._thread = Thread(target=self._finish, args=(folder, known, writing), daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when what was begun is on disk. Raises CheckpointError if the last save failed."""
        self._join()
        if self._reason:
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
        elif self._thread is not None:
            self._thread.join()  # the exception under way is the one to be seen

    def _hindrance(self, needed: int) -> str:
        """Why this process cannot begin to write so many bytes; empty if it can."""
        try:
            self._folder.mkdir(exist_ok=True)
            if jax.process_index() == 0:
                self._delete_unfinished()
                free = shutil.disk_usage(self._folder).free
                older = saves_in(self._folder)[1:]
                if free < needed <= free + sum(map(_size, older)):
                    self._delete_old(keep=1)
                    free = shutil.disk_usage(self._folder).free
                if free < needed:
                    return f"it needs {needed:,} bytes on the disk and {free:,} are free"
        except OSError as error:
            return reason_of(error)
        return ""

    def _finish(self, folder: Path, known: dict[str, Any], writing: ocp.AsyncResponse) -> None:
        """In the background: wait for the arrays, write the manifest, delete old checkpoints."""
        try:
            writing.result()
            if jax.process_index() == 0:
                _write_manifest(folder, known)
                self._delete_old(self._keep, folder)
        except Exception as error:
            if self._thread is current_thread():  # else it was given up
                self._failed(reason_of(error))

    def _join(self) -> None:
        """Wait for the last save: until it has ended in all processes, or failed in one."""
        while self._under_way:
            if self._thread is not None:
                self._thread.join(None if jax.process_count() == 1 else 0.05)
            waits = self._thread is not None and self._thread.is_alive()
            told = told_by_all(UNDER_WAY if waits else self._reason)
            reasons = failures(told)
            if reasons and not self._reason:
                self._thread = None  # it waits for the others, in vain
                self._failed(reasons[0])
            self._under_way = UNDER_WAY in told and not reasons
        self._thread = None

    @property
    def _failure(self) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint of step {self._step} was not written: {self._reason}; those before it "
            "are kept."
        )

    def _failed(self, reason: str) -> None:
        self._reason = reason
        self._delete_unfinished()
        self._say(f"WARNING: {self._failure}")

    def _delete_unfinished(self) -> None:
        """Delete what failed and interrupted saves left; none may be under way."""
        with suppress(OSError):
            for folder in saves_in(self._folder):
                if not (folder / MANIFEST).exists():
                    _delete(folder)

    def _delete_old(self, keep: int, new: Path | None = None) -> None:
        """Delete all but the newest good ones and the best; `new` is known to be good."""
        good, folders = 0, saves_in(self._folder)
        losses = validation_losses(self._run) if self._keep_best else {}
        validated = [x for x in folders if x.name.isdecimal() and int(x.name) in losses]
        best = min(validated, key=lambda folder: losses[int(folder.name)], default=None)
        for folder in folders:
            if good < keep and (folder == new or isinstance(examined(folder), Checkpoint)):
                good += 1
            elif folder != best:
                _delete(folder)


def failures(told: list[str]) -> list[str]:
    """Why a save failed, from what each process tells of its part."""
    where = (f" (process {number})" if len(told) > 1 else "" for number in range(len(told)))
    return [f"{x}{y}" for x, y in zip(told, where, strict=True) if x not in ("", UNDER_WAY)]


def reason_of(error: Exception) -> str:
    """What an error says, in a few words."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    reason = re.sub(r"^\[Errno \d+\] ", "", reason)
    if code := re.search(r"os_error_code='(\d+)'", reason):  # a long message of TensorStore's
        reason = os.strerror(int(code[1]))
    return reason


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


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
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    for path in (*folder.rglob("*/"), folder, folder.parent, folder.parent.parent):
        _sync(path)
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    manifest = {"format": FORMAT, **known, "versions": versions, "files": files}
    whole = manifest | {"sha256": digest_of(manifest)}
    write_whole(folder / MANIFEST, json.dumps(whole, indent=1))
    _sync(folder)


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
