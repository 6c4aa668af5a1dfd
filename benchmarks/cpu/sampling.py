"""Tokens per second in sampling, and the limit given by memory bandwidth.

    python3 -m benchmarks.cpu.sampling

A new model of a preset's size continues texts that nearly fill its context, one and 32 at a time.
For comparison, it makes one pass over the whole text per token, as in decoding without a cache. The
floor is the time to read every matrix and the visible keys and values once per step, at the rate at
which the same machine sums one large array.
"""

import sys
from dataclasses import asdict, dataclass, replace
from typing import Literal

from benchmarks.command import Mistake, check_positive, run
from benchmarks.results import save


@dataclass(frozen=True)
class Options:
    """Measure how fast a model generates text."""

    preset: str = "baseline"
    """Preset of train_gpt.py with the model to use."""
    context: int = 1024
    """Final number of tokens of each text."""
    batches: tuple[int, ...] = (1, 32)
    """Numbers of texts at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""
    rounds: int = 3
    """Each figure is the best of this many."""
    tiny: bool = False
    """One short text and a layer of the laptop preset: a test of this script, not of the speed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Measure, print a table, and save the figures."""
    check_positive(options, "batches", "rounds")
    from train_gpt import PRESETS

    if options.preset not in PRESETS:
        raise Mistake(f"There is no preset {options.preset}: choose from {', '.join(PRESETS)}.")
    import jax

    from benchmarks.cpu.decoding import STEPS, measure, new_model

    hp, how = PRESETS[options.preset], {}
    if options.tiny:
        hp, how = PRESETS["laptop"], {"numbers_added": 2**20}
        hp = replace(hp, model=replace(hp.model, num_layers=1, value_embeddings=1))
        options = replace(options, preset="laptop", context=STEPS + 16, batches=(1,), rounds=1)
    if options.context <= STEPS:
        raise Mistake(f"--context must be above {STEPS}, not {options.context}.")
    graph, params = new_model(hp)
    print(f"{jax.devices()[0].device_kind}, {options.preset}, {options.dtype}")
    how |= {"context": options.context, "dtype": options.dtype, "rounds": options.rounds}
    rows = [measure(graph, params, batch, **how) for batch in options.batches]
    # The best of all: other load on the machine must not raise the floor.
    bandwidth = max(row["bandwidth_gb_per_s"] for row in rows)
    print("batch  ms a step  tokens/s  whole passes  faster  floor ms  of the floor's speed")
    for row in rows:
        row["floor_ms"] = row["bytes_per_step"] / bandwidth / 1e6
        row["of_floor"] = row["floor_ms"] / row["ms"]
        print(
            f"{row['batch']:5} {row['ms']:10.2f} {row['tokens_per_s']:9,.0f}"
            f" {row['whole_ms']:10,.0f} ms {row['faster']:6.0f}x"
            f" {row['floor_ms']:9.2f} {row['of_floor']:12.0%}"
        )
    device = "cpu" if jax.default_backend() == "cpu" else "gpu"
    chosen = asdict(options)
    tiny = chosen.pop("tiny")
    save(f"sampling_{device}_{options.preset}", chosen | {"rows": rows}, tiny)


if __name__ == "__main__":
    sys.exit(main())
