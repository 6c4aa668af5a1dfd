"""The metrics of each step as a line on the console and a record in metrics.jsonl."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from math import isfinite
from typing import Any

from nanogpt.runs.folder import Run
from nanogpt.schedule import Schedule

SPIKE = 6.0  # report losses more than this many standard deviations above recent ones


class BadNumbers(Exception):
    """A step with a loss or gradient that is not finite; the message is for the user."""


class Progress:
    """Turns the metrics of each step into a line and a record, one step late.

    When `started` is called, a step has only been dispatched; reading its loss would wait for the
    device. So the step before it is reported, which is finished or nearly so, and the device always
    has work queued. A step's time is that between two such reports, without validation.
    """

    def __init__(
        self,
        run: Run,
        schedule: Schedule,
        train_tokens: int,
        utilization: Callable[[int, float], float | None],
        training_seconds: float = 0.0,
        unvalidated: dict[str, Any] | None = None,
    ):
        """An epoch has `train_tokens`; `utilization` maps step and tokens/s to MFU, or None.

        From earlier processes of this run: `training_seconds` is their training time, `unvalidated`
        the record of the last step if it is still to be validated.
        """
        self.run, self.schedule, self.utilization = run, schedule, utilization
        self.train_tokens = train_tokens
        self.training_seconds, self._resumed = training_seconds, training_seconds > 0
        self.seconds = defaultdict[str, float](float)  # this process's time by activity
        self._losses: dict[str, float] = {}  # the latest training and validation loss
        self._trained = 0  # tokens trained on by this process
        self._utilized: float | None = None  # seconds of training times utilization
        self.unvalidated = unvalidated
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._arrived = time.perf_counter()

    def started(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record that `step` was dispatched, with pending `metrics`; report the step before it."""
        self.report()
        self._waiting = step, metrics

    def paused(self, what: str) -> None:
        """Attribute the time since the last report to `what` instead of training."""
        self.spent(time.perf_counter() - self._arrived, what)

    def spent(self, seconds: float, what: str) -> None:
        """Attribute this part of the time since the last report to `what` instead of training."""
        self.seconds[what] += seconds
        self._arrived += seconds

    def report(self, validates: bool = False) -> None:
        """Wait for the last dispatched step and report it.

        If it `validates`, its record is held back for the validation loss.

        Raises BadNumbers if the loss or the gradient is not finite.
        """
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        now = time.perf_counter()
        seconds, self._arrived = now - self._arrived, now
        self.training_seconds += seconds
        self.seconds["train"] += seconds
        tokens, num_steps = self.schedule.tokens(step), self.schedule.num_steps
        trained = tokens - self.schedule.tokens(step - 1)
        self._trained += trained
        tokens_per_s = trained / seconds
        factor = self.schedule.rates(step).rate
        if not (isfinite(loss) and isfinite(grad_norm)):
            raise BadNumbers(
                f"step {step}: loss {loss}, gradient norm {grad_norm}, learning rates x "
                f"{factor:.3f}. The step was not applied."
            )
        spike, applied = float(metrics["spike"]), bool(metrics["applied"])
        record = {
            "step": step,
            "train_loss": loss,
            "grad_norm": grad_norm,
            "spike": spike,
            "learning_rate_factor": factor,
            "tokens": tokens,
            "epoch": tokens / self.train_tokens,
            "time_s": self.training_seconds,
            "step_time_s": seconds,
            "tokens_per_s": tokens_per_s,
        }
        self._losses["train"] = loss
        utilization = self.utilization(step, tokens_per_s)
        if utilization is not None:
            self._utilized = (self._utilized or 0.0) + seconds * utilization
        remaining = (self.schedule.tokens(num_steps) / tokens - 1) * self.training_seconds
        eta = f"ETA {timedelta(seconds=round(remaining))}"
        short = f"step {step}/{num_steps} | train loss {loss:.4f}"
        self.run.say_often(
            f"{short} | lr x {factor:.3f} | "
            f"{1e3 * seconds:.1f} ms | {tokens_per_s:,.0f} tok/s | "
            + (f"MFU {utilization:.1%} | " if utilization is not None else "")
            + eta
            + (f" | SPIKE: {spike:.1f} standard deviations above the mean" if spike > SPIKE else "")
            + ("" if applied else ", SKIPPED"),
            short,
        )
        self.run.progress(step, num_steps, f"train loss {loss:.4f} | {eta}")
        if validates:
            self.unvalidated = record
        else:
            self.run.record(record)

    def validate(self, validate: Callable[[], float | None]) -> None:
        """Complete the record of the last step with its validation loss, unless interrupted.

        Raises BadNumbers if the loss is not finite.
        """
        self.report(validates=True)
        record, val_loss = self.unvalidated, validate()
        self.paused("validate")
        if record is None or val_loss is None:
            return
        if not isfinite(val_loss):
            raise BadNumbers(f"step {record['step']}: validation loss {val_loss}.")
        self.unvalidated = None
        self._losses["val"] = val_loss
        short = f"step {record['step']}/{self.schedule.num_steps} | val loss {val_loss:.4f}"
        self.run.say(
            f"{short} | {record['tokens']:,} tokens | "
            f"epoch {record['tokens'] / self.train_tokens:.3g} | {self.training_seconds:.1f} s",
            style="bold green",
            short=short,
        )
        self.run.record(record | {"val_loss": val_loss})

    def summary(self, step: int) -> dict[str, str]:
        """Return rows about the run up to this step and how this process spent its time."""
        spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.seconds.items())
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self._losses.items())
        tokens = f"{self.schedule.tokens(step):,}"
        if self._resumed:
            tokens += f", {self._trained:,} since resuming"
            spent += f" since resuming; {self.training_seconds:.1f} s of training in total"
        rows = {"final loss": losses, "tokens": tokens, "time": spent}
        if training := self.seconds["train"]:
            utilization = "n/a" if self._utilized is None else f"{self._utilized / training:.1%}"
            rows["speed"] = f"{self._trained / training:,.0f} tok/s, MFU {utilization}"
            rows["speed"] += ", since resuming" * self._resumed
        return rows
