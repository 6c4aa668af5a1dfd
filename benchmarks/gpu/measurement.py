"""The order of the measurements: whole steps, the parts, then the fastest of each combined."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax

from benchmarks.gpu.floors import floors, parts_of_step
from benchmarks.gpu.parts import part_jobs
from benchmarks.gpu.rows import Figures, attempt
from benchmarks.gpu.variants import Size, Variant, fastest_of_each, variants_of
from benchmarks.gpu.whole_step import measure_step, trace_steps
from benchmarks.results import save
from nanogpt.model.attention import choose_attention

if TYPE_CHECKING:
    from benchmarks.gpu.step import Options


def measure_all(size: Size, options: "Options") -> Figures:
    """Measure all rows of all tables; prints each, and saves all so far after each."""
    hp, device = size.hp, jax.devices()[0].device_kind
    kernel, why = choose_attention([hp.model], hp.sequence_length, hp.dtype)
    base = Variant(kernel, hp.batch_size, hp.stages[0].target_weights)
    shape = f"{hp.total_batch_size:,} tokens per step, in rows of {hp.sequence_length:,}"
    print(f"{device} | {why} | stage {options.stage}: {shape}")
    figures = defaultdict(dict) | {"device": device, "attention_of_base": why, "of_stage": shape}
    lower = floors(hp, device)

    def record(section: str, row: str, measure: Callable[[], Figures]) -> None:
        figures[section][row] = found = attempt(measure)
        print(f"{section} | {row} | {found.get('failed') or '{ms:,.3f} ms'.format(**found)}")
        figures["parts"] = parts_of_step(size, figures, base, lower)
        save(f"gpu_step_stage_{options.stage}", figures, options.tiny, shown=False)

    step, variants = partial(measure_step, size, figures["steps"]), variants_of(base)
    jobs = [("steps", row, partial(step, variant)) for row, variant in variants.items()]
    jobs += part_jobs(size, kernel)
    # The project's own kernels last: an illegal memory access makes the device unusable for the
    # rest of the process.
    for job in sorted(jobs, key=lambda job: "pallas" in job[1]):
        record(*job)
    record("steps", "fastest of each", lambda: step(fastest_of_each(base, variants, figures)))
    record("steps", "base again", partial(step, base))
    if options.trace:
        record("steps", "base, traced", partial(trace_steps, size, base, options.trace))
    return figures
