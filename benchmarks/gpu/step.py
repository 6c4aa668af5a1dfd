"""The time of one optimizer step on this device: by variant, by part, and its lower bound.

    python3 -m benchmarks.gpu.step
    python3 -m benchmarks.gpu.step --stage 1 --trace FOLDER

A run takes a few minutes. With a stage of the `speedrun` preset on random tokens, it measures

    steps       the whole step of train_gpt.py, and variants with one change each: the kernel of
                attention or loss, the precision of the head, the rows per micro-batch, the
                optimizer of the matrices, one target instead of several, no document mask, and
                cuDNN's attention, which has none; then the fastest of each combined, and the base
                again, which reveals any drift of the device
    products    every matmul of a micro-batch, forward and backward
    attention   one layer of a micro-batch, forward and backward: by kernel and window, within
                documents, and over all documents
    loss        head and loss of a micro-batch, forward and backward
    optimizer   the update and its parts: a mean over steps with and without Adam
    parts       computed from these: each part's share of the step, and its floor

If a measurement fails, or its result disagrees with XLA's, its row says so and the others continue.
The figures are saved after every row.

Parts are timed in a loop on the device, which adds two or three kernels of a few microseconds to
each round: up to a few percent of the smallest matmul. Of the parts, "loss" is the section of that
name minus the matmuls with the head, because a single function computes both, and "rest" (norms,
residuals, embeddings, gaps) is the step minus all other parts.

The floor of a part is the time for what it must compute or move at the data sheet's peak rates:

    products, attention   2 FLOPs per multiplication that is mathematically needed, and twice as
                          much backward; in attention only what causality and windows leave visible
    loss                  the logits read once and their gradient written once, 2 bytes each
    optimizer             weights, moments and Adam's accumulated gradients read and written, and
                          gradients read, 4 bytes each, then the FLOPs of Muon's orthogonalization
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.command import Mistake, run
from benchmarks.results import save

if TYPE_CHECKING:
    from benchmarks.gpu.rows import Figures


@dataclass(frozen=True)
class Options:
    """Time the optimizer step of the speedrun preset, its variants and its parts."""

    stage: Literal[1, 2, 3, 4] = 3
    """Stage of the preset; the third has the largest batch."""
    trace: Path | None = None
    """Folder for a profile of three steps, to view in XProf or Perfetto."""
    tiny: bool = False
    """Use sizes so small that a CPU takes seconds: to test this script, not to measure."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def measure(options: Options) -> None:
    """Measure everything, print tables, and save the figures."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # as train_gpt.py does
    import jax

    from benchmarks.gpu.measurement import measure_all
    from benchmarks.gpu.variants import FULL, TINY, stage_alone
    from nanogpt.devices.compilation import use_compilation_cache

    if jax.default_backend() == "cpu" and not options.tiny:
        raise Mistake(
            'JAX finds no GPU, only a CPU, which would take hours: pip install -e ".[cuda12]" '
            "installs what a GPU needs; to test the script here, use --tiny."
        )
    use_compilation_cache()
    size = TINY if options.tiny else FULL
    figures = measure_all(replace(size, hp=stage_alone(size.hp, options.stage - 1)), options)
    print_tables(figures)
    save(f"gpu_step_stage_{options.stage}", figures, options.tiny)


RATES = {"ms": ",.3f", "tflops": ",.1f", "of_peak": ".1%"}
STEPS = {"ms": ",.1f", "tokens_per_s": ",.0f", "mfu": ".1%", "ratio": ".3f"}
COLUMNS = {  # of each table, with their formats
    "steps": STEPS | {"compile_s": ".1f", "memory_GB": ".1f", "peak_GB": ".1f"},
    "products": RATES,
    "attention": RATES,
    "loss": {"ms": ",.3f"},
    "optimizer": RATES,
    "parts": {"ms": ",.1f", "floor_ms": ",.1f", "of_step": ".1%"},
}


def print_tables(figures: "Figures") -> None:
    """Print all sections; "unknown": not reported by the device or its data sheet."""

    def cell(found: "Figures", column: str, style: str) -> str:
        if column not in found:
            return ""
        return "unknown" if found[column] is None else format(found[column], style)

    for section, columns in COLUMNS.items():
        print(f"\n{section:44}" + "".join(f"{column:>14}" for column in columns))
        for row, found in figures[section].items():
            cells = "".join(f"{cell(found, *column):>14}" for column in columns.items())
            print(f"{row:44}{found.get('failed') or cells}")


if __name__ == "__main__":
    sys.exit(main())
