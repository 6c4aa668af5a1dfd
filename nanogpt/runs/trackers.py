"""Curves of a run in TensorBoard and Weights & Biases, each imported only when asked for.

runs/<name>/tensorboard/   event files: tensorboard --logdir runs
            wandb/         what W&B keeps here; with WANDB_MODE=offline all of it, for `wandb sync`
            wandb_id       as which W&B knows the run

metrics.jsonl is the record of a run, these are views of it: the same numbers, under names that
group well. So whatever fails here after the start is told once and ends no run.
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
"""What the numbers of metrics.jsonl are called in the trackers; others keep their names."""

PATIENCE = 30  # seconds that W&B's server has to answer, at the start and at the end


class Tracker(Protocol):
    """Something that shows the curves of a run. Its methods may raise any error."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step; steps come in order, each once."""

    def close(self, status: int) -> None:
        """The run has ended, with this exit status."""


class Trackers:
    """The trackers of a run, none at first. One that fails is told of once, then left alone."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._trackers: dict[str, Tracker] = {}

    def add(self, name: str, make: Callable[..., Tracker], *arguments: Any) -> None:
        """Track with what `make` opens, too. Raises its ConfigError, which is the user's to see."""
        tracker = self._attempt(name, make, *arguments)
        if tracker is not None:
            self._trackers[name] = tracker

    def log(self, record: dict[str, float]) -> None:
        """Pass on a record of metrics.jsonl."""
        metrics = {NAMES.get(name, name): value for name, value in record.items() if name != "step"}
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.log, record["step"], metrics)

    def close(self, status: int) -> None:
        """End tracking, with the exit status of the run; a second time does nothing."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close, status)
        self._trackers.clear()

    def _attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ConfigError:
            raise
        except Exception as error:  # whatever a network, a disk or a library may come up with
            self._trackers.pop(name, None)
            self._say(f"WARNING: {name} gets nothing more of this run: {error!r}")


def check_trackers(tensorboard: bool, wandb: bool) -> None:
    """Import what the trackers asked for need. Raises ConfigError where it is not installed."""
    for option, asked, module in (
        ("tensorboard", tensorboard, "tensorboard.summary.writer.record_writer"),
        ("wandb", wandb, "wandb.sdk"),  # a mere folder wandb/, as W&B leaves them, has no sdk
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
    """Begin to track the run in `folder`, or go on with it; it is shown under the folder's name.

    Args:
        config: its hyperparameters, for W&B.
        first: the step that will be logged first. An earlier process may have logged it and later
            ones: TensorBoard then shows the new numbers, W&B, which takes no step twice, the old.
        say: tells the user a line.

    Raises:
        ConfigError: a library is missing, or nobody is logged in to W&B.
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
    """Writes an event file per process. Values are float32 there: TensorBoard knows no other."""

    def __init__(self, folder: Path, first: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._Event, self._Summary = Event, Summary
        (folder / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}"  # read in this order
        self._writer = RecordWriter((folder / "tensorboard" / name).open("xb"))
        self._write(file_version="brain.Event:2")
        # What other files say of this step and later ones is void.
        self._write(step=first, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values = [self._Summary.Value(tag=tag, simple_value=v) for tag, v in metrics.items()]
        self._write(step=step, summary=self._Summary(value=values))

    def close(self, status: int) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        """Append an event, at once: kill -9 loses none, and a full disk is noticed."""
        self._writer.write(self._Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()


class WeightsAndBiases:
    """Logs to the project in WANDB_PROJECT; W&B's other variables, as WANDB_MODE, hold as well.

    W&B sends from a process of its own, which also bridges gaps of the network.
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
                f"--wandb cannot begin ({str(error).rstrip('.')}): run `wandb login`, set "
                "WANDB_MODE=offline to keep the run on this disk, or leave out --wandb."
            ) from error
        known.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._next = self._run.step  # of a resumed run, the one after the last it has

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self._next:  # W&B would ignore it, with a warning each time
            self._run.log(metrics, step=step, commit=True)

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)
