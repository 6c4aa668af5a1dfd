"""The planned rows per pass and memory of a run on GPUs and TPUs.

    python3 -m benchmarks.compiled.plans

It prints the tables of docs/gpu.md and docs/tpu.md in seconds. In parentheses is the memory that
XLA plans for the training step of the last stage, read from results/; nothing is measured.

    python3 -m benchmarks.compiled.plans --compile gpu    # or tpu

compiles these steps first, in half an hour on two cores (for TPUs more than an hour), and saves
their memory. This needs JAX's CUDA plugin or libtpu: pip install -e ".[gpu-compiler]" or
".[tpu-compiler]". Steps for any GPU are compiled for an H200.

GPUs that cannot multiply bfloat16 train in float32, without flash attention.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from benchmarks import results
from benchmarks.command import run

if TYPE_CHECKING:
    from nanogpt.config import AttentionKernel
    from nanogpt.training.plan import Hardware, Plan

PRESETS = "speedrun", "baseline", "gpt2-medium"
GIGABYTES = 8, 12, 16, 24, 40, 48, 80, 141  # of GPUs
OLD = {"T4, 16 GB": 16, "V100, 32 GB": 32}  # GPUs without bfloat16
USABLE = 0.9  # of a GPU's memory, as train_gpt.py tells JAX


@dataclass(frozen=True)
class Options:
    """Print the planned rows per pass and memory on GPUs and TPUs."""

    compile: Literal["gpu", "tpu"] | None = None
    """Compile the planned training steps for GPUs or TPUs first."""


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    return run(Options, print_tables, arguments)


def print_tables(options: Options) -> None:
    """Print the tables in Markdown.

    * means that layers are recomputed in the backward pass, and † that parameters are sharded.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.compile == "gpu":
        from benchmarks.compiled.h200 import use_gpu_compiler

        use_gpu_compiler()
    elif options.compile == "tpu":
        from benchmarks.compiled.tpu import use_tpu_compiler

        use_tpu_compiler()
    tables = plans()
    if options.compile:
        compile_and_save(options.compile, tables)
    compiled = {kind: saved(kind) for kind in ("gpu", "tpu")}
    for table in tables:
        names = " | ".join(f"`{name}`" for name in PRESETS)
        print(f"\n| device | usable GB | {names} |\n|---|---|{'---|' * len(PRESETS)}")
        for device, each in table.items():
            cells = " | ".join(cell(plan, compiled[kind_of(plan)]) for plan in each)
            print(f"| {device} | {each[0].hardware.memory / 1e9:.1f} | {cells} |")


def plans() -> list[dict[str, list["Plan"]]]:
    """Return the plans of each table, by device."""
    from benchmarks.compiled.for_tpu import CHIPS
    from nanogpt.training.plan import Hardware

    gpus = {f"{n} GB": Hardware("GPU", 1, 1, USABLE * n * 1e9) for n in GIGABYTES}
    old = {name: Hardware("GPU", 1, 1, USABLE * n * 1e9, bfloat16=False) for name, n in OLD.items()}
    tpus = {
        f"{count} x TPU {chip}": Hardware(f"TPU {chip}", count, 1, facts.memory)
        for chip, facts in CHIPS.items()
        for count in (1, 8)
    }
    return [
        {
            name: [plan_of(preset, hardware, kernel) for preset in PRESETS]
            for name, hardware in devices.items()
        }
        for kernel, devices in (("pallas", gpus), ("xla", old), ("splash", tpus))
    ]


def plan_of(preset: str, hardware: "Hardware", kernel: "AttentionKernel") -> "Plan":
    """Plan a run of a preset."""
    import train_gpt
    from benchmarks.compiled.for_tpu import NO_DATA
    from nanogpt.training.plan import make_plan

    hp = train_gpt.PRESETS[preset]
    if not hardware.bfloat16:
        hp = replace(hp, dtype="float32")
    return make_plan(hp, hardware, NO_DATA, kernel, "")


def kind_of(plan: "Plan") -> str:
    """Return the compiler for a plan."""
    return "tpu" if plan.hardware.kind.startswith("TPU") else "gpu"


def name_of(plan: "Plan") -> str:
    """Name a plan by all that its compiled step depends on."""
    forms = {"layers recomputed": plan.kernels.rematerialize, "sharded": plan.shard_params}
    return ", ".join(
        [
            f"{plan.num_devices} x {plan.hardware.kind}",
            plan.hp.preset,
            plan.hp.dtype,
            f"{plan.batch_size} rows",
            *(form for form, used in forms.items() if used),
        ]
    )


def saved(kind: str) -> dict[str, float | None]:
    """Return the bytes of the compiled steps, by the name of the plan; None if XLA refused it."""
    file = results.FOLDER / f"plans_{kind}.json"
    return json.loads(file.read_text())["bytes"] if file.exists() else {}


def compile_and_save(kind: str, tables: list[dict[str, list["Plan"]]]) -> None:
    """Compile the last training step of every plan that fits, and save its bytes."""
    every = [plan for table in tables for each in table.values() for plan in each]
    chosen = {
        name_of(plan): plan
        for plan in every
        if kind_of(plan) == kind and plan.device_bytes <= plan.hardware.memory
    }
    found = {}
    for name, plan in chosen.items():
        found[name] = bytes_compiled(plan)
        print(f"{name}: {found[name]}", flush=True)
        results.save(f"plans_{kind}", {"bytes": found}, shown=False)


def bytes_compiled(plan: "Plan") -> float | None:
    """Compile the training step of a plan's last stage; return its bytes, or None if too many."""
    import jax

    from benchmarks.compiled import for_h200, for_tpu
    from nanogpt.devices.compilation import is_out_of_memory, memory_of

    last = len(plan.stages) - 1
    try:
        if kind_of(plan) == "tpu":
            lowered = for_tpu.lowered_on(plan, plan.hardware.kind.removeprefix("TPU "), last)
        else:
            lowered = for_h200.lowered_on(plan, last)
        return memory_of(lowered["training step"].compile())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def cell(plan: "Plan", compiled: dict[str, float | None]) -> str:
    """Return the rows per pass and device, and their memory, planned and compiled."""
    planned, found = plan.device_bytes, compiled.get(name_of(plan), 0.0)
    if found is None or max(planned, found) > plan.hardware.memory:
        return f"does not fit ({max(planned, found or 0) / 1e9:.1f} GB)"
    marks = "\\*" * plan.kernels.rematerialize + "†" * plan.shard_params
    as_compiled = f" ({found / 1e9:.1f})" if found else ""
    return f"{plan.batch_size}{marks}, {planned / 1e9:.1f} GB{as_compiled}"


if __name__ == "__main__":
    sys.exit(main())
