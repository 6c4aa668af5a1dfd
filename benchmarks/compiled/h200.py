"""The training step as compiled for H200s, on a machine without GPUs.

    python3 -m benchmarks.compiled.h200

XLA compiles for a device's description as it does for a real device, with two exceptions: it does
not autotune matmuls, and cuDNN does not plan its kernels. So this shows what a step computes, keeps
in memory, moves and communicates, not how fast it is. The tests read the same program.

The steps are those of the `speedrun` preset's stages and of the `baseline` preset, on one H200 and
on eight, and of the third stage with other kernels, among them cuDNN's attention, which has no
document mask. This takes a quarter of an hour.

It needs JAX's CUDA plugin, but no driver: pip install -e ".[gpu-compiler]"
"""

import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.command import require, run
from benchmarks.results import save

if TYPE_CHECKING:
    from jax.stages import Compiled

    from benchmarks.compiled.program import Instruction
    from nanogpt.config import GPTConfig, Kernels
    from train_gpt import Hyperparameters

    Step = tuple[Hyperparameters, int, Kernels]  # stage counted from 0


@dataclass(frozen=True)
class Options:
    """Analyse the training step as compiled for H200s, on a machine without GPUs."""

    tiny: bool = False
    """Use one step of the baseline preset with one layer: to test this script."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def use_gpu_compiler() -> None:
    """Let XLA compile for GPUs while JAX itself runs on the CPU; Mistake if it cannot."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    require("JAX's CUDA plugin", "gpu-compiler", "jax_cuda12_plugin", "jax_cuda13_plugin")


def measure(options: Options) -> None:
    """Print and save what each step keeps, moves and communicates."""
    use_gpu_compiler()
    from benchmarks.compiled.for_h200 import TOKENS

    steps = tiny_steps() if options.tiny else all_steps()
    figures = {name: read(name, step) for name, step in steps.items()}
    saved = {"tokens_per_micro_batch": TOKENS, "steps": figures}
    save("h200_compiled", saved, options.tiny)


def all_steps() -> dict[str, "Step"]:
    """Return the speedrun's stages, the baseline, and the third stage with other kernels."""
    from benchmarks.cpu.pieces import PIECES
    from nanogpt.config import Kernels
    from train_gpt import PRESETS

    speedrun, cudnn, own = PRESETS["speedrun"], Kernels("cudnn"), Kernels("pallas")
    unmasked = PIECES["document mask"](speedrun)
    return {
        **{f"stage {s + 1}": (speedrun, s, own) for s in range(len(speedrun.stages))},
        "baseline": (PRESETS["baseline"], 0, cudnn),
        "stage 3, one-pass loss": (speedrun, 2, Kernels("pallas", "pallas")),
        "stage 3, one-pass loss, FP8 head": (speedrun, 2, Kernels("pallas", "pallas", True)),
        "stage 3, without document mask": (unmasked, 2, own),
        "stage 3, without document mask, cuDNN": (unmasked, 2, cudnn),
    }


def tiny_steps() -> dict[str, "Step"]:
    """Return a single step that compiles in seconds."""
    hp, stage, kernels = all_steps()["baseline"]
    return {"tiny": (replace(hp, model=replace(hp.model, num_layers=1)), stage, kernels)}


def read(name: str, step: "Step") -> dict[str, Any]:
    """Compile a step; print and return its figures."""
    from benchmarks.compiled.collectives import collectives
    from benchmarks.compiled.for_h200 import TOKENS, compile_stage
    from benchmarks.compiled.program import Program
    from nanogpt.devices.compilation import memory_of

    alone, one_of_8 = compile_stage(*step), compile_stage(*step, num_devices=8)
    program = Program(one_of_8)
    sent = {kind: len(found) for kind, found in collectives(program).items()}
    in_loops = sum(len(found) for x in program.loops() for found in collectives(x).values())
    kept = alone.memory_analysis().temp_size_in_bytes / TOKENS / 1e3
    moved = moved_by_part(alone, step[0].model, TOKENS)
    print(f"\n{name}: {memory_of(alone) / 1e9:.1f} GB; eight GPUs: {sent}, {in_loops} in loops")
    print(f"kept: {kept:.0f} kB per token; moved, in kB per token:")
    for part in sorted(moved):
        print(f"{moved[part]:10.0f}  {part}")
    print(f"{sum(moved.values()):10.0f}  in all")
    return {
        "memory_GB": memory_of(alone) / 1e9,
        "memory_of_one_of_8_GB": memory_of(one_of_8) / 1e9,
        "collectives_of_8": sent,
        "collectives_of_8_in_loops": in_loops,
        "kept_kB_per_token": kept,
        "moved_kB_per_token": moved,
    }


def part_of(kernel: "Instruction", scope: dict[str, "Instruction"], config: "GPTConfig") -> str:
    """Return the part of the step that a kernel belongs to."""
    V, D, buckets = config.padded_vocab_size, config.width, config.bigram_buckets
    C = config.bigram_width or D
    shapes = " ".join([kernel.shape, *(scope[name].shape for name in kernel.operands)])
    logits = re.search(rf"\b\w+\[(\d+,)?\d{{4,}},{V}\]", shapes)
    if "fmha" in kernel.attributes or "flash_attention" in kernel.attributes:
        return "attention"
    if "gemm" in kernel.attributes or "__cublas" in kernel.attributes or kernel.opcode == "dot":
        return "products with the head" if logits else "products of the layers"
    if logits:
        return "loss"
    if re.search(rf"\[(\d+,)?({V},{D}|{buckets},{C}|{D},{V})\]", kernel.shape):
        return "gradients of tables and head"
    return "elementwise, norms, embeddings"


def moved_by_part(compiled: "Compiled", config: "GPTConfig", tokens: int) -> dict[str, float]:
    """Return the kB per token that each part of a micro-batch moves; `tokens` is its size."""
    from benchmarks.compiled.program import Program

    program, moved = Program(compiled), defaultdict(float)
    for kernel in program.loops()[0]:  # a micro-batch; the other loops are Muon's
        part = part_of(kernel, program.computations[kernel.computation], config)
        moved[part] += program.bytes_moved(kernel) / tokens / 1e3
    return dict(moved)


if __name__ == "__main__":
    sys.exit(main())
