"""Which attention kernels pass their probe, and their times at the presets' shapes."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax

from benchmarks.gpu.expected import assumed
from benchmarks.gpu.floors import attention_row, attentions
from benchmarks.gpu.parts import measure_attention
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.sections import Context, Job
from benchmarks.gpu.sections.presets import STAGES, kernel_of, preset_of
from benchmarks.gpu.variants import FULL, TINY, Size, stage_alone
from train_gpt import Hyperparameters

TOKENS = 65_536  # per micro-batch


def jobs(context: Context) -> Iterator[Job]:
    """Yield the presets' choices, then every kernel, the project's own last.

    An illegal memory access makes the device unusable for the rest of the process.
    """
    for row in STAGES:
        choice = partial(choose, preset_of(row, context.tiny))
        yield f"choice for {row.split(',')[0]}", choice
    timed = [job for row in STAGES for job in of_preset(row, context.tiny)]
    yield from sorted(timed, key=lambda job: "pallas" in job[0])


def of_preset(row: str, tiny: bool) -> Iterator[Job]:
    """Yield every kernel at each of a preset's shapes, and at the first also only forward."""
    hp = preset_of(row, tiny)
    hp = replace(hp, batch_size=2 if tiny else TOKENS // hp.sequence_length)
    few = TINY if tiny else replace(FULL, rounds=10, calls=2, repeats=3)
    size = replace(few, hp=stage_alone(hp, STAGES[row]))
    masked, T = size.hp.model.document_separator is not None, size.hp.sequence_length
    kernels = [("cudnn", False), ("pallas", masked)] + [("xla", False)] * (not masked)
    shapes = [(window or T, paired) for window, paired in dict.fromkeys(attentions(size.hp.model))]
    for how in kernels[2:] if tiny else kernels:
        for shape in shapes[:1] if tiny else shapes:
            name = f"{row}: {attention_row(*how, *shape)}"
            yield name, partial(measure, size, how, shape, True)
            if shape == shapes[0]:
                yield f"{name}, forward", partial(measure, size, how, shape, False)


def choose(hp: Hyperparameters) -> Figures:
    """Return the kernel that a run would use."""
    begun = time.perf_counter()
    kernel, why = kernel_of(hp)
    return {"kernel": kernel, "why": why, "seconds": time.perf_counter() - begun}


def measure(size: Size, how: tuple, shape: tuple[int, bool], backward: bool) -> Figures:
    """Time one layer, forward only or with backward."""
    found = measure_attention(size, *how, *shape, backward)
    flops = 1e9 * found["tflops"] * found["ms"]
    return found | {"predicted": {"ms": assumed(flops, jax.devices()[0].device_kind)}}
