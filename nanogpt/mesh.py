"""The devices of a run, as a mesh with one axis, "data": each device trains on its own rows."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

BATCH = P(None, "data")  # [micro-batch, row, token]: rows are divided over the devices
ROWS = P("data")  # [row, token]


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of the first `num_devices` devices, or of all."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def shape_on(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """What `put` will return, to compile for it."""
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(mesh, spec))


def put(
    mesh: Mesh,
    spec: P,
    shape: tuple[int, ...],
    read: Callable[[tuple[slice, ...]], Int[np.ndarray, "..."]],
) -> Int[Array, "..."]:
    """An array of `shape` over the mesh; `read` gives the part at an index, for each device here.

    No process reads, or holds, the rows of another's devices.
    """
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)
