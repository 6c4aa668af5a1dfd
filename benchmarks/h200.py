"""The training step as compiled for H200s, on a machine without any.

    .venv/bin/python -m benchmarks.h200

XLA compiles for a described device as it does for a present one, but for two things: it does not
try out variants of a product, and cuDNN does not plan its kernels. So this shows what a step
computes, keeps, moves and sends, not how fast it is. The tests read the same program.

The steps are those of the stages of the `speedrun` preset and of the `baseline` preset, for one
H200 and for eight, and of the third stage with other kernels. A few minutes.

It needs JAX's CUDA plugin, and no driver: pip install -e ".[gpu-compiler]"
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jax.stages import Compiled

from benchmarks.results import save
from nanogpt.config import GPTConfig, Kernels
from nanogpt.devices.compilation import memory_of
from nanogpt.devices.mesh import BATCH, shapes_on
from nanogpt.schedule import Rates
from nanogpt.training.plan import optimizer_of
from nanogpt.training.step import graph_of, make_init, make_train_step
from train_gpt import PRESETS, Hyperparameters

# What XLA asks of a device, from NVIDIA's data sheet and CUDA's deviceQuery.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
"""


def compile_step(
    config: GPTConfig,
    kernels: Kernels,
    *,
    num_devices: int = 1,
    model_devices: int = 1,
    batch_size: int = 32,
    sequence_length: int = 2048,
    accumulation_steps: int = 2,
    target_weights: tuple[float, ...] = (1.0,),
    hp: Hyperparameters = PRESETS["speedrun"],
) -> Compiled:
    """A training step in bfloat16, compiled for `num_devices` H200s, eight in each host.

    Of `hp` it takes the optimizer and shard_params only. `model_devices` of the devices share each
    row.
    """
    per_host = min(num_devices, 8)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x{num_devices // per_host}x{per_host}"
    )
    devices = np.array(topology.devices).reshape(-1, model_devices)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    optimizer = optimizer_of(hp, mesh)
    init = make_init(config, optimizer, mesh, hp.shard_params)
    state = jax.eval_shape(init, jax.random.key(0))
    rows = batch_size * num_devices // model_devices
    shape = jax.ShapeDtypeStruct((accumulation_steps, rows, sequence_length + 1), jnp.int32)
    rates = Rates(*[jax.ShapeDtypeStruct((), jnp.float32)] * 2)
    graph = graph_of(config, kernels)
    step = make_train_step(
        graph,
        optimizer,
        mesh,
        "bfloat16",
        target_weights=target_weights,
        shard_params=hp.shard_params,
    )
    with ExitStack() as stack:
        # JAX asks the driver whether cuDNN can do it; there is no driver to ask.
        cudnn = "jax._src.cudnn.fused_attention_stablehlo"
        for name, answer in {
            "check_cudnn_version": 91000,
            "check_compute_capability": True,
            "is_cuda_compute_capability_equal": False,
        }.items():
            stack.enter_context(patch(f"{cudnn}.{name}", lambda *a, answer=answer, **k: answer))
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        return step.lower(state, shapes_on(mesh, BATCH, shape), rates).compile()


TOKENS = 65_536  # per device and micro-batch: 32 rows of 2,048


def compile_stage(
    hp: Hyperparameters, stage: int, kernels: Kernels, num_devices: int = 1
) -> Compiled:
    """The training step of a stage, counted from 0, in two micro-batches of TOKENS per device."""
    T = hp.schedule.row_length(stage)
    return compile_step(
        hp.schedule.model(hp.model, stage),
        kernels,
        num_devices=num_devices,
        batch_size=TOKENS // T,
        sequence_length=T,
        target_weights=hp.stages[stage].target_weights,
        hp=hp,
    )


NO_WORK = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call")


@dataclass(frozen=True)
class Instruction:
    """One instruction of an optimised program."""

    computation: str  # where it stands
    name: str
    shape: str  # of the result, as XLA writes it: "bf16[64,768]{1,0}", or a tuple of such
    opcode: str
    arguments: str  # operands, or the number of a parameter
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results this one takes."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(instructions: Iterable[Instruction]) -> dict[str, list[Instruction]]:
    """What devices send each other, by kind.

    Of the two halves of an asynchronous one, that which has the shape of the result.
    """
    found = defaultdict(list)
    for x in instructions:
        kind = x.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            found[kind].append(x)
    return dict(found)


class Program:
    """The optimised HLO of a compiled function, instruction by instruction."""

    def __init__(self, compiled: Compiled):
        self.computations: dict[str, dict[str, Instruction]] = {}
        for text in re.split(r"\n(?=\S)", compiled.as_text()):
            head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{", text)
            if head:
                found = self._instructions(head[1], text)
                self.computations[head[1]] = {each.name: each for each in found}
        # Computations that other instructions call: their insides never reach the memory.
        inside = r"(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)"
        self.fused = {
            name
            for each in self
            if each.opcode in ("fusion", "reduce", "scatter", "all-reduce", "all-reduce-start")
            for name in re.findall(inside, each.attributes)
        }

    @staticmethod
    def _instructions(computation: str, text: str) -> Iterator[Instruction]:
        shape = r"\((?:[^()]|\([^()]*\))*\)|\S+"
        line = re.compile(
            rf"^\s+(?:ROOT )?%?([\w.\-]+) = ({shape}) ([\w\-]+)\((.*?)\)(.*)$", re.MULTILINE
        )
        for fields in line.findall(text):
            yield Instruction(computation, *fields)

    def __iter__(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def kernels(self) -> list[Instruction]:
        """What is launched: the instructions that stand in no fused computation and do work."""
        return [x for x in self if x.computation not in self.fused and x.opcode not in NO_WORK]

    def loops(self) -> list[list[Instruction]]:
        """What each loop launches per turn, the longest loop first."""
        found = []
        for body in (name for x in self for name in re.findall(r"body=%?([\w.\-]+)", x.attributes)):
            inside, before = {body}, set()
            while inside != before:
                before = set(inside)
                for each in self:
                    if each.computation in before:
                        called = r"(?:calls|to_apply|body)=%?([\w.\-]+)"
                        inside.update(re.findall(called, each.attributes))
            found.append([x for x in self.kernels() if x.computation in inside])
        return sorted(found, key=len, reverse=True)

    def bytes_moved(self, kernel: Instruction) -> int:
        """Bytes that a kernel reads and writes, if nothing stays in a cache."""
        scope = self.computations[kernel.computation]
        read = [size_of(scope[name].shape) for name in kernel.operands]
        fused = re.search(r"calls=%?([\w.\-]+)", kernel.attributes)
        if kernel.opcode == "fusion" and fused:
            inside = self.computations[fused[1]]
            for parameter in inside.values():
                if parameter.opcode == "parameter":
                    # Of what is only sliced, or looked up in, that much is read.
                    users = self._users(inside, parameter.name)
                    if all("slice" in x.opcode or x.opcode == "gather" for x in users):
                        some = sum(size_of(x.shape) for x in users)
                        read[int(parameter.arguments)] = min(some, size_of(parameter.shape))
        return size_of(kernel.shape) + sum(read)

    def _users(self, scope: dict[str, Instruction], name: str) -> list[Instruction]:
        """What takes a result, in whatever shape."""
        users = [x for x in scope.values() if name in x.operands]
        seen = [[x] if x.opcode != "bitcast" else self._users(scope, x.name) for x in users]
        return list(chain.from_iterable(seen))


def size_of(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, written as HLO does."""
    total = 0
    for kind, bits, dimensions in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        items = int(np.prod([int(n) for n in dimensions.split(",") if n]))
        total += items * (1 if kind == "pred" else int(bits) // 8)
    return total


def part_of(kernel: Instruction, scope: dict[str, Instruction], V: int) -> str:
    """Which part of the step a kernel belongs to; V is the padded vocabulary."""
    shapes = " ".join([kernel.shape, *(scope[name].shape for name in kernel.operands)])
    logits = re.search(rf"\b\w+\[(\d+,)?\d{{4,}},{V}\]", shapes)
    if "fmha" in kernel.attributes or "flash_attention" in kernel.attributes:
        return "attention"
    if "gemm" in kernel.attributes or "__cublas" in kernel.attributes or kernel.opcode == "dot":
        return "products with the head" if logits else "products of the layers"
    if logits:
        return "loss"
    return "elementwise, norms, embeddings"


def moved_by_part(compiled: Compiled, V: int) -> dict[str, float]:
    """kB per token that each part of a micro-batch moves."""
    program, moved = Program(compiled), defaultdict(float)
    for kernel in program.loops()[0]:  # a micro-batch; the other loops are Muon's
        part = part_of(kernel, program.computations[kernel.computation], V)
        moved[part] += program.bytes_moved(kernel) / TOKENS / 1e3
    return dict(moved)


def main() -> None:
    """Print and save what each step keeps, moves and sends."""
    speedrun, cudnn = PRESETS["speedrun"], Kernels("cudnn")
    steps = {
        **{f"stage {s + 1}": (speedrun, s, cudnn) for s in range(len(speedrun.stages))},
        "baseline": (PRESETS["baseline"], 0, cudnn),
        "stage 3, one-pass loss": (speedrun, 2, Kernels("cudnn", "pallas")),
        "stage 3, one-pass loss, FP8 head": (speedrun, 2, Kernels("cudnn", "pallas", True)),
        "stage 3, own attention": (speedrun, 2, Kernels("pallas")),
    }
    figures = {}
    for name, step in steps.items():
        alone, one_of_8 = compile_stage(*step), compile_stage(*step, num_devices=8)
        program = Program(one_of_8)
        sent = {kind: len(found) for kind, found in collectives(program).items()}
        in_loops = sum(len(found) for x in program.loops() for found in collectives(x).values())
        kept = alone.memory_analysis().temp_size_in_bytes / TOKENS / 1e3
        moved = moved_by_part(alone, step[0].model.padded_vocab_size)
        figures[name] = {
            "memory_GB": memory_of(alone) / 1e9,
            "memory_of_one_of_8_GB": memory_of(one_of_8) / 1e9,
            "collectives_of_8": sent,
            "collectives_of_8_in_loops": in_loops,
            "kept_kB_per_token": kept,
            "moved_kB_per_token": moved,
        }
        print(f"\n{name}: {memory_of(alone) / 1e9:.1f} GB; eight GPUs: {sent}, {in_loops} in loops")
        print(f"keeps {kept:.0f} kB per token, and moves, in kB per token:")
        for part in sorted(moved):
            print(f"{moved[part]:10.0f}  {part}")
        print(f"{sum(moved.values()):10.0f}  in all")
    save("h200_compiled", {"tokens_per_micro_batch": TOKENS, "steps": figures})


if __name__ == "__main__":
    main()
