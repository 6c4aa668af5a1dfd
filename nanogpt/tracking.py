"""What a run tells: lines on the console and in log.txt, one JSON object per step in metrics.jsonl.

runs/<name>/config.json     every hyperparameter
            log.txt         what the console showed
            metrics.jsonl   one object per step, as it happens
            weights/        the final weights
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table


class RunError(Exception):
    """A run folder that cannot be used; the message is one sentence for the user."""


class Run:
    """A run folder, new, and the console."""

    def __init__(self, parent: Path, name: str, fallback: str, config: dict[str, Any]):
        """Make the folder `parent/name`; without a name, `parent/<fallback>-<date>-<time>`.

        Raises RunError when the name is taken, cannot be a folder's, or cannot be written.
        """
        self.console = Console(highlight=False)
        self.folder = _new_folder(parent, name, fallback)
        text = {"mode": "w", "encoding": "utf-8", "buffering": 1}  # a line is written when complete
        with (self.folder / "config.json").open(**text) as file:
            file.write(json.dumps(config, indent=2) + "\n")
        self._log = (self.folder / "log.txt").open(**text)
        self._metrics = (self.folder / "metrics.jsonl").open(**text)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._log.close()
        self._metrics.close()

    def say(self, text: str, style: str = "") -> None:
        """A line on the console, with a style of rich's on a terminal, and in log.txt."""
        if style and self.console.is_terminal:
            self.console.print(text, style=style, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)
        self._log.write(text + "\n")

    def table(self, rows: dict[str, str]) -> None:
        """A table of two columns, on a terminal only; log.txt has the rows as lines."""
        for name, value in rows.items():
            self._log.write(f"{name}: {value}\n")
        if self.console.is_terminal:
            table = Table(show_header=False)
            for name, value in rows.items():
                table.add_row(name, value, style="cyan")
            self.console.print(table)

    def record(self, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl."""
        self._metrics.write(json.dumps(metrics) + "\n")


def _new_folder(parent: Path, name: str, fallback: str) -> Path:
    if name and not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        raise RunError(
            f"run_name {name!r} cannot name a folder: use letters, digits, '.', '_', '+' and '-'."
        )
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
                f"The run folder {folder} cannot be made ({error.strerror}): start the run where "
                "you may write."
            ) from error
    raise RunError(f"{parent / candidates[0]} exists already: choose another run_name.")


class Progress:
    """Turns the metrics of each step into a line and a record, one step late.

    A step is only dispatched when `started` is told of it; asking for its loss would wait for the
    device. So the step before is reported then, which is done or nearly, and the device always has
    its next work. The time of a step is that between two such arrivals: validation is not in it.
    """

    def __init__(
        self,
        run: Run,
        num_steps: int,
        tokens_per_step: int,
        learning_rate_factor: Callable[[int], float],
        utilization: Callable[[float], float | None],
    ):
        """`utilization` maps tokens/s to model FLOPs utilisation, or to None where unknown."""
        self.run, self.num_steps, self.tokens_per_step = run, num_steps, tokens_per_step
        self.learning_rate_factor, self.utilization = learning_rate_factor, utilization
        self.training_seconds = 0.0
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._arrived = time.perf_counter()

    def started(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The device works on `step`, whose `metrics` are still to come; report the one before."""
        self.report()
        self._waiting = step, metrics

    def report(self, validate: Callable[[], float] | None = None) -> None:
        """Wait for the step that was started last and report it, with its validation if asked."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        now = time.perf_counter()
        seconds, self._arrived = now - self._arrived, now
        self.training_seconds += seconds
        tokens_per_s = self.tokens_per_step / seconds
        factor = self.learning_rate_factor(step - 1)
        record = {
            "step": step,
            "train_loss": loss,
            "grad_norm": grad_norm,
            "learning_rate_factor": factor,
            "tokens": step * self.tokens_per_step,
            "time_s": self.training_seconds,
            "step_time_s": seconds,
            "tokens_per_s": tokens_per_s,
        }
        utilization = self.utilization(tokens_per_s)
        remaining = (self.num_steps - step) * self.training_seconds / step
        self.run.say(
            f"step {step}/{self.num_steps} | train loss {loss:.4f} | lr x {factor:.3f} | "
            f"{1e3 * seconds:.1f} ms | {tokens_per_s:,.0f} tok/s | "
            + (f"MFU {utilization:.1%} | " if utilization is not None else "")
            + f"ETA {timedelta(seconds=round(remaining))}"
        )
        if validate is not None:
            record["val_loss"] = validate()
            self.run.say(
                f"step {step}/{self.num_steps} | val loss {record['val_loss']:.4f} | "
                f"{step * self.tokens_per_step:,} tokens | {self.training_seconds:.1f} s",
                style="bold green",
            )
            self._arrived = time.perf_counter()
        self.run.record(record)
