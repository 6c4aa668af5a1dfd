"""The training step on one GPU: this project against PyTorch, on the same device in one run.

    .venv/bin/python -m benchmarks.gpu_vs_pytorch --torch-python PYTHON
    .venv/bin/python -m benchmarks.gpu_vs_pytorch --torch-python PYTHON --checkout NANOGPT
        --checkout-command "python train.py config/train_gpt2.py --wandb_log=False --log_interval=1
        --max_iters=30 --eval_iters=1 --batch_size=64 --gradient_accumulation_steps=8"

Every side is a process of its own, and one ends before the next starts: train_gpt.py, PyTorch, the
checkout if one is given, then train_gpt.py again, so that a drift of the device shows. The slower
of its two runs is what the ratios compare.

    train_gpt.py    the baseline preset as a user runs it, on shards of random tokens, whose reading
                    is in the time: the median of `step_time_s` without the first steps
    PyTorch         GPT-2 small trained as by nanoGPT (torch_gpt2.py), with the tokens on the GPU
    checkout        any command in a folder of nanoGPT or modded-nanogpt, by the times it prints:
                    the median of nanoGPT's last half, or modded-nanogpt's last step_avg

The models differ. Both have 12 layers of width 768 and a head of 50,304 rows, and so the same
matrix products. Ours has 6 heads of 128, rotary positions, query-key norm, relu², the value
residual, skips and a soft-capped head of its own, and is trained by Muon and Adam; GPT-2 has 12
heads of 64, learned positions, LayerNorm, GELU, biases and a tied head, and is trained by AdamW. So
the table also gives model FLOPs per token and, where the device's peak is known, their utilisation
(MFU). A checkout may train anything: its FLOPs are not guessed.
"""

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.results import save
from nanogpt.checks import checked
from nanogpt.config import GPTConfig
from nanogpt.data.shards import write_shard
from nanogpt.devices.hardware import flops_per_token, utilization

ROOT = Path(__file__).resolve().parent.parent
TORCH_DEVICE = (
    "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
)
Figures = dict[str, Any]  # of one side, as they are saved


@dataclass(frozen=True)
class Options:
    """Compare the training step with PyTorch's on one GPU."""

    torch_python: Path = Path(sys.executable)
    """A Python that has PyTorch."""
    pytorch: bool = True
    """Whether to measure GPT-2 small in PyTorch."""
    torch_batch_size: int = 64
    """Its rows per forward and backward pass."""
    checkout: Path | None = None
    """A checkout of nanoGPT or modded-nanogpt to measure, too."""
    checkout_command: str = ""
    """What to run in that folder; `python` as its first word is that of --torch-python."""
    checkout_tokens_per_step: int | None = None
    """Tokens per optimizer step of that command; needed unless it prints them as nanoGPT does."""
    tiny: bool = False
    """Everything so small that a CPU takes seconds: a test of this script, not of the speed."""


@dataclass(frozen=True)
class Size:
    """What the two sides train on, and their arguments besides."""

    tokens_per_step: int
    sequence_length: int
    warm_up: int  # steps that are not timed
    steps: int  # steps that are
    ours: str = ""
    pytorch: str = ""


FULL = Size(tokens_per_step=524_288, sequence_length=1024, warm_up=5, steps=20)
TINY = Size(
    *(1024, 8, 1, 2),
    ours="--model.num-layers 2 --model.num-heads 2 --model.width 64 --model.mlp-width 256",
    pytorch="--layers 2 --heads 2 --width 64",
)


class Mistake(Exception):
    """What cannot be measured: a sentence for the user, and the end of an output that tells why."""

    def __init__(self, sentence: str, output: str = ""):
        super().__init__("\n".join([sentence, *output.splitlines()[-10:]]))


def main(arguments: list[str] | None = None) -> int:
    """Measure all sides, print a table, save the figures, and return the exit status."""
    options = tyro.cli(Options, args=arguments)
    try:
        compare(options, TINY if options.tiny else FULL)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0


def compare(options: Options, size: Size) -> None:
    """The whole run; what can be known to be wrong is told before anything is measured."""
    python = os.path.abspath(shutil.which(options.torch_python) or options.torch_python)
    command = checkout_command(options, python)
    torch_device = find_torch(options, size, python) if options.pytorch else None
    if not (command or torch_device):
        raise Mistake("Without PyTorch there is nothing to compare with: give --checkout.")

    before = run_ours(size)
    device = before["device"]
    opponents = {}
    if torch_device:
        if torch_device != device:
            raise Mistake(f"train_gpt.py ran on {device}, but PyTorch finds {torch_device}.")
        opponents["GPT-2 small in PyTorch"] = run_pytorch(python, options.torch_batch_size, size)
    if command:
        name = options.checkout.resolve().name
        opponents[name] = run_checkout(options, command)
    after = run_ours(size)

    slower = min(before["tokens_per_s"], after["tokens_per_s"])
    for side in opponents.values():
        side["ratio"] = slower / side["tokens_per_s"]
    sides = {"train_gpt.py, before": before, **opponents, "train_gpt.py, after": after}
    for side in sides.values():
        flops = side.get("flops_per_token")
        side["mfu"] = flops and utilization(side["tokens_per_s"], flops, device, num_devices=1)
    print_table(device, sides)
    words = ["gpu_vs_pytorch", *([name] if command else []), *["tiny"] * options.tiny]
    figures = {"device": device, "before": before, "after": after, "opponents": opponents}
    save("_".join(words), figures)


def checkout_command(options: Options, python: str) -> list[str]:
    """The words of --checkout-command; none without a checkout."""
    try:
        command = shlex.split(options.checkout_command)
    except ValueError as error:
        raise Mistake(f"--checkout-command cannot be read ({error}).") from error
    if bool(options.checkout) != bool(command):
        raise Mistake("--checkout and --checkout-command need each other: give both or neither.")
    if options.checkout and not options.checkout.is_dir():
        raise Mistake(f"There is no folder {options.checkout}: give --checkout the path of one.")
    return [python if word == "python" else word for word in command[:1]] + command[1:]


def find_torch(options: Options, size: Size, python: str) -> str:
    """The device that PyTorch finds; Mistake if there is no PyTorch, no GPU or no whole batch."""
    rows, T = options.torch_batch_size, size.sequence_length
    if rows < 1 or size.tokens_per_step % (rows * T):
        raise Mistake(
            f"{rows} rows of {T:,} tokens do not divide the {size.tokens_per_step:,} tokens of a "
            "step: change --torch-batch-size."
        )
    probe = {"env": one_gpu(), "text": True, "capture_output": True, "check": True}
    try:
        device = subprocess.run([python, "-c", TORCH_DEVICE], **probe).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "").strip() or str(error)
        raise Mistake(
            f"{python} cannot import PyTorch ({reason.splitlines()[-1]}): install it there "
            "(pip install torch), name a Python that has it (--torch-python), or go without "
            "(--no-pytorch)."
        ) from error
    if device == "cpu" and not options.tiny:
        raise Mistake(f"PyTorch of {python} finds no GPU; only --tiny compares on a CPU.")
    return device


def run_ours(size: Size) -> Figures:
    """train_gpt.py, in a new folder with shards of random tokens."""
    T, steps = size.sequence_length, size.warm_up + size.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for split, tokens in (("train", steps * size.tokens_per_step), ("val", T)):
            write_shard(folder / f"{split}.bin", rng.integers(50257, size=tokens + 1))
        arguments = (
            "--preset baseline --train-files train.bin --val-files val.bin --val-loss-every 0 "
            f"--val-tokens {T} --sample-tokens 0 --run-name jax --num-steps {steps} "
            f"--sequence-length {T} --total-batch-size {size.tokens_per_step} {size.ours}"
        )
        run([sys.executable, str(ROOT / "train_gpt.py"), *arguments.split()], folder)
        made = folder / "runs" / "jax"
        metrics = [json.loads(x) for x in (made / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((made / "config.json").read_text())
        headline = (made / "log.txt").read_text().splitlines()[0]
    device = re.search(r"\| 1 x ([^|]*[^| ])", headline)
    if not device:
        raise Mistake(f"train_gpt.py must run on one device: {headline}")
    milliseconds = statistics.median(1e3 * m["step_time_s"] for m in metrics[size.warm_up :])
    figures = step_figures(milliseconds, config["total_batch_size"])
    flops = flops_per_token(checked(config["model"], GPTConfig), config["sequence_length"])
    return figures | {"flops_per_token": flops, "device": device[1]}


def run_pytorch(python: str, batch_size: int, size: Size) -> Figures:
    """torch_gpt2.py, in a Python that has PyTorch."""
    arguments = (
        f"--total-batch-size {size.tokens_per_step} --sequence-length {size.sequence_length} "
        f"--batch-size {batch_size} --warm-up {size.warm_up} --steps {size.steps} {size.pytorch}"
    )
    script = str(ROOT / "benchmarks" / "torch_gpt2.py")
    output = run([python, script, *arguments.split()], ROOT)
    figures = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    L, D, T, V = (figures[k] for k in ("layers", "width", "sequence_length", "vocabulary"))
    return figures | {"flops_per_token": gpt2_flops_per_token(L, D, T, V)}


def gpt2_flops_per_token(L: int, D: int, T: int, V: int) -> float:
    """What a token costs in GPT-2, counted as nanogpt.devices.hardware.flops_per_token does."""
    weights = L * 12 * D**2 + V * D  # 4D² of attention and 8D² of the MLP in a layer; the head
    keys = (T + 1) / 2  # that a query sees, on average
    return 6 * weights + 6 * 2 * D * keys * L


def run_checkout(options: Options, command: list[str]) -> Figures:
    """The user's command in the checkout, by what it prints."""
    output = run(command, options.checkout)
    milliseconds = step_milliseconds(output)
    tokens = options.checkout_tokens_per_step or tokens_per_step(output)
    if milliseconds and tokens:
        git = ["git", "-C", str(options.checkout), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, text=True, capture_output=True).stdout.strip()
        return step_figures(milliseconds, tokens) | {"checkout_commit": commit or None}
    missing = "tokens per step (give --checkout-tokens-per-step)"
    if not milliseconds:
        missing = "step's time in the form of nanoGPT or modded-nanogpt"
    raise Mistake(f"{shlex.join(command)} printed no {missing}; its output ends:", output)


def step_milliseconds(output: str) -> float | None:
    """The time of a step by nanoGPT's or modded-nanogpt's lines; None if there are none."""
    # iter 10: loss 9.1234, time 123.45ms, mfu 30.00%
    times = [float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", output, re.M)]
    if times:
        return statistics.median(times[len(times) // 2 :])
    # step:20/1000 train_time:987ms step_avg:98.70ms, with nan in the first steps of old versions
    averages = re.findall(r"^step:[1-9]\d*/\d+ .*step_avg:([\d.]+)ms", output, re.M)
    return float(averages[-1]) if averages else None


def tokens_per_step(output: str) -> int | None:
    """What nanoGPT prints at its start; None if that is not there."""
    found = re.search(r"^tokens per iteration will be: ([\d,]+)$", output, re.M)
    return int(found[1].replace(",", "")) if found else None


def step_figures(milliseconds: float, tokens: int) -> Figures:
    """A step's time and size, and the rate."""
    rate = 1e3 * tokens / milliseconds
    return {"tokens_per_s": rate, "ms_per_step": milliseconds, "tokens_per_step": tokens}


def run(command: list[str], folder: Path) -> str:
    """The output of `command`, shown as it comes; Mistake if it cannot run or fails."""
    print("\n$", shlex.join(command), flush=True)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        process = subprocess.Popen(command, cwd=folder, env=one_gpu(), errors="replace", **pipe)
    except OSError as error:
        raise Mistake(f"{command[0]} cannot be run ({error.strerror}).") from error
    output = ""
    with process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output += line
    if process.returncode:
        status = process.returncode
        raise Mistake(f"{shlex.join(command)} ended with status {status}; its output ends:", output)
    return output


def one_gpu() -> dict[str, str]:
    """This environment with its first GPU alone, so that all sides have the same one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | {"CUDA_VISIBLE_DEVICES": first, "PYTHONUNBUFFERED": "1"}


def print_table(device: str, sides: dict[str, Figures]) -> None:
    """A line per side; the ratio is our tokens/s over theirs."""
    print(f"\n{device:26}{'ms/step':>10}{'tokens/s':>12}{'FLOPs/token':>13}{'MFU':>8}{'ratio':>8}")
    for name, side in sides.items():
        columns = (("flops_per_token", 13, ".3g"), ("mfu", 8, ".1%"), ("ratio", 8, ".2f"))
        print(
            f"{name:26}{side['ms_per_step']:10.1f}{side['tokens_per_s']:12,.0f}"
            + "".join(f"{side[k]:{w}{f}}" if side.get(k) else " " * w for k, w, f in columns)
        )


if __name__ == "__main__":
    sys.exit(main())
