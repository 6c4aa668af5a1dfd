"""The programs that a run on one H200 compiles before its first step, with their CPU seconds.

    python3 -m benchmarks.compiled.start

They are compiled on this machine's CPU for an H200's description: without autotuning, which takes
additional time on a real one, and one after the other, whereas a run compiles steps and validations
at the same time.
"""

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.command import run
from benchmarks.compiled.h200 import use_gpu_compiler
from benchmarks.results import save

if TYPE_CHECKING:
    from jax.stages import Lowered

    from nanogpt.config import AttentionKernel
    from train_gpt import Hyperparameters

MEMORY = 0.9 * 151.4e9  # bytes of an H200 that a run may use
KERNELS: "dict[str, AttentionKernel]" = {"speedrun": "pallas", "baseline": "cudnn"}


@dataclass(frozen=True)
class Options:
    """Compile for an H200 all that a run compiles before its first step."""

    tiny: bool = False
    """Use the baseline preset with one layer: to test this script."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def measure(options: Options) -> None:
    """Compile every program; print and save the seconds."""
    use_gpu_compiler()
    from train_gpt import PRESETS

    runs = {name: PRESETS[name] for name in KERNELS}
    if options.tiny:
        small = replace(PRESETS["baseline"].model, num_layers=1)
        runs = {"baseline": replace(PRESETS["baseline"], model=small)}
    figures = {}
    for preset, hp in runs.items():
        figures[preset] = {}
        for name, lowered in programs_of(hp, KERNELS[preset]).items():
            begun = time.process_time()
            lowered.compile()
            figures[preset][name] = time.process_time() - begun
            print(f"{preset} | {name} | {figures[preset][name]:.1f} s", flush=True)
            save("start_compiled", {"cpu_seconds": figures}, options.tiny, shown=False)
        seconds = sum(figures[preset].values())
        print(f"{preset} | {len(figures[preset])} programs | {seconds:.1f} s")
    save("start_compiled", {"cpu_seconds": figures}, options.tiny)


def programs_of(hp: "Hyperparameters", kernel: "AttentionKernel") -> dict[str, "Lowered"]:
    """Lower the attention kernel's probe, the initial state, and the two programs of each stage."""
    import jax
    import jax.numpy as jnp

    from benchmarks.compiled.for_h200 import lowering_for, mesh_of
    from benchmarks.compiled.for_tpu import NO_DATA
    from nanogpt.devices.mesh import REPLICATED, shapes_on
    from nanogpt.model.attention import probe
    from nanogpt.training.plan import Hardware, make_plan, optimizer_of
    from nanogpt.training.programs import lowered
    from nanogpt.training.step import make_init

    plan = make_plan(hp, Hardware("NVIDIA H200", 1, 1, MEMORY), NO_DATA, kernel, "")
    mesh = mesh_of(1)
    optimizer = optimizer_of(hp, mesh)
    init = make_init(hp.model, optimizer, mesh, hp.shard_params)
    models = [model for stage in plan.stages for model in (stage.model, stage.used_model)]
    key = shapes_on(mesh, REPLICATED, jax.eval_shape(lambda: jax.random.key(0)))
    seed = shapes_on(mesh, REPLICATED, jax.ShapeDtypeStruct((), jnp.int32))
    first = {n: stage.first_step for n, stage in enumerate(plan.stages)}
    with lowering_for(mesh):
        found = {
            f"probe of {kernel} attention": jax.jit(
                probe(kernel, models, hp.sequence_length)
            ).lower(seed),
            "first state": init.lower(key),
        }
        for (name, stage), each in lowered(plan, mesh, optimizer, init, first).items():
            found[f"{name}, stage {stage + 1}"] = each
    return found


if __name__ == "__main__":
    sys.exit(main())
