"""What another kernel, precision, size or optimizer would do to the step of section "steps"."""

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
# In order of importance; the project's own kernels last but for the loss, which is asked for first.
FIRST = "pallas loss", "FP8 head", "Adam for all", "plain Muon"


def jobs(context: Context) -> Iterator[Job]:
    """Each as a ratio to the step; what was not measured there is compared with a step here."""
    plan = plan_of(SPEEDRUN, context)
    size, base = step_of(SPEEDRUN, plan, context.tiny)
    measured = context.row("steps", SPEEDRUN).get("variant", {})
    base = replace(base, batch_size=measured.get("batch_size", base.batch_size))
    yield "Muon's update", partial(share_of_muon, size, context)
    variants = variants_of(base)
    others = [row for row in variants if row not in ("base", "xla attention", *FIRST)]
    chosen = FIRST[:1] if context.tiny else (*FIRST, *others)
    for row in chosen:
        yield f"{SPEEDRUN}: {row}", partial(measure, SPEEDRUN, row, size, variants[row], context)
    if not context.tiny:
        size, base = step_of(BASELINE, plan_of(BASELINE, context), context.tiny)
        own = replace(base, attention="pallas")
        yield f"{BASELINE}: own attention", partial(measure, BASELINE, "", size, own, context)


def measure(row: str, name: str, size: Size, variant: Variant, context: Context) -> Figures:
    """A step, and its time over that of the base."""
    base = context.row("steps", row)
    try:
        found = measure_step(size, {"base": base} if "ms" in base else {}, variant)
    finally:
        compile_step.cache_clear()
    if "ms" not in base:
        found["ratio"] = None
    kind = jax.devices()[0].device_kind
    return found | {"predicted": ratio_expected(size, name, kind)}


def share_of_muon(size: Size, context: Context) -> Figures:
    """The time of the matrices' update over that of the step."""
    ms, kind = measure_update(size, "NorMuon", {"muon"})["ms"], jax.devices()[0].device_kind
    whole = context.row("steps", SPEEDRUN).get("ms")
    expected = step_ms(size, kind)
    flops = assumed(orthogonalization_flops(size.hp.model), kind)
    predicted = {"ratio": flops / expected} if expected and flops else {}
    return {"ms": ms, "ratio": whole and ms / whole, "predicted": predicted}
