"""A loss curve on text available on every machine: train_gpt.py and PyTorch on the same tokens."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.command import ROOT
from benchmarks.cpu.python_sources import python_sources
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.sections import Context, Job
from benchmarks.gpu.sections.pytorch import need_torch
from benchmarks.gpu.sides import TINY
from benchmarks.processes import logged, output_of, train

COMPILING = 60  # seconds that each side may take before its first step
SLOW = 100_000  # tokens/s to assume if the step was not measured


@dataclass(frozen=True)
class Size:
    """The batches that both sides train on."""

    tokens: int  # per step
    T: int  # tokens per row
    rows: int  # per micro-batch in PyTorch
    val_tokens: int
    steps: int
    ours: str = ""  # other arguments
    pytorch: str = ""


def jobs(context: Context) -> Iterator[Job]:
    """Yield both sides, for as many steps as the time allows."""
    size = Size(128, 2, 64, 128, 2, TINY.ours, TINY.pytorch) if context.tiny else size_for(context)
    yield "train_gpt.py, baseline", partial(ours, size, context.tiny)
    yield "GPT-2 small in PyTorch", partial(pytorch, size, context.tiny)


def size_for(context: Context) -> Size:
    """Return the full size, with as many steps as the time allows for both sides."""
    rates = context.row("steps", "baseline"), context.row("pytorch", "GPT-2 small in PyTorch")
    seconds = sum(65_536 / (rate.get("tokens_per_s") or SLOW) for rate in rates)
    steps = max(20, int((context.seconds - 2 * COMPILING) / seconds))
    return Size(65_536, 1024, 64, 1_048_576, steps)


def ours(size: Size, tiny: bool) -> Figures:
    """Train the baseline preset, with batches for a short run."""
    train_file, val_file = python_sources(tiny)
    arguments = (
        f"--preset baseline --train-files {train_file} --val-files {val_file} --sample-tokens 0 "
        f"--total-batch-size {size.tokens} --sequence-length {size.T} --num-steps {size.steps} "
        f"--val-loss-every {max(1, size.steps // 5)} --val-tokens {size.val_tokens} "
        f"--checkpoint-every 0 {size.ours}"
    )
    with TemporaryDirectory() as name:
        steps = logged(train(arguments, Path(name)))
    return {
        "val_loss": steps[-1]["val_loss"],
        "tokens": steps[-1]["tokens"],
        "seconds": steps[-1]["time_s"],
        "losses": [step["train_loss"] for step in steps],
        "val_losses": {step["step"]: step["val_loss"] for step in steps if "val_loss" in step},
    }


def pytorch(size: Size, tiny: bool) -> Figures:
    """Train GPT-2 small on the same tokens."""
    need_torch()
    train_file, val_file = python_sources(tiny)
    arguments = (
        f"--total-batch-size {size.tokens} --sequence-length {size.T} --batch-size {size.rows} "
        f"--warm-up 1 --steps {size.steps - 1} --train-file {train_file} --val-file {val_file} "
        f"--val-tokens {size.val_tokens} {size.pytorch}"
    )
    command = [sys.executable, "-m", "benchmarks.gpu.torch_gpt2", *arguments.split()]
    found = json.loads(output_of(command, ROOT).splitlines()[-1])
    kept = {name: found[name] for name in ("val_loss", "losses", "ms_per_step")}
    seconds = size.steps * found["ms_per_step"] / 1e3
    return kept | {"tokens": size.steps * size.tokens, "seconds": seconds}
