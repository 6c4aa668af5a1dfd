"""The devices of a run, as a mesh with one axis, "data": each device trains on its own rows."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

REPLICATED = P()
BATCH = P(None, "data")  # [micro-batch, row, token]: rows are divided over the devices
ROWS = P("data")  # [row, token]


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of the first `num_devices` devices, or of all."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shapes_on(mesh: Mesh, spec: P, arrays: PyTree) -> PyTree:
    """The shapes and dtypes of arrays that will be on the mesh, to compile for or to load into."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


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
