"""GPT-2 small's step in PyTorch, compared with that of train_gpt.py's baseline preset."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from benchmarks.gpu.rows import Figures, Unmeasured
from benchmarks.gpu.sections import Context, Job
from benchmarks.gpu.sides import FULL, TINY, run_pytorch


def jobs(context: Context) -> Iterator[Job]:
    """Yield GPT-2 small with torch.compile."""
    yield "GPT-2 small in PyTorch", partial(measure, context)


def need_torch() -> None:
    """Raise Unmeasured if this Python has no PyTorch."""
    if not find_spec("torch"):
        raise Unmeasured("This section needs PyTorch: pip install torch")


def measure(context: Context) -> Figures:
    """Measure its rate, and the ratio of ours to it."""
    need_torch()
    size = TINY if context.tiny else replace(FULL, warm_up=3, steps=8)
    found = run_pytorch(sys.executable, 2 if context.tiny else 64, size)
    ours = context.row("steps", "baseline").get("tokens_per_s")
    kept = ("ms_per_step", "tokens_per_s", "first_step_s", "peak_memory_bytes", "torch", "device")
    return {name: found[name] for name in kept} | {
        "ms": found["ms_per_step"],
        "ours_over_it": ours and ours / found["tokens_per_s"],
    }
