"""The devices of a run, as a mesh with two axes, "data" and "model".

Devices along "data" train on different rows; devices along "model" share the work on the same rows
(see nanogpt/devices/sharding.py). By default the "model" axis has size 1.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from nanogpt.config import ConfigError

REPLICATED = P()
BATCH = P(None, "data")  # [micro-batch, row, token], sharded over rows
ROWS = P("data")  # [row, token]
DEVICES = P(("data", "model"))  # sharded over all devices


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """Make a mesh of the first `data * model` devices; by default `data` uses all of them.

    Raises:
        ConfigError: if there are fewer devices.
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
    """Return shapes and dtypes of arrays as placed on the mesh, for compiling or loading."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)


def put(
    mesh: Mesh,
    spec: P,
    shape: tuple[int, ...],
    read: Callable[[tuple[slice, ...]], Int[np.ndarray, "..."]],
) -> Int[Array, "..."]:
    """Make an array of `shape` on the mesh; `read(index)` returns the part of a local device.

    A process reads only the rows of its own devices.
    """
    # In JAX's type an index can be None, which it never is.
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)  # pyrefly: ignore
