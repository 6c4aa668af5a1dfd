"""train_gpt.py itself on random tokens: the time to its first step, and its rate after that."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import processes
from benchmarks.command import ROOT
from benchmarks.gpu.rows import Figures, Unmeasured
from benchmarks.gpu.sections import Context, Job
from benchmarks.gpu.variants import FULL, TINY, random_tokens
from benchmarks.processes import Watched, logged
from nanogpt.checks import checked
from nanogpt.data.shards import write_shard
from train_gpt import Hyperparameters

STEPS = 60
TINY_RUN = (
    "--preset baseline --dtype float32 --tokenizer bytes --batch-size 2 --sequence-length 32 "
    "--total-batch-size 64 --model.vocab-size 256 --model.num-layers 1 --model.num-heads 2 "
    "--model.width 32 --model.mlp-width 64"
)
STALL = 1.5  # a step that takes this many times its stage's median waited for the host


def jobs(context: Context) -> Iterator[Job]:
    """Yield a run with a cold compilation cache, then one with a warm cache, to its first step."""
    size, steps = (TINY, 4) if context.tiny else (FULL, STEPS)
    hp = size.hp
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokens = 4096 if context.tiny else 2 * steps * hp.total_batch_size
        for split, count in (("train", tokens), ("val", tokens // 16)):
            write_shard(folder / f"{split}.bin", random_tokens(hp.model, (count,)))
        arguments = (
            f"{TINY_RUN if context.tiny else '--preset speedrun'} --num-steps {steps} "
            "--train-files train.bin --val-files val.bin --val-loss-every 0 "
            f"--val-tokens {hp.sequence_length} --checkpoint-every 0 --sample-tokens 0"
        ).split()
        run, launched = start(folder, [*arguments, "--run-name", "cold"]), time.perf_counter()
        yield "launch to first step, cold", partial(first_step, run, launched)
        yield "its steps", partial(all_steps, run, folder / "runs" / "cold", context)
        run, launched = start(folder, [*arguments, "--run-name", "warm"]), time.perf_counter()
        yield "launch to first step, warm", partial(first_step, run, launched)
        run.stop()  # its last checkpoint would take longer than what is measured


def start(folder: Path, arguments: list[str]) -> Watched:
    """Start train_gpt.py, with its compilation cache in this folder."""
    command = [sys.executable, str(ROOT / "train_gpt.py"), *arguments]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    return processes.Watched(command, folder, cache)


def first_step(run: Watched, launched: float) -> Figures:
    """Measure the seconds until the first step's line."""
    if not run.read_until("step 1/"):
        raise Unmeasured(f"train_gpt.py made no step: {' '.join(run.output.splitlines()[-3:])}")
    seconds = time.perf_counter() - launched
    told = [line for line in run.output.splitlines() if line.startswith("compiled and warmed up")]
    return {"seconds": seconds, "compiled": "".join(told)}


def all_steps(run: Watched, folder: Path, context: Context) -> Figures:
    """Return each stage's logged rate, relative to that of the step alone, and the stalls."""
    if status := run.end():
        raise Unmeasured(f"It ended with status {status}: {' '.join(run.output.splitlines()[-3:])}")
    schedule = checked(json.loads((folder / "config.json").read_text()), Hyperparameters).schedule
    by_stage, excess, stalls = defaultdict(list), 0.0, 0
    for step in logged(folder)[1:]:
        by_stage[schedule.stage(step["step"])].append(step)
    rates = {}
    for stage, steps in by_stage.items():
        usual = median(step["step_time_s"] for step in steps)
        slow = [s for step in steps if (s := step["step_time_s"]) > STALL * usual]
        stalls, excess = stalls + len(slow), excess + sum(slow) - len(slow) * usual
        rates[f"stage {stage + 1}"] = median(step["tokens_per_s"] for step in steps)
    alone = context.row("steps", "speedrun, stage 3").get("tokens_per_s")
    rate = rates.get("stage 3")
    return {
        "tokens_per_s": rate or median(rates.values()),
        "of_step_alone": rate / alone if rate and alone else None,
        "stalls": stalls,
        "stalled_s": excess,
        "rates": rates,
        "predicted": {"of_step_alone": 1.0, "stalls": 0},
    }
