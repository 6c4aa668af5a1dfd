"""Compiling the training step for H200s, on a machine without GPUs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jax.stages import Compiled, Lowered

from benchmarks.compiled.lowering import lowered_for
from nanogpt.config import GPTConfig, Kernels
from nanogpt.devices.mesh import BATCH, shapes_on
from nanogpt.schedule import Rates
from nanogpt.training.plan import Plan, optimizer_of
from nanogpt.training.step import graph_of, make_init, make_train_step
from train_gpt import PRESETS, Hyperparameters

# What XLA needs to know about a device, from NVIDIA's data sheet and CUDA's deviceQuery.
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


def mesh_of(num_devices: int, model_devices: int = 1) -> Mesh:
    """Return a mesh of H200s, eight per host, of which `model_devices` share each row."""
    per_host = min(num_devices, 8)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x{num_devices // per_host}x{per_host}"
    )
    devices = np.array(topology.devices).reshape(-1, model_devices)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@contextmanager
def lowering_for(mesh: Mesh) -> Iterator[None]:
    """Make JAX lower for this mesh, and for its devices' version of cuDNN.

    JAX asks the driver whether cuDNN supports an operation; here there is no driver.
    """
    with ExitStack() as stack:
        cudnn = "jax._src.cudnn.fused_attention_stablehlo"
        for name, answer in {
            "check_cudnn_version": 91000,
            "check_compute_capability": True,
            "is_cuda_compute_capability_equal": False,
        }.items():
            stack.enter_context(patch(f"{cudnn}.{name}", lambda *a, answer=answer, **k: answer))
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        yield


def compile_step(
    config: GPTConfig,
    kernels: Kernels,
    *,
    num_devices: int = 1,
    model_devices: int = 1,
    batch_size: int = 4,
    sequence_length: int = 16_384,
    accumulation_steps: int = 2,
    num_targets: int = 1,
    tied_head: bool = False,
    hp: Hyperparameters = PRESETS["speedrun"],
) -> Compiled:
    """Compile a training step in bfloat16 for `num_devices` H200s, eight per host.

    Only the optimizer and shard_params are taken from `hp`. `model_devices` of the devices share
    each row.
    """
    mesh = mesh_of(num_devices, model_devices)
    optimizer = optimizer_of(hp, mesh, hp.shard_params)
    init = make_init(config, optimizer, mesh, hp.shard_params)
    state = jax.eval_shape(init, jax.random.key(0))
    rows = batch_size * num_devices // model_devices
    shape = jax.ShapeDtypeStruct((accumulation_steps, rows, sequence_length + 1), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    rates = Rates(number, number, (number,) * num_targets)
    graph = graph_of(config, kernels)
    step = make_train_step(
        graph, optimizer, mesh, "bfloat16", shard_params=hp.shard_params, tied_head=tied_head
    )
    with lowering_for(mesh):
        return step.lower(state, shapes_on(mesh, BATCH, shape), rates).compile()


def lowered_on(plan: Plan, stage: int) -> dict[str, Lowered]:
    """Lower the training step and the validation of a stage, counted from 0, for H200s."""
    mesh = mesh_of(plan.num_devices, plan.sharers)
    with lowering_for(mesh):
        return lowered_for(mesh, plan, stage)


TOKENS = 65_536  # per device and micro-batch: 4 rows of 16,384


def compile_stage(
    hp: Hyperparameters, stage: int, kernels: Kernels, num_devices: int = 1, tokens: int = TOKENS
) -> Compiled:
    """Compile the training step of a stage, counted from 0, with two micro-batches.

    `tokens` is the number of tokens per device and micro-batch.
    """
    T = hp.schedule.row_length(stage)
    return compile_step(
        hp.schedule.model(hp.model, stage),
        kernels,
        num_devices=num_devices,
        batch_size=tokens // T,
        sequence_length=T,
        num_targets=len(hp.stages[stage].target_weights),
        tied_head=hp.schedule.ties_head(hp.model, stage),
        hp=hp,
    )
