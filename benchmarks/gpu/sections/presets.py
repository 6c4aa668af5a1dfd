"""The steps that the sections measure, as planned by train_gpt.py on this device."""

from dataclasses import replace

import jax

from benchmarks.compiled.for_tpu import NO_DATA
from benchmarks.gpu.sections import Context
from benchmarks.gpu.variants import FULL, TINY, Size, Variant, stage_alone
from nanogpt.config import AttentionKernel
from nanogpt.devices.hardware import device_memory
from nanogpt.model.attention import choose_attention
from nanogpt.training.plan import Hardware, Plan, make_plan
from nanogpt.training.stages import stages_of
from train_gpt import PRESETS, Hyperparameters

LONGEST = 2  # the longest stage of the speedrun, counted from 0
STAGES = {"baseline": 0, f"speedrun, stage {LONGEST + 1}": LONGEST}  # by row
TINY_BASELINE = replace(
    PRESETS["baseline"],
    dtype="float32",
    sequence_length=64,
    total_batch_size=256,
    model=replace(
        PRESETS["baseline"].model,
        vocab_size=256,
        num_layers=1,
        num_heads=2,
        width=64,
        mlp_width=256,
    ),
)
# A plain layer in the speedrun's stages compiles sooner than the model of benchmarks.gpu.step.
TINY_SPEEDRUN = replace(
    TINY.hp,
    stages=tuple(replace(stage, windows=stage.windows[:1]) for stage in TINY.hp.stages),
    model=replace(TINY_BASELINE.model, document_separator=255, tied_head=True),
)


def preset_of(row: str, tiny: bool) -> Hyperparameters:
    """Return the settings of a row of STAGES; batch_size is left to the plan."""
    if row.startswith("speedrun"):
        return replace(TINY_SPEEDRUN if tiny else FULL.hp, batch_size=None)
    return TINY_BASELINE if tiny else PRESETS["baseline"]


def kernel_of(hp: Hyperparameters) -> tuple[AttentionKernel, str]:
    """Return the attention kernel that train_gpt.py chooses here, and why."""
    models = [model for stage in stages_of(hp, 1) for model in (stage.model, stage.used_model)]
    return choose_attention(models, hp.sequence_length, hp.dtype)


def plan_of(row: str, context: Context) -> Plan:
    """Return the plan on this device, with the kernel chosen earlier, if any, or now."""
    hp = preset_of(row, context.tiny)
    kernel = context.row("kernels", f"choice for {row.split(',')[0]}").get("kernel")
    device = jax.devices()[0]
    hardware = Hardware(device.device_kind, 1, 1, device_memory(device))
    return make_plan(hp, hardware, NO_DATA, kernel or kernel_of(hp)[0], "")


def step_of(row: str, plan: Plan, tiny: bool) -> tuple[Size, Variant]:
    """Return the step of a row for whole_step.py, with the micro-batches of the plan."""
    hp = stage_alone(replace(plan.hp, batch_size=plan.batch_size), STAGES[row])
    kernels = plan.kernels
    variant = Variant(
        kernels.attention,
        hp.batch_size or 1,
        hp.stages[0].target_weights,
        rematerialize=kernels.rematerialize,
    )
    few = TINY if tiny else replace(FULL, calls=2, repeats=3)
    return replace(few, hp=hp), variant
