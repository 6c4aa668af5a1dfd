"""The training step on one GPU: this project against PyTorch, on the same device in one run.

    python3 -m benchmarks.gpu.against_pytorch --torch-python PYTHON
    python3 -m benchmarks.gpu.against_pytorch --torch-python PYTHON --checkout NANOGPT
        --checkout-command "python train.py config/train_gpt2.py --wandb_log=False --log_interval=1
        --max_iters=30 --eval_iters=1 --batch_size=64 --gradient_accumulation_steps=8"

Every side runs in its own process, one after the other: train_gpt.py, PyTorch, the checkout if one
is given, then train_gpt.py again, which reveals any drift of the device. The ratios use the slower
of the two runs of train_gpt.py.

    train_gpt.py    the baseline preset as a user runs it, on shards of random tokens, including
                    the time to read them: the median of `step_time_s` without the first steps
    PyTorch         GPT-2 small trained as in nanoGPT (torch_gpt2.py), with the tokens on the GPU
    checkout        any command in a checkout of nanoGPT or modded-nanogpt, by the times it prints:
                    the median of nanoGPT's last half, or modded-nanogpt's last step_avg

The models differ. Both have 12 layers of width 768 and a head of 50,304 rows, and so the same
matmuls. Ours has 6 heads of 128, rotary positions, query-key norm, relu², the value residual, skips
and an untied, soft-capped head, and is trained with Muon and Adam; GPT-2 has 12 heads of 64,
learned positions, LayerNorm, GELU, biases and a tied head, and is trained with AdamW. The table
therefore also gives model FLOPs per token and, if the device's peak is known, their utilization
(MFU). A checkout may train any model, so its FLOPs are left out.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import Mistake, run
from benchmarks.gpu.sides import (
    FULL,
    TINY,
    Figures,
    Size,
    one_gpu,
    run_checkout,
    run_ours,
    run_pytorch,
)
from benchmarks.results import save
from nanogpt.devices.hardware import utilization

TORCH_DEVICE = (
    "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
)


@dataclass(frozen=True)
class Options:
    """Compare the training step with PyTorch's on one GPU."""

    torch_python: Path = Path(sys.executable)
    """A Python that has PyTorch."""
    pytorch: bool = True
    """Measure GPT-2 small in PyTorch."""
    torch_batch_size: int = 64
    """Rows per forward and backward pass in PyTorch."""
    checkout: Path | None = None
    """A checkout of nanoGPT or modded-nanogpt to measure as well."""
    checkout_command: str = ""
    """Command to run in that folder; `python` as its first word stands for --torch-python."""
    checkout_tokens_per_step: int | None = None
    """Tokens per optimizer step of that command; required unless it prints them as nanoGPT does."""
    tiny: bool = False
    """Use sizes so small that a CPU takes seconds: to test this script, not to measure."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Check the options, measure all sides, print a table and save the figures."""
    size = TINY if options.tiny else FULL
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
        tokens = options.checkout_tokens_per_step
        opponents[name] = run_checkout(options.checkout, command, tokens)
    after = run_ours(size)

    slower = min(before["tokens_per_s"], after["tokens_per_s"])
    for side in opponents.values():
        side["ratio"] = slower / side["tokens_per_s"]
    sides = {"train_gpt.py, before": before, **opponents, "train_gpt.py, after": after}
    for side in sides.values():
        flops = side.get("flops_per_token")
        side["mfu"] = flops and utilization(side["tokens_per_s"], flops, device, num_devices=1)
    print_table(device, sides)
    figures = {"device": device, "before": before, "after": after, "opponents": opponents}
    save("_".join(["gpu_vs_pytorch", *([name] if command else [])]), figures, options.tiny)


def checkout_command(options: Options, python: str) -> list[str]:
    """Return the words of --checkout-command; empty without a checkout."""
    try:
        command = shlex.split(options.checkout_command)
    except ValueError as error:
        raise Mistake(f"--checkout-command cannot be read ({error}).") from error
    if bool(options.checkout) != bool(command):
        raise Mistake("Give both --checkout and --checkout-command, or neither.")
    if options.checkout and not options.checkout.is_dir():
        raise Mistake(f"{options.checkout} is not a folder: give the path of a checkout.")
    return [python if word == "python" else word for word in command[:1]] + command[1:]


def find_torch(options: Options, size: Size, python: str) -> str:
    """Return the device PyTorch finds; Mistake if it or a GPU is missing, or batches do not fit."""
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
            "(pip install torch), give a Python that has it (--torch-python), or leave it out "
            "(--no-pytorch)."
        ) from error
    if device == "cpu" and not options.tiny:
        raise Mistake(f"PyTorch in {python} finds no GPU; on a CPU only --tiny works.")
    return device


def print_table(device: str, sides: dict[str, Figures]) -> None:
    """Print a line per side; the ratio is our tokens/s over theirs."""
    print(f"\n{device:26}{'ms/step':>10}{'tokens/s':>12}{'FLOPs/token':>13}{'MFU':>8}{'ratio':>8}")
    for name, side in sides.items():
        columns = (("flops_per_token", 13, ".3g"), ("mfu", 8, ".1%"), ("ratio", 8, ".2f"))
        print(
            f"{name:26}{side['ms_per_step']:10.1f}{side['tokens_per_s']:12,.0f}"
            + "".join(f"{side[k]:{w}{f}}" if side.get(k) else " " * w for k, w, f in columns)
        )


if __name__ == "__main__":
    sys.exit(main())
