"""Predictions for a GPU, made before any measurement and printed beside the measurements.

All computation is assumed to reach the utilization that benchmarks/compiled assumes; the bytes of
the variants are those of the step as compiled for an H200.
"""

import json

from benchmarks.compiled.prediction import UTILIZATION
from benchmarks.gpu.floors import orthogonalization_flops
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.variants import Size
from benchmarks.results import FOLDER
from nanogpt.devices.hardware import PEAK_BANDWIDTH, PEAK_FLOPS, flops_per_token
from nanogpt.training.plan import Plan

COMPILED = FOLDER / "h200_compiled.json"
LOSSES = "stage 3", "stage 3, one-pass loss"  # steps in that file


def assumed(flops: float, kind: str) -> float | None:
    """Return the milliseconds for these FLOPs; None if the device's peak is not known."""
    peak = PEAK_FLOPS.get(kind)
    return 1e3 * flops / (UTILIZATION * peak) if peak else None


def step_ms(size: Size, kind: str) -> float | None:
    """Return the predicted milliseconds of an optimizer step."""
    hp = size.hp
    per_token = flops_per_token(hp.model, hp.sequence_length)
    return assumed(hp.total_batch_size * per_token + orthogonalization_flops(hp), kind)


def step_expected(size: Size, plan: Plan) -> Figures:
    """Return the predicted time, rate and memory of a step."""
    ms = step_ms(size, plan.hardware.kind)
    return {
        "ms": ms,
        "tokens_per_s": ms and 1e3 * size.hp.total_batch_size / ms,
        "mfu": ms and UTILIZATION,
        "memory_GB": plan.device_bytes / 1e9,
    }


def ratio_expected(size: Size, variant: str, kind: str) -> Figures:
    """Return a variant's predicted time over the step's: one pass over the logits less, or FP8."""
    hp, ms, bandwidth = size.hp, step_ms(size, kind), PEAK_BANDWIDTH.get(kind)
    if not (ms and bandwidth):
        return {}
    if variant == "FP8 head":  # twice the rate of bfloat16
        flops = 6 * hp.model.width * hp.model.padded_vocab_size * hp.total_batch_size
        return {"ratio": 1 - (assumed(flops / 2, kind) or 0.0) / ms}
    if variant == "pallas loss":
        steps = json.loads(COMPILED.read_text())["steps"]
        plain, one_pass = (sum(steps[name]["moved_kB_per_token"].values()) for name in LOSSES)
        return {"ratio": 1 - 1e6 * (plain - one_pass) * hp.total_batch_size / bandwidth / ms}
    return {}
