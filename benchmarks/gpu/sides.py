"""The sides of the comparison, each in its own process on the same GPU."""

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.command import ROOT, Mistake
from benchmarks.gpu.rows import Figures
from benchmarks.processes import median_step_s, output_of, train
from nanogpt.checks import checked
from nanogpt.config import GPTConfig
from nanogpt.data.shards import write_shard
from nanogpt.devices.hardware import flops_per_token


@dataclass(frozen=True)
class Size:
    """The batches that both sides train on, and each side's other arguments."""

    tokens_per_step: int
    sequence_length: int
    warm_up: int  # steps before timing starts
    steps: int  # timed steps
    ours: str = ""
    pytorch: str = ""


FULL = Size(tokens_per_step=524_288, sequence_length=1024, warm_up=5, steps=20)
TINY = Size(
    *(128, 2, 1, 2),
    ours="--batch-size 64 --dtype float32 --model.num-layers 1 --model.num-heads 2 "
    "--model.width 16 --model.mlp-width 64",
    pytorch="--layers 2 --heads 2 --width 64",
)


def run_ours(size: Size) -> Figures:
    """Run train_gpt.py in a new folder with shards of random tokens."""
    T, steps = size.sequence_length, size.warm_up + size.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for split, tokens in (("train", steps * size.tokens_per_step), ("val", T)):
            write_shard(folder / f"{split}.bin", rng.integers(50257, size=tokens + 1))
        arguments = (
            "--preset baseline --train-files train.bin --val-files val.bin --val-loss-every 0 "
            f"--val-tokens {T} --sample-tokens 0 --num-steps {steps} "
            f"--sequence-length {T} --total-batch-size {size.tokens_per_step} {size.ours}"
        )
        run = train(arguments, folder, one_gpu())
        milliseconds = 1e3 * median_step_s(run, size.warm_up)
        config = json.loads((run / "config.json").read_text())
        headline = (run / "log.txt").read_text().splitlines()[0]
    device = re.search(r"\| 1 x ([^|]*[^| ])", headline)
    if not device:
        raise Mistake(f"train_gpt.py must run on one device: {headline}")
    figures = step_figures(milliseconds, config["total_batch_size"])
    flops = flops_per_token(checked(config["model"], GPTConfig), config["sequence_length"])
    return figures | {"flops_per_token": flops, "device": device[1]}


def run_pytorch(python: str, batch_size: int, size: Size) -> Figures:
    """Run torch_gpt2.py with a Python that has PyTorch."""
    arguments = (
        f"--total-batch-size {size.tokens_per_step} --sequence-length {size.sequence_length} "
        f"--batch-size {batch_size} --warm-up {size.warm_up} --steps {size.steps} {size.pytorch}"
    ).split()
    output = output_of([python, "-m", "benchmarks.gpu.torch_gpt2", *arguments], ROOT, one_gpu())
    figures = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    L, D, T, V = (figures[k] for k in ("layers", "width", "sequence_length", "vocabulary"))
    return figures | {"flops_per_token": gpt2_flops_per_token(L, D, T, V)}


def gpt2_flops_per_token(L: int, D: int, T: int, V: int) -> float:
    """Return GPT-2's FLOPs per token, counted as in nanogpt.devices.hardware.flops_per_token."""
    weights = L * 12 * D**2 + V * D  # 4D² of attention and 8D² of the MLP in a layer; the head
    keys = (T + 1) / 2  # seen by a query, on average
    return 6 * weights + 6 * 2 * D * keys * L


def run_checkout(folder: Path, command: Sequence[str], tokens_per_step: int | None) -> Figures:
    """Run the user's command in a checkout; the figures are those it prints."""
    output = output_of(command, folder, one_gpu())
    milliseconds = step_milliseconds(output)
    tokens = tokens_per_step or printed_tokens_per_step(output)
    if milliseconds and tokens:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, text=True, capture_output=True).stdout.strip()
        return step_figures(milliseconds, tokens) | {"checkout_commit": commit or None}
    missing = "tokens per step (give --checkout-tokens-per-step)"
    if not milliseconds:
        missing = "step's time in the form of nanoGPT or modded-nanogpt"
    raise Mistake(f"{shlex.join(command)} printed no {missing}; its output ends:", output)


def step_milliseconds(output: str) -> float | None:
    """Read the time of a step from nanoGPT's or modded-nanogpt's output; None if not found."""
    # iter 10: loss 9.1234, time 123.45ms, mfu 30.00%
    times = [float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", output, re.M)]
    if times:
        return median(times[len(times) // 2 :])
    # step:20/1000 train_time:987ms step_avg:98.70ms; nan in the first steps of old versions
    averages = re.findall(r"^step:[1-9]\d*/\d+ .*step_avg:([\d.]+)ms", output, re.M)
    return float(averages[-1]) if averages else None


def printed_tokens_per_step(output: str) -> int | None:
    """Read the tokens per step that nanoGPT prints at its start; None if not found."""
    found = re.search(r"^tokens per iteration will be: ([\d,]+)$", output, re.M)
    return int(found[1].replace(",", "")) if found else None


def step_figures(milliseconds: float, tokens: int) -> Figures:
    """Return a step's time, tokens and tokens per second."""
    rate = 1e3 * tokens / milliseconds
    return {"tokens_per_s": rate, "ms_per_step": milliseconds, "tokens_per_step": tokens}


def one_gpu() -> dict[str, str]:
    """Return this environment with only its first GPU, so that all sides use the same one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | {"CUDA_VISIBLE_DEVICES": first, "PYTHONUNBUFFERED": "1"}
