"""Small runs to compare their final losses, each in a separate process."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from rich.progress import track

from benchmarks.processes import logged
from nanogpt.training.interruption import Interruption
from train_gpt import PRESETS, Hyperparameters, train

Name = TypeVar("Name")
Change = Callable[[], None]  # changes the current process


def on_bytes(preset: str, model: Mapping[str, Any], **changes: Any) -> Hyperparameters:
    """Return a preset for the bytes of the embedded corpus, in rows of 128, for a CPU core."""
    start = PRESETS[preset]
    model = {"vocab_size": 256, "document_separator": None} | dict(model)
    return replace(
        start,
        train_files=None,
        val_files=None,
        tokenizer="bytes",
        shuffle=True,
        batch_size=4,
        sequence_length=128,
        momentum_warmup_steps=50,
        val_loss_every=0,
        device="cpu",
        dtype="float32",
        sample_tokens=0,
        checkpoint_every=0,
        model=replace(start.model, **model),
        **changes,
    )


def last_record(
    hp: Hyperparameters, change: Change | None, cores: Queue | None
) -> dict[str, float]:
    """Train after `change`, on one of `cores` if given; return the record of the last step."""
    if cores is not None:
        core = cores.get()
        os.sched_setaffinity(0, {core})
    if change:
        change()
    hp.check()
    with TemporaryDirectory() as folder, chdir(folder), Path("console").open("w") as console:
        with redirect_stdout(console):
            status = train(hp, Interruption())
        if status:
            raise RuntimeError(f"A run ended with status {status}.")
        (run,) = Path("runs").iterdir()
        record = logged(run)[-1]
    if cores is not None:
        cores.put(core)
    return record


def final_losses(
    runs: Mapping[Name, tuple[Hyperparameters, Change | None]], own_core: bool
) -> dict[Name, float]:
    """Return the final validation loss of each run; see `last_records`."""
    return {name: last["val_loss"] for name, last in last_records(runs, own_core).items()}


def last_records(
    runs: Mapping[Name, tuple[Hyperparameters, Change | None]], own_core: bool
) -> dict[Name, dict[str, float]]:
    """Return the last record of each run; one per CPU core runs at a time, or one in all."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        cores = manager.Queue() if own_core else None
        for core in os.sched_getaffinity(0) if own_core else ():
            cores.put(core)
        workers = cores.qsize() if own_core else 1
        with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
            started = {name: pool.submit(last_record, *run, cores) for name, run in runs.items()}
            for run in track(as_completed(started.values()), "training", len(started)):
                run.result()
    return {name: run.result() for name, run in started.items()}
