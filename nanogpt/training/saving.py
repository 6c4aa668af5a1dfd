"""Writing checkpoints in the background; whatever fails, the last intact one remains.

checkpoint.py defines what a checkpoint is, and reads it.
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

SPACE = 1.2  # free disk space required for a save, as a multiple of the size of the state
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
UNDER_WAY = "under way"  # status that a process reports while its part of a save runs

ORBAX = ocp.Context()
ORBAX.array.saving.use_compression = False  # slow, and saves little space on weights
ORBAX.array.saving.use_replica_parallel = False  # would compile a slice per shape and device


class Checkpoints:
    """Writes the checkpoints of a run in the background; leaving the context waits for them.

    With several JAX processes, all must call `save` at the same steps, on a shared file system;
    process 0 writes the manifest and deletes old ones. A save that fails in one fails in all.
    """

    def __init__(self, run: Path, keep: int, say: Callable[[str], None], keep_best: bool = False):
        """Keep the newest `keep` intact ones, at least 1; `say` reports saves that fail.

        With `keep_best`, the one with the lowest validation loss in the run's metrics is also kept.
        """
        self._run, self._folder = run, run.resolve() / "checkpoints"
        self._keep, self._say, self._keep_best = max(1, keep), say, keep_best
        # State of the last save:
        self._begun = time.monotonic()
        self._step, self._under_way = -1, False
        self._thread: Thread | None = None  # completes the save
        self._reason = ""  # why it failed, if it did

    @property
    def minutes(self) -> float:
        """Minutes since the last save started, or since this process started."""
        return (time.monotonic() - self._begun) / 60

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Start to write the state, with JSON-serializable facts; it may be donated on return.

        Waits for the previous save first. A save that fails is reported; training continues.
        """
        parts, step = parts_of(state), int(state.step)
        known = {"step": step, "facts": json.loads(json.dumps(facts)), "arrays": kinds_of(parts)}
        self._join()
        if step == self._step and not self._reason:
            return
        self._step, self._reason, self._begun = step, "", time.monotonic()
        folder = self._folder / f"{step:08}"
        # Process 0 decides for all.
        if broadcast_one_to_all(isinstance(examined(folder), Checkpoint)):
            return  # never overwrite an intact one, which may be the last
        needed = int(SPACE * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        if reasons := failures(told_by_all(self._hindrance(needed))):
            self._failed(reasons[0])
            return
        self._under_way = True
        try:
            # This copies the arrays to host memory. On CPUs it uses views of the arrays instead;
            # JAX does not overwrite an array that has such a view.
            with ORBAX:
                writing = ocp.save_checkpointables_async(str(folder), parts, overwrite=True)
        except Exception as error:  # a full disk, missing permissions, or anything else
            self._failed(reason_of(error))
        else:
            self._thread = Thread(target=self._finish, args=(folder, known, writing), daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises CheckpointError if it failed."""
        self._join()
        if self._reason:
            raise self._failure

    def last_good(self, bad: int) -> str:
        """Return a sentence that names the last good checkpoint, or says why there is none.

        The checkpoint of step `bad`, if there is one, is deleted.
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
            self._thread.join()  # the exception that ends the run takes precedence

    def _hindrance(self, needed: int) -> str:
        """Return why this process cannot write `needed` bytes; empty if it can."""
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
        """Wait for the arrays, write the manifest and delete old checkpoints; runs in a thread."""
        try:
            writing.result()
            if jax.process_index() == 0:
                _write_manifest(folder, known)
                self._delete_old(self._keep, folder)
        except Exception as error:
            if self._thread is current_thread():  # otherwise this save was abandoned
                self._failed(reason_of(error))

    def _join(self) -> None:
        """Wait until the last save is complete in all processes, or has failed in one."""
        while self._under_way:
            if self._thread is not None:
                self._thread.join(None if jax.process_count() == 1 else 0.05)
            waits = self._thread is not None and self._thread.is_alive()
            told = told_by_all(UNDER_WAY if waits else self._reason)
            reasons = failures(told)
            if reasons and not self._reason:
                self._thread = None  # it would wait for the others forever
                self._failed(reasons[0])
            self._under_way = UNDER_WAY in told and not reasons
        self._thread = None

    @property
    def _failure(self) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint of step {self._step} was not written: {self._reason}; earlier "
            "checkpoints are kept."
        )

    def _failed(self, reason: str) -> None:
        self._reason = reason
        self._delete_unfinished()
        self._say(f"WARNING: {self._failure}")

    def _delete_unfinished(self) -> None:
        """Delete the remains of failed and interrupted saves; no save may be under way."""
        with suppress(OSError):
            for folder in saves_in(self._folder):
                if not (folder / MANIFEST).exists():
                    _delete(folder)

    def _delete_old(self, keep: int, new: Path | None = None) -> None:
        """Delete all but the newest intact ones and the best; `new` is known to be intact."""
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
    """Return the reasons why a save failed, from the status of each process."""
    where = (f" (process {number})" if len(told) > 1 else "" for number in range(len(told)))
    return [f"{x}{y}" for x, y in zip(told, where, strict=True) if x not in ("", UNDER_WAY)]


def reason_of(error: Exception) -> str:
    """Return an error's message, in a few words."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    reason = re.sub(r"^\[Errno \d+\] ", "", reason)
    if code := re.search(r"os_error_code='(\d+)'", reason):  # TensorStore has long messages
        reason = os.strerror(int(code[1]))
    return reason


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def _delete(folder: Path) -> None:
    """Delete a save, its manifest first; files that cannot be deleted are tried again later."""
    if jax.process_index() == 0:
        with suppress(OSError):
            (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path, known: dict[str, Any]) -> None:
    """Flush all files to disk, then write the manifest of them."""
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
    """Flush a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
