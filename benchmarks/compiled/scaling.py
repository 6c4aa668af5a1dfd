"""Communication when many H200s train together, and the scaling predicted from it.

    python3 -m benchmarks.compiled.scaling [--devices 8 64 512] [--sizes 124M 1.5B]

The real step is compiled for that many H200s, eight per host, on a machine without GPUs
(for_h200.py). Collectives, their bytes, and the memory of each device are read from the compiled
program. Times are PREDICTED from these, with published link speeds and an assumed utilization of
the GPU. Nothing is run.

It prints the tables of docs/scaling.md and plots docs/scaling.png, in about a quarter of an hour.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from benchmarks import results
from benchmarks.command import ROOT, Mistake, check_positive, run
from benchmarks.compiled.h200 import use_gpu_compiler
from benchmarks.results import save
from nanogpt.config import ConfigError
from nanogpt.runs.environment import environment

Size = Literal["124M", "350M", "774M", "1.5B"]


@dataclass(frozen=True)
class Options:
    """Predict how training scales over many H200s, from the step as compiled for them."""

    devices: tuple[int, ...] = (8, 64, 512)
    """Numbers of H200s to compile for."""
    sizes: tuple[Size, ...] = ("124M", "350M", "774M", "1.5B")
    """Sizes of the model."""
    tiny: bool = False
    """Use a model of one layer, and leave docs unchanged: to test this script."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def measure(options: Options) -> None:
    """Compile each case, then print, save and plot."""
    check_positive(options, "devices")
    use_gpu_compiler()
    from benchmarks.compiled.prediction import H200, V5P
    from benchmarks.compiled.scaling_tables import draw, table_of_sent, table_of_times

    sizes = ("tiny",) if options.tiny else options.sizes
    began, cases = environment(), []
    for case in compiled_cases(sizes, options.devices):
        cases.append(case)
        # After each, so that nothing is lost; the file itself makes later commits dirty.
        save("scaling", began | {"cases": cases}, options.tiny)
    if not cases:
        raise Mistake("No size can be sharded over these devices: choose other --devices.")
    print(table_of_sent(cases))
    for machine in (H200, V5P):
        print(f"\n{table_of_times(cases, machine)}")
    draw(cases, results.FOLDER / "scaling_tiny.png" if options.tiny else ROOT / "docs/scaling.png")


def compiled_cases(sizes: Iterable[str], counts: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Compile each size for each number of devices, with every sharding that it allows."""
    from benchmarks.compiled.scaling_tables import name_of

    ways = [(1, False), (1, True)]
    for size in sizes:
        # Two devices can share the heads of 350M; 25 heads have no half.
        for model, shard_params in [*ways, (2, False)] if size == "350M" else ways:
            for devices in counts:
                try:
                    case = compile_case(size, devices, model, shard_params)
                except ConfigError as error:  # parameters that cannot be sharded so
                    print(f"{size}, {devices} GPUs: {error}")
                    continue
                print(f"{size}, {name_of(case)}, {devices} GPUs: {case['sent']}", flush=True)
                yield case


def compile_case(size: str, devices: int, model: int, shard_params: bool) -> dict[str, Any]:
    """Compile a size's step; return its communication and memory, for JSON."""
    from benchmarks.compiled.collectives import reduced, sent
    from benchmarks.compiled.for_h200 import compile_step
    from benchmarks.compiled.prediction import SIZES, STEP_TOKENS
    from benchmarks.compiled.program import Program
    from nanogpt.config import Kernels
    from nanogpt.devices.compilation import memory_of
    from nanogpt.devices.hardware import activation_bytes, largest_batch

    hp = replace(SIZES[size], shard_params=shard_params)
    T, readers = hp.sequence_length, devices // model
    rows = STEP_TOKENS // T // readers
    row_bytes = T * activation_bytes(hp.model, T, "bfloat16", flash=True)
    batch_size = largest_batch(rows, row_bytes, 0.9 * 141e9)
    compiled = compile_step(
        hp.model,
        Kernels("cudnn", tensor_parallel=model > 1),
        num_devices=devices,
        model_devices=model,
        batch_size=batch_size,
        sequence_length=T,
        accumulation_steps=rows // batch_size,
        hp=hp,
    )
    program, memory = Program(compiled), compiled.memory_analysis()
    all_reduced, early = reduced(program, devices, model)
    return {
        "size": size,
        "devices": devices,
        "model": model,
        "shard_params": shard_params,
        "batch_size": batch_size,
        "micro_batches": rows // batch_size,
        "memory_GB": memory_of(compiled) / 1e9,
        "state_GB": memory.argument_size_in_bytes / 1e9,
        "reduced_GB": all_reduced / 1e9,
        "reduced_early_GB": early / 1e9,
        "sent": [asdict(each) for each in sent(program, devices, rows // batch_size)],
    }


if __name__ == "__main__":
    sys.exit(main())
