"""GPT-2 small's training step in PyTorch, for against_pytorch.py; runs in any Python with PyTorch.

    python3 -m benchmarks.gpu.torch_gpt2    # the last line of its output has the figures, as JSON

It trains as nanoGPT does on a GPU: compiled, flash attention, bfloat16 autocast over float32
weights, TF32 elsewhere, gradients summed over micro-batches and clipped to norm 1, fused AdamW.
The tokens are random, the same in every step, and already on the device: reading is not timed.
With --train-file and --val-file, shards in llm.c's format, it trains on those instead, with a
learning rate schedule, and reports `losses` and `val_loss`.
Without a GPU it runs on the CPU, without compilation.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The settings of training and timing. Each is a command-line option."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    sequence_length: int = 1024
    batch_size: int = 64
    total_batch_size: int = 524_288
    warm_up: int = 5
    steps: int = 20
    train_file: str = ""
    val_file: str = ""
    val_tokens: int = 1_048_576


MEANINGS = {
    "layers": "layers, L",
    "heads": "heads, N",
    "width": "width, D",
    "sequence_length": "tokens per row, T",
    "batch_size": "rows per forward and backward pass, B",
    "total_batch_size": "tokens per optimizer step",
    "warm_up": "steps before timing starts; the first one compiles",
    "steps": "timed steps",
    "train_file": "shard to train on; none: random tokens",
    "val_file": "shard for the validation loss after the last step",
    "val_tokens": "number of its tokens to use",
}


def main(arguments: list[str] | None = None) -> int:
    """Train for a few steps, print one line of JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu.torch_gpt2",
        description="Time GPT-2 small's training step in PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        parser.add_argument(option, type=kind, default=field.default, help=MEANINGS[field.name])
    settings = Settings(**vars(parser.parse_args(arguments)))
    if min(value for value in asdict(settings).values() if isinstance(value, int)) < 1:
        parser.error("every option must be at least 1")
    if settings.total_batch_size % (settings.batch_size * settings.sequence_length):
        parser.error("total-batch-size must be a multiple of batch-size * sequence-length")
    if not find_spec("torch"):
        print("This benchmark needs PyTorch: pip install torch", file=sys.stderr)
        return 2
    print(json.dumps(measure(settings) | asdict(settings)))
    return 0


def measure(settings: Settings) -> dict[str, Any]:
    """Train, and return the figures."""
    import torch

    from benchmarks.gpu.torch_model import GPT2, VOCABULARY

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32
    shape = settings.layers, settings.width, settings.heads, settings.sequence_length
    model = GPT2(*shape).to(device)
    step = make_step(model, settings, device)
    seconds, losses = [], []
    for number in range(settings.warm_up + settings.steps):
        started = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[settings.warm_up :])
    return {
        "tokens_per_s": settings.total_batch_size / median,
        "ms_per_step": 1e3 * median,
        "first_step_s": seconds[0],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": losses if settings.train_file else None,
        "val_loss": validation_loss(model, settings, device) if settings.val_file else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": VOCABULARY,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def rows_of(file: str, first: int, rows: int, T: int, device: str) -> tuple[Any, Any]:
    """Return inputs and targets of consecutive rows of a shard, from number `first` on."""
    import numpy as np
    import torch

    span = slice(first * T, (first + rows) * T + 1)
    tokens = np.memmap(file, "<u2", mode="r", offset=1024)[span].astype(np.int64)
    tokens = torch.from_numpy(tokens).to(device)
    return tokens[:-1].view(rows, T), tokens[1:].view(rows, T)


def validation_loss(model: Any, settings: Settings, device: str) -> float:
    """Return the mean loss on the first tokens of the validation shard."""
    import torch

    B, T = settings.batch_size, settings.sequence_length
    losses = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for first in range(0, settings.val_tokens // T, B):
            losses.append(model(*rows_of(settings.val_file, first, B, T, device)).item())
    return statistics.mean(losses)


def make_step(model: Any, settings: Settings, device: str) -> Callable[[int], float]:
    """Build `step(number)`, which trains one step, counted from 0, and returns its loss."""
    import torch

    B, T = settings.batch_size, settings.sequence_length
    Ng = settings.total_batch_size // (B * T)
    loss_of = torch.compile(model) if device == "cuda" else model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(50257, (Ng, B, T + 1), device=device)
    inputs, targets = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()

    last = settings.warm_up + settings.steps - 1

    def step(number: int) -> float:
        total, batch = torch.zeros((), device=device), zip(inputs, targets, strict=True)
        if settings.train_file:
            at = range(number * Ng * B, (number + 1) * Ng * B, B)
            batch = (rows_of(settings.train_file, first, B, T, device) for first in at)
            for group in optimizer.param_groups:  # warmup in the first tenth, decay to a tenth
                rise, fall = (number + 1) / (0.1 * last + 1), 1 - 0.9 * number / max(1, last)
                group["lr"] = 6e-4 * min(rise, fall)
        for x, y in batch:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(x, y) / Ng
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()  # waits for all of the above: the device executes in order

    return step


if __name__ == "__main__":
    sys.exit(main())
