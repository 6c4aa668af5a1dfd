"""The plan of a run, decided once, before anything is compiled.

`plan_here` inspects the devices, the data and the attention kernels of this machine; `make_plan`
decides everything from these and the hyperparameters. A plan is data: it can be printed, compared
and tested without compiling anything.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import gcd, inf
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from nanogpt.config import AttentionKernel, ConfigError, Kernels
from nanogpt.data.dataset import Dataset, find_dataset
from nanogpt.devices.hardware import (
    check_size,
    device_memory,
    fewer,
    largest_batch,
    multiplies_bfloat16,
    row_fits,
    utilization,
)
from nanogpt.devices.processes import check_same, least
from nanogpt.devices.sharding import check_shared
from nanogpt.model.attention import choose_attention
from nanogpt.optim.groups import make_optimizer
from nanogpt.training.memory import USABLE, room_beside, row_bytes, sizes_of
from nanogpt.training.stages import (
    StagePlan,
    division,
    rows_asked,
    stages_of,
    with_whole_passes,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from optax import GradientTransformationExtraArgs

    from train_gpt import Hyperparameters


@dataclass(frozen=True)
class Hardware:
    """The devices that JAX finds."""

    kind: str
    count: int
    processes: int
    memory: float | None
    """Bytes that JAX may use on each device; None if unknown, as on CPUs."""
    bfloat16: bool = True
    """Whether the devices have units for bfloat16."""


@dataclass(frozen=True)
class Plan:
    """Everything a run will do."""

    hp: "Hyperparameters"
    hardware: Hardware
    dataset: Dataset
    stages: tuple[StagePlan, ...]
    readers: int
    """Number of devices along "data", which train on different rows."""
    sharers: int
    """Number of devices along "model", which share the same rows."""
    shard_params: bool
    """Whether parameters are sharded: as the settings ask, or because a row would not fit."""
    kernels: Kernels
    attention: str
    """The attention kernel and the reason for it, in words."""
    batch_size: int
    """Rows of sequence_length tokens per device in one forward and backward pass."""
    row_bytes: float
    """Approximate bytes of activations for such a row."""
    num_parameters: int
    state_bytes: int
    """Bytes of parameters and optimizer state."""
    device_state_bytes: int
    """Bytes of these on each device."""
    working_bytes: int
    """Bytes on each device for gradients and for the parameters used in computation."""

    def shape(self, stage: int) -> tuple[int, int]:
        """Return Ng, the micro-batches per step, and R, the rows of each over all devices."""
        each = self.stages[stage]
        R = self.batch_size * self.hp.sequence_length // each.row_length * self.readers
        return each.tokens_per_step // (R * each.row_length), R

    def smaller(self) -> "Plan | None":
        """Return a plan for the same run that needs less memory; None if there is none.

        It has smaller micro-batches, or if they are single rows already, it recomputes layers in
        the backward pass, unless the settings decide that.
        """
        if self.batch_size > 1:
            return replace(self, batch_size=fewer(self.batch_size))
        if self.kernels.rematerialize or self.hp.rematerialize is not None:
            return None
        kernels = replace(self.kernels, rematerialize=True)
        return replace(self, kernels=kernels, row_bytes=row_bytes(self.hp, kernels))

    @property
    def num_devices(self) -> int:
        """Number of devices of the run."""
        return self.readers * self.sharers

    @property
    def activation_bytes(self) -> float:
        """Approximate bytes of activations on each device."""
        return self.batch_size * self.row_bytes

    @property
    def device_bytes(self) -> float:
        """Approximate bytes of everything on each device."""
        return self.device_state_bytes + self.working_bytes + self.activation_bytes

    def validates(self, step: int) -> bool:
        """Return whether to validate after a step."""
        return due(step, self.hp.val_loss_every, self.hp.num_steps)

    def saves(self, step: int, minutes: float = 0.0) -> bool:
        """Return whether to save the state after a step, this many minutes after the last save."""
        hp = self.hp
        return (
            due(step, hp.checkpoint_every, hp.num_steps)
            or (hp.keep_best and self.validates(step))
            or (hp.checkpoint_minutes is not None and minutes >= hp.checkpoint_minutes)
        )

    def utilization(self, step: int, tokens_per_s: float) -> float | None:
        """Return the MFU of a step at this speed, from 0 to 1; None on unknown devices."""
        flops = self.stages[self.hp.schedule.stage(step)].flops_per_token
        return utilization(tokens_per_s, flops, self.hardware.kind, self.num_devices)


def due(step: int, every: int, last: int) -> bool:
    """Return whether a step is a multiple of `every` (0: never) or the last one."""
    return step == last or (every > 0 and step % every == 0)


def plan_here(hp: "Hyperparameters") -> Plan:
    """Plan a run on this machine; with several processes, the plan is the same in all of them.

    Raises ConfigError, ShardError or CorpusError if the run is impossible here.
    """
    shared = replace(hp, coordinator_address=None, num_processes=None, process_id=None)
    check_same("settings", [(name, repr(value)) for name, value in asdict(shared).items()])
    hardware = hardware_here()
    hardware = replace(hardware, memory=least(hardware.memory))  # all must plan alike
    parts = hardware.count if hp.shard_params or hp.mesh or hardware.memory else 1
    check_size(hp.model, hp.sequence_length, parts, hardware.memory)
    readers, _ = division(hp.mesh, hardware.count)
    stages = stages_of(hp, readers)
    dataset = find_dataset(
        hp.train_files,
        hp.val_files,
        ", ".join(hp.data) or hp.train_files or "",
        hp.tokenizer,
        hp.model.vocab_size,
        hp.verify_data,
    )
    check_same("data", dataset.contents(hp.verify_data))
    if hp.val_tokens > (available := max(1, dataset.val_tokens - 1)):
        warning = f"val_tokens is reduced from {hp.val_tokens:,} to {available:,}, all there are"
        hp = replace(hp, val_tokens=available)
        dataset = replace(dataset, warnings=(*dataset.warnings, warning))
    models = [model for stage in stages for model in (stage.model, stage.used_model)]
    attention, line = choose_attention(models, hp.sequence_length, hp.dtype)
    alike = "use the same kind of device and the same packages in all"
    check_same("attention", [(f"here {line}", attention)], alike)
    return make_plan(hp, hardware, dataset, attention, line)


def hardware_here() -> Hardware:
    """Return the devices that JAX finds, with the memory of this process's first one."""
    device = jax.local_devices()[0]
    return Hardware(
        device.device_kind,
        jax.device_count(),
        jax.process_count(),
        device_memory(device),
        multiplies_bfloat16(device),
    )


def fits(hp: "Hyperparameters", hardware: Hardware) -> bool:
    """Return whether one row fits into the memory of each device, with the fastest attention.

    Settings that are impossible with this number of devices are left for the plan to refuse.
    """
    attention: AttentionKernel = "pallas" if hardware.bfloat16 else "xla"
    with suppress(ConfigError):
        readers, _ = division(hp.mesh, hardware.count)
        hp = with_whole_passes(replace(hp, batch_size=1), readers)
        plan = make_plan(hp, hardware, Dataset("", (), (), (), ()), attention, "")
        return plan.device_bytes <= USABLE * (hardware.memory or inf)
    return True


def make_plan(
    hp: "Hyperparameters",
    hardware: Hardware,
    dataset: Dataset,
    attention: AttentionKernel,
    attention_line: str,
) -> Plan:
    """Plan a run for this hardware, data and attention kernel.

    Raises ConfigError if the settings are not possible with them.
    """
    if hp.checkpoint_minutes is not None and hardware.processes > 1:
        raise ConfigError(
            f"checkpoint_minutes cannot be {hp.checkpoint_minutes:g} with {hardware.processes} "
            "processes, whose clocks differ: set checkpoint_every, in steps."
        )
    readers, sharers = division(hp.mesh, hardware.count)
    stages = stages_of(hp, readers)
    check_shared(hp.model, [stage.row_length for stage in stages], sharers)
    kernels = Kernels(
        attention, hp.loss_kernel, hp.fp8_head, bool(hp.rematerialize), tensor_parallel=sharers > 1
    )
    of_row = row_bytes(hp, kernels)
    sizes_if = partial(sizes_of, hp, optimizer_of(hp), readers, sharers)
    shard_params, sizes = hp.shard_params, sizes_if(hp.shard_params)
    if readers > 1 and not row_fits(of_row, room_beside(sizes, hardware.memory)):
        with suppress(ConfigError):  # an array that the devices cannot share evenly
            shard_params, sizes = True, sizes_if(True)
    room = room_beside(sizes, hardware.memory)
    if hp.rematerialize is None and not row_fits(of_row, room):
        kernels = replace(kernels, rematerialize=True)
        of_row = row_bytes(hp, kernels)
    rows = gcd(*(stage.tokens_per_step // hp.sequence_length for stage in stages)) // readers
    return Plan(
        hp=hp,
        hardware=hardware,
        dataset=dataset,
        stages=stages,
        readers=readers,
        sharers=sharers,
        shard_params=shard_params,
        kernels=kernels,
        attention=attention_line,
        batch_size=rows_asked(hp, readers) or largest_batch(rows, of_row, room),
        row_bytes=of_row,
        num_parameters=sizes.num_parameters,
        state_bytes=sizes.state,
        device_state_bytes=sizes.device_state,
        working_bytes=sizes.working,
    )


def optimizer_of(
    hp: "Hyperparameters", mesh: "Mesh | None" = None, shard_params: bool = False
) -> "GradientTransformationExtraArgs":
    """Build the optimizer of the run; Muon computes in bfloat16 on accelerators."""
    on_accelerator = mesh is not None and mesh.devices.flat[0].platform != "cpu"
    return make_optimizer(
        learning_rate=hp.learning_rate,
        weight_decay=hp.weight_decay,
        adam=hp.adam,
        adam_every=hp.adam_every,
        mlp_out_factor=hp.mlp_out_factor,
        neuron_decay=hp.neuron_decay,
        head_groups=hp.head_groups,
        newton_schulz_dtype=jnp.bfloat16 if on_accelerator else jnp.float32,
        mesh=mesh,
        shard_params=shard_params,
    )
