"""A run's programs as compiled for TPUs, on a machine without TPUs.

    python3 -m benchmarks.compiled.tpu --slices v5e-1 v5e-8 v6e-8 v5p-8

For each slice, e.g. v5e-64, and each preset, it compiles the training step and the validation of
the last stage, or of the given stages, with the micro-batches that a run would choose there. Each
program takes a few minutes, and gives a line of JSON: the memory that XLA plans for it, the
communication between chips, its attention kernels, and XLA's estimate of its cycles.

A training step also has a PREDICTION of tokens per second, with nothing measured: XLA's cycles and,
for attention, which XLA does not estimate, the bundles of splash_bundles.py, at the chip's clock;
plus the communication at the published speed of two of the chip's links, without overlap.

It needs libtpu, but no TPU: pip install -e ".[tpu-compiler]"
"""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.command import Mistake, require, run
from benchmarks.results import save

if TYPE_CHECKING:
    from benchmarks.compiled.program import Program
    from nanogpt.training.plan import Plan


@dataclass(frozen=True)
class Options:
    """Analyse a run's programs as compiled for TPUs, on a machine without TPUs."""

    slices: tuple[str, ...] = ("v5e-1", "v5e-8", "v6e-8", "v5p-8")
    """Kind of chip (v5e, v6e or v5p) and number of chips (1, 8 or 64)."""
    presets: tuple[str, ...] = ("speedrun", "baseline")
    """Presets to compile."""
    stages: tuple[int, ...] = ()
    """Stages, counted from 1; by default the last one of each preset."""
    shard_params: bool = False
    """Shard parameters, as with train_gpt.py's option."""
    heads: int | None = None
    """Number of attention heads, instead of the preset's."""
    tiny: bool = False
    """Use a model of one layer on one v5e: to test this script."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def use_tpu_compiler() -> None:
    """Let XLA compile for TPUs while JAX itself runs on the CPU; Mistake if it cannot."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may compile at once
    require("libtpu", "tpu-compiler", "libtpu")


def measure(options: Options) -> None:
    """Compile the programs; print and save their figures."""
    use_tpu_compiler()
    from benchmarks.compiled.for_tpu import CHIPS, plan_on
    from nanogpt.runs.environment import environment
    from train_gpt import PRESETS

    if options.tiny:
        options = replace(options, slices=("v5e-1",), presets=("baseline",))
    began, programs = environment(), []
    for preset in options.presets:
        if preset not in PRESETS:
            raise Mistake(f"There is no preset {preset}: choose from {', '.join(PRESETS)}.")
        hp = replace(PRESETS[preset], shard_params=options.shard_params)
        if options.heads:
            hp = replace(hp, model=replace(hp.model, num_heads=options.heads))
            hp.check()
        if options.tiny:
            hp = replace(hp, model=replace(hp.model, num_layers=1))
        for name in options.slices:
            chip, _, count = name.partition("-")
            if chip not in CHIPS or count not in map(str, CHIPS[chip].slices):
                raise Mistake(f"--slices cannot be {name}: choose v5e, v6e or v5p with 1, 8 or 64.")
            plan = plan_on(hp, chip, int(count))
            for stage in options.stages or (len(plan.stages),):
                if not 1 <= stage <= len(plan.stages):
                    raise Mistake(
                        f"--stages must be 1 to {len(plan.stages)} for {preset}, not {stage}."
                    )
                for line in lines_of(plan, chip, stage - 1):
                    programs.append(line)
                    print(json.dumps(line), flush=True)
                    # After each, so that nothing is lost.
                    save("tpu_compiled", began | {"programs": programs}, options.tiny)


def lines_of(plan: "Plan", chip: str, stage: int) -> list[dict[str, Any]]:
    """Compile the two programs of a stage; return their figures."""
    from benchmarks.compiled.collectives import sent
    from benchmarks.compiled.for_tpu import lowered_on
    from benchmarks.compiled.program import Program

    (Ng, R), lines = plan.shape(stage), []
    for name, lowered in lowered_on(plan, chip, stage).items():
        compiled = lowered.compile()
        program, memory = Program(compiled), compiled.memory_analysis()
        training = name == "training step"
        # The program is each device's own; validation has no loop.
        exchanged = sent(program, plan.num_devices, Ng if training else 1)
        cycles = estimated_cycles(program, Ng if training else 1)
        line = {
            "chip": chip,
            "devices": plan.num_devices,
            "preset": plan.hp.preset,
            "heads": plan.hp.model.num_heads,
            "stage": stage + 1,
            "shard_params": plan.shard_params,
            "program": name,
            "rows_per_device": R // plan.readers,
            "row_length": plan.stages[stage].row_length,
            "micro_batches": Ng,
            "rematerialized": plan.kernels.rematerialize,
            "arguments_GB": memory.argument_size_in_bytes / 1e9,
            "temporaries_GB": memory.temp_size_in_bytes / 1e9,
            "code_GB": memory.generated_code_size_in_bytes / 1e9,
            "memory_of_chip_GB": (plan.hardware.memory or 0) / 1e9,
            "attention_kernels": attention_kernels(program),
            "sent": [asdict(each) for each in exchanged],
            "cycles_estimated_by_XLA": cycles,
        }
        if training:
            line |= {"PREDICTED": predicted(plan, chip, stage, cycles, exchanged)}
        lines.append(line)
    return lines


def estimated_cycles(program: "Program", micro_batches: int) -> int:
    """Return XLA's estimate for a step, without custom kernels and collectives, which have none."""

    def cycles(instructions):
        found = (re.search(r'"estimated_cycles":"(\d+)"', x.attributes) for x in instructions)
        values = [int(each[1]) for each in found if each]
        return sum(value for value in values if value < 2**62)  # else INT64_MAX: unknown

    loops = program.loops()
    again = (micro_batches - 1) * cycles(loops[0]) if micro_batches > 1 and loops else 0
    return cycles(program.kernels()) + again


def attention_kernels(program: "Program") -> dict[str, int]:
    """Count the kernels of each kind and grid: masks, outer blocks, and most inner blocks."""
    found: dict[str, int] = {}
    for kernel in program.kernels():
        named = re.match(r"splash_mha_(\w+?)_", kernel.name)
        if named:
            blocks = re.search(r"operand_layout_constraints=\{s\d+\[([\d,]+)\]", kernel.attributes)
            key = f"{named[1]} {blocks[1] if blocks else ''}"
            found[key] = found.get(key, 0) + 1
    return found


def predicted(
    plan: "Plan", chip: str, stage: int, cycles: int, exchanged: list
) -> dict[str, Any] | None:
    """Predict a step's seconds and tokens per second; None if splash_bundles.py was not run."""
    from benchmarks.compiled.collectives import wire_bytes
    from benchmarks.compiled.for_tpu import CHIPS
    from nanogpt.devices.hardware import PEAK_FLOPS

    file = results.FOLDER / "splash_bundles.json"
    if not file.exists():
        return None
    bundles = attention_bundles(plan, chip, stage, json.loads(file.read_text())["schedules"])
    clock = PEAK_FLOPS[plan.hardware.kind] / CHIPS[chip].flops_per_cycle
    wire = sum(wire_bytes(x.kind, x.devices, x.bytes) for x in exchanged)
    seconds = {
        "attention_s": bundles / clock,
        "all_else_s": cycles / clock,
        "sending_s": wire / (2 * CHIPS[chip].link),
    }
    tokens_per_s = plan.stages[stage].tokens_per_step / sum(seconds.values())
    first = plan.stages[stage].first_step
    return seconds | {
        "tokens_per_s": tokens_per_s,
        "model_flops_utilization": plan.utilization(first, tokens_per_s),
    }


def attention_bundles(plan: "Plan", chip: str, stage: int, saved: list[dict]) -> int:
    """Return the fewest bundles that splash attention executes per device and step."""
    from benchmarks.compiled.splash_bundles import Schedule, executed
    from nanogpt.model.kernels.splash_attention import block

    config, T = plan.stages[stage].model, plan.stages[stage].row_length
    Ng, R = plan.shape(stage)
    total = 0
    for layer in set(range(config.num_layers)) - config.layers(config.mlp_only):
        pairs = 2 if layer in config.layers(config.paired_heads) else 1
        window = config.window(layer)
        form = {"chip": chip, "windows": window is not None, "fused": False}
        form["block"] = block(T * pairs, window, pairs)
        kernels = next(each for each in saved if form.items() <= each.items())
        named = {name: Schedule(**kernels[name]) for name in ("fwd", "dq", "dkv")}
        again = {"fwd": named["fwd"]} if plan.kernels.rematerialize else {}
        heads = config.num_heads // pairs // plan.sharers
        total += heads * sum(
            executed(each, form["block"], T * pairs, window) for each in (named, again)
        )
    return total * Ng * R // plan.readers


if __name__ == "__main__":
    sys.exit(main())
