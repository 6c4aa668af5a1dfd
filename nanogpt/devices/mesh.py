"""The devices of a run, as a mesh with two axes, "data" and "model".

Devices along "data" train on different rows; those along "model" share the work on the same rows
(see nanogpt/devices/sharding.py), and there is one of them unless asked otherwise.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from nanogpt.config import ConfigError

REPLICATED = P()
BATCH = P(None, "data")  # [micro-batch, row, token]: rows are divided over the devices
ROWS = P("data")  # [row, token]
DEVICES = P(("data", "model"))  # a part for each device


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """A mesh of the first `data * model` devices; without `data`, of as many as there are.

    Raises:
        ConfigError: there are fewer devices.
    """
    devices = jax.devices()
    data = data or len(devices) // model or 1
    if data * model > len(devices):
        raise ConfigError(
            f"A mesh of data={data},model={model} needs {data * model} devices, but JAX finds "
            f"{len(devices)}."
        )
    return jax.make_mesh(
        (data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices[: data * model]
    )


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
    # JAX's type has None as an index, too, which it never gives.
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)  # pyrefly: ignore
