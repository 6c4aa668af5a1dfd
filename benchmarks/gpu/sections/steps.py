"""One step of each preset, compiled and run as in train_gpt.py."""

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.expected import step_expected
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.sections import Context, Job
from benchmarks.gpu.sections.presets import STAGES, plan_of, step_of
from benchmarks.gpu.whole_step import compile_step, measure_step
from nanogpt.devices.compilation import first_that_fits
from nanogpt.training.plan import Plan


def jobs(context: Context) -> Iterator[Job]:
    """Yield the rows of STAGES."""
    for row in STAGES:
        yield row, partial(measure, row, context)


def measure(row: str, context: Context) -> Figures:
    """Measure a step, with smaller micro-batches if memory runs out."""

    def of(plan: Plan) -> Figures:
        size, variant = step_of(row, plan, context.tiny)
        expected = step_expected(size, plan)
        found = measure_step(size, {}, variant)
        return found | {"ratio": None, "predicted": expected}

    try:
        return first_that_fits(of, plan_of(row, context), Plan.smaller)
    finally:
        compile_step.cache_clear()
