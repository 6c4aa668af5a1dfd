"""Compiling the programs of a run for TPUs on a machine without any."""

from dataclasses import dataclass

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from nanogpt.data.dataset import Dataset
from nanogpt.training.plan import Hardware, Plan, make_plan
from train_gpt import Hyperparameters

GiB = 2**30
UNREAD = Dataset("no data", (), (), (), "")


@dataclass(frozen=True)
class Chip:
    """A kind of TPU: what XLA knows of it, and what is published of its links."""

    memory: float
    """Bytes of HBM that XLA lets a program have, as its own errors tell."""
    slices: dict[int, str]
    """Shapes of slices by their number of chips."""
    host: tuple[int, int, int]
    """Chips of a host."""


CHIPS = {
    "v5e": Chip(15.75 * GiB, {1: "1x1", 8: "2x4", 64: "8x8"}, (2, 4, 1)),
    "v6e": Chip(31.25 * GiB, {1: "1x1", 8: "2x4", 64: "8x8"}, (2, 4, 1)),
    "v5p": Chip(95.74 * GiB, {1: "1x1x1", 8: "2x2x2", 64: "4x4x4"}, (2, 2, 1)),
}


def devices_of(chip: str, count: int) -> list:
    """The devices of a slice that is not there."""
    shape, host = CHIPS[chip].slices[count], CHIPS[chip].host
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{chip}:{shape}",
        chips_per_host_bounds=(1, 1, 1) if count == 1 else host,
    ).devices


def plan_on(hp: Hyperparameters, chip: str, count: int) -> Plan:
    """What a run would do on a slice."""
    kind = devices_of(chip, count)[0].device_kind
    return make_plan(hp, Hardware(kind, count, 1, CHIPS[chip].memory), UNREAD, "splash", "splash")


def mesh_of(plan: Plan, chip: str) -> Mesh:
    """The slice as the mesh of a run."""
    devices = np.array(devices_of(chip, plan.num_devices)).reshape(plan.readers, plan.sharers)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
