"""The planned rows per pass and memory of a run on GPUs and TPUs.

    python3 -m benchmarks.compiled.plans

It prints the tables of docs/gpu.md and docs/tpu.md in seconds: nothing is compiled or measured.
GPUs that cannot multiply bfloat16 train in float32, without flash attention.
"""

import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.command import run

if TYPE_CHECKING:
    from nanogpt.config import AttentionKernel
    from nanogpt.training.plan import Hardware

PRESETS = "speedrun", "baseline", "gpt2-medium"
GIGABYTES = 8, 12, 16, 24, 40, 48, 80, 141  # of GPUs
OLD = {"T4, 16 GB": 16, "V100, 32 GB": 32}  # GPUs without bfloat16
USABLE = 0.9  # of a GPU's memory, as train_gpt.py tells JAX


@dataclass(frozen=True)
class Options:
    """Print the planned rows per pass and memory on GPUs and TPUs."""


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    return run(Options, print_tables, arguments)


def print_tables(_: Options) -> None:
    """Print the tables in Markdown.

    * means that layers are recomputed in the backward pass, and † that parameters are sharded.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from benchmarks.compiled.for_tpu import CHIPS
    from nanogpt.training.plan import Hardware

    gpus = {f"{n} GB": Hardware("GPU", 1, 1, USABLE * n * 1e9) for n in GIGABYTES}
    tpus = {
        f"{count} x TPU {chip}": Hardware(f"TPU {chip}", count, 1, facts.memory)
        for chip, facts in CHIPS.items()
        for count in (1, 8)
    }
    old = {name: Hardware("GPU", 1, 1, USABLE * n * 1e9, bfloat16=False) for name, n in OLD.items()}
    for kernel, devices in (("pallas", gpus), ("xla", old), ("splash", tpus)):
        names = " | ".join(f"`{name}`" for name in PRESETS)
        print(f"\n| device | usable GB | {names} |\n|---|---|{'---|' * len(PRESETS)}")
        for name, hardware in devices.items():
            cells = " | ".join(cell(preset, hardware, kernel) for preset in PRESETS)
            print(f"| {name} | {hardware.memory / 1e9:.1f} | {cells} |")


def cell(preset: str, hardware: "Hardware", kernel: "AttentionKernel") -> str:
    """Return the rows per pass and device, and their memory."""
    import train_gpt
    from benchmarks.compiled.for_tpu import NO_DATA
    from nanogpt.training.plan import make_plan

    hp = train_gpt.PRESETS[preset]
    if not hardware.bfloat16:
        hp = replace(hp, dtype="float32")
    plan = make_plan(hp, hardware, NO_DATA, kernel, "")
    total = plan.device_state_bytes + plan.working_bytes + plan.activation_bytes
    if total > hardware.memory:
        return f"does not fit ({total / 1e9:.1f} GB)"
    marks = "\\*" * plan.kernels.rematerialize + "†" * plan.shard_params
    return f"{plan.batch_size}{marks}, {total / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
