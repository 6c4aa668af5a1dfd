"""Curves of a run in TensorBoard and Weights & Biases, each imported only if requested.

runs/<name>/tensorboard/   event files: tensorboard --logdir runs
            wandb/         W&B's local files; with WANDB_MODE=offline everything, for `wandb sync`
            wandb_id       W&B's id of the run

metrics.jsonl is the record of a run; these are views of it, with the same numbers under grouped
names. So a failure here after the start is reported once and does not stop the run.
"""

import os
import platform
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from nanogpt.checks import ConfigError

NAMES = {
    "train_loss": "train/loss",
    "val_loss": "val/loss",
    "grad_norm": "train/grad_norm",
    "spike": "train/spike",
    "learning_rate_factor": "train/learning_rate_factor",
    "tokens": "progress/tokens",
    "epoch": "progress/epoch",
    "time_s": "progress/time_s",
    "step_time_s": "speed/step_time_s",
    "tokens_per_s": "speed/tokens_per_s",
}
"""Names in the trackers for metrics in metrics.jsonl; others keep their names."""

PATIENCE = 30  # seconds to wait for W&B's server, at the start and at the end


class Tracker(Protocol):
    """The interface of a tracker, which shows curves of a run. Its methods may raise any error."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step; steps come in order, each once."""

    def close(self, status: int) -> None:
        """End tracking, with the exit status of the run."""


class Trackers:
    """The trackers of a run, initially none. One that fails is reported once, then removed."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._trackers: dict[str, Tracker] = {}

    def add(self, name: str, make: Callable[..., Tracker], *arguments: Any) -> None:
        """Add the tracker that `make` opens. Raises only its ConfigError, for the user."""
        tracker = self._attempt(name, make, *arguments)
        if tracker is not None:
            self._trackers[name] = tracker

    def log(self, record: dict[str, float]) -> None:
        """Log a record of metrics.jsonl."""
        metrics = {NAMES.get(name, name): value for name, value in record.items() if name != "step"}
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.log, record["step"], metrics)

    def close(self, status: int) -> None:
        """End tracking, with the exit status of the run; a second call does nothing."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close, status)
        self._trackers.clear()

    def _attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ConfigError:
            raise
        except Exception as error:  # any failure of a network, a disk or a library
            self._trackers.pop(name, None)
            self._say(f"WARNING: {name} logging stopped: {error!r}")


def check_trackers(tensorboard: bool, wandb: bool) -> None:
    """Import the libraries of the requested trackers. Raises ConfigError if one is missing."""
    for option, asked, module in (
        ("tensorboard", tensorboard, "tensorboard.summary.writer.record_writer"),
        ("wandb", wandb, "wandb.sdk"),  # which W&B's folders called wandb/ do not have
    ):
        try:
            if asked:
                import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"--{option} does not work here ({error}): "
                f'pip install -e ".[{option}]" installs what it needs.'
            ) from error


def open_trackers(
    folder: Path,
    config: dict[str, Any],
    first: int,
    say: Callable[[str], None],
    *,
    tensorboard: bool,
    wandb: bool,
) -> Trackers:
    """Start or resume tracking of the run in `folder`, under the folder's name.

    Args:
        config: its hyperparameters, for W&B.
        first: the first step to be logged. An earlier process may have logged it and later ones:
            TensorBoard then shows the new numbers, W&B, which accepts each step once, the old.
        say: prints a line for the user.

    Raises:
        ConfigError: if a library is missing, or the user is not logged in to W&B.
    """
    check_trackers(tensorboard, wandb)
    trackers = Trackers(say)
    if tensorboard:
        trackers.add("TensorBoard", TensorBoard, folder, first)
    if wandb:
        # Offline, each process writes a file, which may repeat steps of an earlier one.
        trackers.add("Weights & Biases", WeightsAndBiases, folder, config | {"first_step": first})
    return trackers


class TensorBoard:
    """Writes an event file per process. Values are float32, TensorBoard's only type."""

    def __init__(self, folder: Path, first: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._Event, self._Summary = Event, Summary
        (folder / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}"  # read in order of name
        self._writer = RecordWriter((folder / "tensorboard" / name).open("xb"))
        self._write(file_version="brain.Event:2")
        # This discards the events of earlier files from this step on.
        self._write(step=first, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values = [self._Summary.Value(tag=tag, simple_value=v) for tag, v in metrics.items()]
        self._write(step=step, summary=self._Summary(value=values))

    def close(self, status: int) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        """Append and flush an event, so that kill -9 loses none and a full disk is noticed."""
        self._writer.write(self._Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


class WeightsAndBiases:
    """Logs to the project in WANDB_PROJECT; W&B's other variables, like WANDB_MODE, also apply.

    W&B sends from a separate process, which also handles interruptions of the network.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        import wandb

        known = folder / "wandb_id"
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "nanogpt-jax"),
                name=folder.name,
                dir=folder,
                id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
                resume="allow",
                config=config,
                settings=wandb.Settings(
                    console="off", quiet=True, init_timeout=PATIENCE, finish_timeout=PATIENCE
                ),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"--wandb cannot start ({str(error).rstrip('.')}): run `wandb login`, set "
                "WANDB_MODE=offline to log to disk only, or leave out --wandb."
            ) from error
        known.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._next = self._run.step  # for a resumed run, the step after its last

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self._next:  # W&B would ignore it, with a warning each time
            self._run.log(metrics, step=step, commit=True)

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)
