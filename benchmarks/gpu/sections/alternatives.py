"""The step of section "steps" with other kernels, precisions, sizes and optimizers."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax

from benchmarks.gpu.expected import assumed, ratio_expected, step_ms
from benchmarks.gpu.floors import orthogonalization_flops
from benchmarks.gpu.parts import measure_update
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.sections import Context, Job
from benchmarks.gpu.sections.presets import STAGES, plan_of, step_of
from benchmarks.gpu.variants import Size, Variant, variants_of
from benchmarks.gpu.whole_step import compile_step, measure_step

BASELINE, SPEEDRUN = STAGES


def jobs(context: Context) -> Iterator[Job]:
    """Yield the variants, measured relative to the step, in order of importance."""
    size, base = step_of(SPEEDRUN, plan_of(SPEEDRUN, context), context.tiny)
    measured = context.row("steps", SPEEDRUN).get("variant", {})
    base = replace(base, batch_size=measured.get("batch_size", base.batch_size))
    yield "Muon's update", partial(share_of_muon, size, context)
    variants = variants_of(base)
    whole = partial(measure, context, SPEEDRUN, size)
    yield f"{SPEEDRUN}: pallas loss", partial(whole, "pallas loss", variants["pallas loss"])
    if context.tiny:
        return
    yield f"{SPEEDRUN}: FP8 head", partial(whole, "FP8 head", variants["FP8 head"])
    of_baseline, plain = step_of(BASELINE, plan_of(BASELINE, context), tiny=False)
    own = partial(measure, context, BASELINE, of_baseline, "", replace(plain, attention="pallas"))
    yield f"{BASELINE}: own attention", own
    for rows in neighbours(base.batch_size, size.Ng * size.hp.batch_size):
        yield f"{SPEEDRUN}: {rows} rows", partial(whole, "", replace(base, batch_size=rows))
    others = ("Adam for all", "plain Muon", "without document mask", "without document mask, cudnn")
    for row in others:
        yield f"{SPEEDRUN}: {row}", partial(whole, row, variants[row])


def neighbours(rows: int, of: int) -> list[int]:
    """Return the next smaller and the next larger number of rows that divide those of a step."""
    divisors = [n for n in range(1, of + 1) if of % n == 0]
    place = divisors.index(rows)
    return divisors[max(0, place - 1) : place] + divisors[place + 1 : place + 2]


def measure(context: Context, row: str, size: Size, name: str, variant: Variant) -> Figures:
    """Measure a step, relative to the one in section "steps" if that was measured."""
    base, kind = context.row("steps", row), jax.devices()[0].device_kind
    try:
        found = measure_step(size, {"base": base} if "ms" in base else {}, variant)
    finally:
        compile_step.cache_clear()
    ratio = found["ratio"] if "ms" in base else None
    return found | {"ratio": ratio, "predicted": ratio_expected(size, name, kind)}


def share_of_muon(size: Size, context: Context) -> Figures:
    """Measure the time of the matrices' update relative to that of the step."""
    ms, kind = measure_update(size, "NorMuon", {"muon"})["ms"], jax.devices()[0].device_kind
    whole, expected = context.row("steps", SPEEDRUN).get("ms"), step_ms(size, kind)
    own = assumed(orthogonalization_flops(size.hp), kind)
    predicted = {"ratio": own / expected} if own and expected else {}
    return {"ms": ms, "ratio": whole and ms / whole, "predicted": predicted}
