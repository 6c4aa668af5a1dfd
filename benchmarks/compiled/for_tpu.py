"""Compiling the programs of a run for TPUs, on a machine without TPUs."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jax.stages import Lowered

from benchmarks.compiled.lowering import lowered_for
from nanogpt.data.dataset import Dataset
from nanogpt.training.plan import Hardware, Plan, make_plan
from train_gpt import Hyperparameters

GiB = 2**30
NO_DATA = Dataset("no data", (), (), (), ())


@dataclass(frozen=True)
class Chip:
    """A kind of TPU as XLA describes it, and what else a prediction needs."""

    memory: float
    """Bytes of HBM that XLA allows a program, as it reports when one is too large."""
    slices: dict[int, str]
    """Topology of a slice, by its number of chips."""
    host: tuple[int, int, int]
    """Chips per host, along each axis."""
    flops_per_cycle: int
    """FLOPs per cycle of its matrix units in bfloat16; hardware.py's peak over it is the clock."""
    link: float
    """Bytes per second of one link in one direction, from Google Cloud's documentation."""


CHIPS = {
    "v5e": Chip(15.75 * GiB, {1: "1x1", 8: "2x4", 64: "8x8"}, (2, 4, 1), 4 * 2 * 128**2, 45e9),
    "v6e": Chip(31.25 * GiB, {1: "1x1", 8: "2x4", 64: "8x8"}, (2, 4, 1), 4 * 2 * 256**2, 90e9),
    "v5p": Chip(95.74 * GiB, {1: "1x1x1", 8: "2x2x2", 64: "4x4x4"}, (2, 2, 1), 2**18, 90e9),
}


def devices_of(chip: str, count: int) -> list[jax.Device]:
    """Return the devices of a slice that is not present."""
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{chip}:{CHIPS[chip].slices[count]}",
        chips_per_host_bounds=(1, 1, 1) if count == 1 else CHIPS[chip].host,
    ).devices


def plan_on(hp: Hyperparameters, chip: str, count: int) -> Plan:
    """Return the plan of a run on a slice."""
    kind = devices_of(chip, count)[0].device_kind
    hardware = Hardware(kind, count, 1, CHIPS[chip].memory)
    return make_plan(hp, hardware, NO_DATA, "splash", "splash attention")


def lowered_on(plan: Plan, chip: str, stage: int) -> dict[str, Lowered]:
    """Lower the training step and the validation of a stage for the slice."""
    devices = np.array(devices_of(chip, plan.num_devices)).reshape(plan.readers, plan.sharers)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return lowered_for(mesh, plan, stage)
