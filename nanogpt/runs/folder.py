"""The output of a run: lines on the console and in log.txt, and metrics.jsonl.

runs/<name>/config.json        every hyperparameter
            run.json           what is needed to repeat the last start: settings, command, commit,
                               data, hardware and versions
            log.txt            the console output
            metrics.jsonl      one JSON object per step, written as it happens
            checkpoints/       see nanogpt/training/checkpoint.py
            lock, holder       the process that is training it
"""

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import rich.progress
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanogpt.checks import UserError
from nanogpt.command_line import discard_output
from nanogpt.files import cannot_write, lock_file, write_whole
from nanogpt.runs.trackers import Trackers
from nanogpt.training.records import FILE, read_records


class RunError(UserError):
    """A run folder that cannot be used; the message is one sentence for the user."""


class Circumstances(TypedDict, total=False):
    """The fields of run.json that are read; see nanogpt/runs/environment.py."""

    commit: str
    date: str
    hardware: str
    accelerators: list[str]


class Run:
    """A run folder, locked by this process, and the console."""

    def __init__(self, folder: Path):
        """Lock an existing folder. Raises RunError if another process has locked it."""
        self.console = Console(highlight=False)
        self._bar: rich.progress.Progress | None = None
        self.trackers = Trackers(self.say)
        self.folder = folder
        self._lock = _hold(folder)
        try:
            self._log = (folder / "log.txt").open("ab", buffering=0)
            self._metrics = (folder / FILE).open("ab", buffering=0)
        except OSError as error:
            self._lock.release()
            raise RunError(
                f"{error.filename} cannot be written ({error.strerror}): move it away, or start "
                "another run."
            ) from error
        self._waiting: list[bytes] = []  # records not written yet because the disk is full
        self._shown = float("-inf")  # when `say_often` last showed a line

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress_ended()
        if error is not None:  # the console will show it, but by then the log is closed
            _append(self._log, f"ended by {error!r}\n".encode())
        self.trackers.close(1 if kind else 0)
        self._log.close()
        self._metrics.close()
        self._lock.release()

    def configure(self, config: dict[str, Any], circumstances: dict[str, Any]) -> None:
        """Write run.json, then config.json, which marks the folder as a run."""
        everything = circumstances | {"config": config}
        _write(self.folder / "run.json", json.dumps(everything, indent=2) + "\n")
        _write(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def say(self, text: str, style: str = "", short: str = "") -> None:
        """Print a line on the console, with a rich style on a terminal, and to log.txt.

        On a narrow terminal, `short` is printed instead, if given.
        """
        try:
            if self.console.is_terminal:
                told = short if short and self.console.width < 80 else text
                self.console.print(told, style=style or None, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError:  # the console is gone; log.txt remains
            discard_output()
        _append(self._log, f"{text}\n".encode())

    def say_often(self, text: str, short: str) -> None:
        """Print a frequent line: at most one per second on a terminal, short if it is narrow."""
        if not self.console.is_terminal:
            self.say(text)
            return
        if (now := time.monotonic()) >= self._shown + 1:
            self._shown = now
            with suppress(OSError):  # as in `say`
                self.console.print(text if self.console.width >= 80 else short, markup=False)
        _append(self._log, f"{text}\n".encode())

    def table(self, rows: Mapping[str, str]) -> None:
        """Print a table of two columns on a terminal, and as lines elsewhere and to log.txt."""
        if not self.console.is_terminal:
            for name, value in rows.items():
                self.say(f"{name}: {value}")
            return
        table = Table(show_header=False)
        for name, value in rows.items():
            _append(self._log, f"{name}: {value}\n".encode())
            table.add_row(name, Text(value), style="cyan")
        with suppress(OSError):  # as in `say`
            self.console.print(table)

    def progress(self, step: int, num_steps: int, told: str) -> None:
        """Show a progress bar at the bottom of a terminal."""
        if self._bar is None:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.completed:,}/{task.total:,}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.description}", markup=False),
                console=self.console,
                disable=not self.console.is_terminal,
                transient=True,
                expand=True,
                refresh_per_second=2,
            )
            self._bar.add_task(told, total=num_steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, description=told)

    def progress_ended(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            with suppress(OSError):  # as in `say`
                self._bar.stop()
            self._bar = None

    def record(self, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; while the disk is full, lines are held back."""
        self._waiting.append(f"{json.dumps(metrics)}\n".encode())
        while self._waiting and _append(self._metrics, self._waiting[0]):
            del self._waiting[0]
        if len(self._waiting) == 1:
            self.say(
                f"WARNING: {self._metrics.name} cannot be written; its lines are held in "
                "memory until there is space."
            )
        self.trackers.log(metrics)

    def rewind(self, step: int) -> None:
        """Drop the records of steps after `step`, which an earlier process lost.

        Damaged lines before them are also dropped, and reported. A partial line left by a killed
        process can only be at the end.
        """
        path = self.folder / FILE
        self._metrics.close()
        kept, last, damaged, suspects = [], 0, [], []
        for number, (line, record) in enumerate(read_records(self.folder), start=1):
            if isinstance(record, dict) and last < record["step"] <= step:
                kept.append(line.decode("utf-8"))
                last = record["step"]
                damaged, suspects = damaged + suspects, []
            else:
                suspects.append(number)
        for number in damaged:
            self.say(f"WARNING: {path}, line {number:,} is damaged and is dropped.")
        _write(path, "".join(kept))
        self._metrics = path.open("ab", buffering=0)

    def sync(self) -> None:
        """Flush the records to disk, so that they survive even a power cut."""
        with suppress(OSError):  # the checkpoint would fail, too, and report it
            os.fsync(self._metrics.fileno())


class SilentRun(Run):
    """A run in a process other than process 0, which does all printing and writing."""

    def __init__(self, folder: Path):
        self.folder, self.console = folder, Console(quiet=True)
        self.trackers = Trackers(self.say)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        pass

    def configure(self, config: dict[str, Any], circumstances: dict[str, Any]) -> None:
        pass

    def say(self, text: str, style: str = "", short: str = "") -> None:
        pass

    def say_often(self, text: str, short: str) -> None:
        pass

    def table(self, rows: Mapping[str, str]) -> None:
        pass

    def progress(self, step: int, num_steps: int, told: str) -> None:
        pass

    def progress_ended(self) -> None:
        pass

    def record(self, metrics: dict[str, float]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def sync(self) -> None:
        pass


def check_name(parent: Path, name: str) -> None:
    """Raise RunError for a name that is taken or not a valid folder name; "" is always valid."""
    if name and not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        raise RunError(
            f"run_name {name!r} is not valid: use letters, digits, '.', '_', '+' and '-'."
        )
    if name and (parent / name).exists():
        raise taken(parent / name)


def taken(folder: Path) -> RunError:
    """Return the error for a run folder that already exists."""
    return RunError(
        f"{folder} already exists: choose another run_name, or resume that run (--resume {folder})."
    )


def new_folder(parent: Path, name: str, fallback: str) -> Path:
    """Create the folder `parent/name`, or without a name `parent/<fallback>-<date>-<time>`.

    Raises RunError if the name is taken or invalid, or the folder cannot be written.
    """
    check_name(parent, name)
    stamped = f"{fallback}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [name] if name else [stamped, *(f"{stamped}-{i}" for i in range(2, 100))]
    for candidate in candidates:
        folder = parent / candidate
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(
                cannot_write(folder, error, "start the run in another folder")
            ) from error
    raise taken(parent / candidates[0])


def delete_if_no_run(folder: Path) -> None:
    """Delete a folder that was created for a run, unless the run has written its settings."""
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)


def _hold(folder: Path) -> FileLock:
    """Lock the folder; raises RunError if another process has, or it cannot be written."""
    holder = folder / "holder"
    try:
        lock = lock_file(folder / "lock")
    except Timeout:
        who = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
        raise RunError(f"{folder} is in use by {who}: wait for it to finish, or stop it.") from None
    except OSError as error:
        raise RunError(cannot_write(folder, error, "start the run in another folder")) from error
    since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    _write(holder, f"process {os.getpid()} on {platform.node()} since {since}\n")
    return lock


def _write(path: Path, text: str) -> None:
    """Write a file atomically; raises RunError if it cannot be written."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(cannot_write(path, error, "start the run in another folder")) from error


def _append(file: FileIO, line: bytes) -> bool:
    """Append a whole line to a file, or nothing; return whether it was written."""
    before = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) == len(line):
            return True
        os.ftruncate(file.fileno(), before)
    except OSError:
        pass
    return False
