"""One optimizer step of the laptop preset, with micro-batches of different sizes.

    python3 -m benchmarks.cpu.micro_batch

The arithmetic is the same, only accumulated over more or fewer micro-batches. The sizes alternate,
with three short runs of train_gpt.py each; the table gives the smallest of their median step times.
"""

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.command import run
from benchmarks.processes import median_step_s, train
from benchmarks.results import save
from benchmarks.timing import best_in_turn

ROWS = 32  # rows per step
SIZES = (32, 16, 8, 4, 2)  # rows per micro-batch
WARM_UP = 10  # steps
TINY = (
    "--sequence-length 8 --total-batch-size 256 --model.num-layers 1 --model.width 32 "
    "--model.mlp-width 64 --model.value-embeddings 0 --model.bigram-buckets 0"
)


@dataclass(frozen=True)
class Options:
    """Time the laptop preset's step with micro-batches of different sizes."""

    tiny: bool = False
    """One short run with one size and a smaller model: a test of this script only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Time each size, print a table, and save the figures."""
    sizes, rounds = (SIZES[:1], 1) if options.tiny else (SIZES, 3)
    settings = f"--num-steps {WARM_UP + 1} {TINY}" if options.tiny else "--num-steps 60"
    best = best_in_turn({size: partial(step_time, size, settings) for size in sizes}, rounds)
    for size, seconds in best.items():
        ratio = seconds / best[ROWS]
        print(f"{size:3} rows, Ng = {ROWS // size:2}: {1e3 * seconds:6.1f} ms{ratio:6.2f}")
    figures = {"ms_by_rows": {size: 1e3 * seconds for size, seconds in best.items()}}
    save("cpu_micro_batch", figures, options.tiny)


def step_time(size: int, settings: str) -> float:
    """Return the median seconds per step with `size` rows per micro-batch, after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (
            f"--preset laptop --batch-size {size} {settings} --val-loss-every 0 "
            "--val-tokens 1024 --sample-tokens 0"
        )
        return median_step_s(train(arguments, Path(folder), shown=False), WARM_UP)


if __name__ == "__main__":
    sys.exit(main())
