"""Bytes per token of the speedrun's step, as compiled for an H200, and each ingredient's share.

    python3 -m benchmarks.compiled.recipe_bytes

They are read from the program that XLA compiles for an H200's description (see h200.py), not timed.
Every step has two micro-batches of one row. There are two figures per token of a micro-batch:

    kept     memory the program needs besides its input, at its peak
    moved    bytes that the kernels of a micro-batch read and write, if nothing stays in a cache

Both have a part that does not grow with the tokens: the gradients of all parameters, in float32,
which are kept, and added to in every micro-batch. Its share is large with one row, and small with
the several rows that fit an H200; `rows` is the number of rows of a figure. The steps are those of
the stages, and of the first stage, which has three targets, with one ingredient removed at a time,
as in benchmarks/cpu/pieces.py. It needs what h200.py needs, and takes about a quarter of an hour.
"""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.command import run
from benchmarks.compiled.h200 import moved_by_part, use_gpu_compiler
from benchmarks.results import save

if TYPE_CHECKING:
    from nanogpt.config import Kernels
    from train_gpt import Hyperparameters

    Case = tuple[Hyperparameters, int, Kernels, int]  # stage counted from 0; rows

INGREDIENTS = (  # of benchmarks/cpu/pieces.py
    "bigram table",
    "signs of bigrams",
    "value gates (but one share per layer)",
    "value tables of their own (but shared ones)",
    "smear",
    "key offset",
    "paired heads",
    "one source of late attentions",
    "logit rescale",
    "exclusive attention",
    "gated attention",
    "composed heads",
    "dynamic connections and all gates (but backout)",
    "document mask",
    "tied head",
    "several targets",
    "skips",
    "skips (but a U-net)",
)
ROWS = 4  # for comparison with one row, which shows what does not grow with the tokens


@dataclass(frozen=True)
class Options:
    """Read the bytes per token of the speedrun's step, as compiled for an H200."""

    tiny: bool = False
    """Use one step of a small model: to test this script."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def measure(options: Options) -> None:
    """Print and save the figures, after each step."""
    use_gpu_compiler()
    from nanogpt.runs.environment import environment

    began, figures = environment(), {}
    for name, case in (tiny_cases() if options.tiny else all_cases()).items():
        figures[name] = read(name, case)
        # After each, so that nothing is lost; the file itself makes later commits dirty.
        save("recipe_bytes", began | {"steps": figures}, options.tiny)


def all_cases() -> dict[str, "Case"]:
    """Return the stages, and the first one with one ingredient removed at a time."""
    from benchmarks.cpu.pieces import PIECES
    from nanogpt.config import Kernels
    from train_gpt import PRESETS

    hp, own = PRESETS["speedrun"], Kernels("pallas")
    without = {name: PIECES[name](hp) for name in INGREDIENTS}
    return {
        **{f"stage {s + 1}": (hp, s, own, 1) for s in range(len(hp.stages))},
        **{f"stage 1, without {name}": (less, 0, own, 1) for name, less in without.items()},
        "stage 1, without document mask, cuDNN": (
            *(without["document mask"], 0),
            *(Kernels("cudnn"), 1),
        ),
        f"stage 1, {ROWS} rows": (hp, 0, own, ROWS),
        f"stage 3, {ROWS} rows": (hp, 2, own, ROWS),
    }


def tiny_cases() -> dict[str, "Case"]:
    """Return a single step that compiles in seconds."""
    from nanogpt.config import Kernels
    from train_gpt import PRESETS

    hp = PRESETS["baseline"]
    return {"tiny": (replace(hp, model=replace(hp.model, num_layers=1)), 0, Kernels("cudnn"), 8)}


def read(name: str, case: "Case") -> dict[str, Any]:
    """Compile a step; print and return its figures."""
    from benchmarks.compiled.for_h200 import compile_stage
    from nanogpt.devices.compilation import memory_of

    hp, stage, kernels, rows = case
    tokens = rows * hp.schedule.row_length(stage)
    compiled = compile_stage(hp, stage, kernels, tokens=tokens)
    kept = compiled.memory_analysis().temp_size_in_bytes / tokens / 1e3
    moved = moved_by_part(compiled, hp.model, tokens)
    print(f"{name}: {kept:.0f} kB kept, {sum(moved.values()):.0f} kB moved per token", flush=True)
    return {
        "rows": rows,
        "attention": kernels.attention,
        "memory_GB": memory_of(compiled) / 1e9,
        "kept_kB_per_token": kept,
        "moved_kB_per_token": sum(moved.values()),
        "moved_kB_per_token_by_part": moved,
    }


if __name__ == "__main__":
    sys.exit(main())
