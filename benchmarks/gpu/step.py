"""How long one optimizer step takes on this device: by variant, by part, and what it could take.

    .venv/bin/python -m benchmarks.gpu.step
    .venv/bin/python -m benchmarks.gpu.step --stage 1 --trace FOLDER

One run of some minutes, with a stage of the `speedrun` preset on random tokens, measures

    steps       the whole step of train_gpt.py, and the same with one thing changed: the kernel of
                attention or loss, the precision of the head, the rows of a micro-batch, the rule
                of the matrices, one target where the stage has several, no document mask, and then
                cuDNN's attention, which has none; then the fastest of each together, and the first
                one again, so that a drift of the device shows
    products    every product of two matrices of a micro-batch, forward and backward
    attention   one layer of a micro-batch, forward and backward: by kernel and window, within
                documents, and over all documents
    loss        head and loss of a micro-batch, forward and backward
    optimizer   the update, and what it is made of: a mean over steps with and without Adam
    parts       from these: where the time of the step goes, and the floor of each part

What fails, or disagrees with XLA's results, says so in its row, and the rest goes on. The figures
are saved after every row.

What is timed alone runs in a loop on the device, which adds two or three kernels of some
microseconds to each round: up to some percent of the smallest product. Of the parts, "loss" is the
section of that name minus the products with the head, because the project has them in one function,
and "rest" (norms, residuals, embeddings, gaps) is the step minus all other parts.

The floor of a part is what it must compute or move, at the peak of the device's data sheet:

    products, attention   2 FLOPs per multiplication that the mathematics needs; backward twice what
                          is needed forward; of the attention only what causality and windows show
    loss                  the logits read once and their gradient written once, 2 bytes each
    optimizer             weights, momenta and what Adam gathers read and written, and gradients
                          read, 4 bytes each, then the FLOPs of Muon's polynomials
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
    """Which stage of the preset; the third has the largest batch."""
    trace: Path | None = None
    """Folder for a profile of three steps, to look at with XProf or Perfetto."""
    tiny: bool = False
    """Everything so small that a CPU takes seconds: a test of this script, not of the speed."""


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
            'JAX finds no GPU, only a CPU, where this would take hours: pip install -e ".[cuda12]" '
            "brings what it needs, and --tiny tries the script here."
        )
    use_compilation_cache()
    size = TINY if options.tiny else FULL
    figures = measure_all(replace(size, hp=stage_alone(size.hp, options.stage - 1)), options)
    print_tables(figures)
    save(f"gpu_step_stage_{options.stage}", figures, options.tiny)


RATES = {"ms": ",.3f", "tflops": ",.1f", "of_peak": ".1%"}
STEPS = {"ms": ",.1f", "tokens_per_s": ",.0f", "mfu": ".1%", "ratio": ".3f"}
COLUMNS = {  # of each table, and how they are written
    "steps": STEPS | {"compile_s": ".1f", "memory_GB": ".1f", "peak_GB": ".1f"},
    "products": RATES,
    "attention": RATES,
    "loss": {"ms": ",.3f"},
    "optimizer": RATES,
    "parts": {"ms": ",.1f", "floor_ms": ",.1f", "of_step": ".1%"},
}


def print_tables(figures: "Figures") -> None:
    """All sections; "unknown" is what the device, or its data sheet, does not tell."""

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
