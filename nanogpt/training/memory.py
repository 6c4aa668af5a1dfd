"""Estimates of a run's device memory, from shapes, before anything is compiled."""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from nanogpt.config import Kernels
from nanogpt.devices.hardware import activation_bytes
from nanogpt.devices.sharding import ROUNDED, num_parts
from nanogpt.model.parameters import is_table
from nanogpt.training.step import param_shapes

if TYPE_CHECKING:
    from optax import GradientTransformation

    from train_gpt import Hyperparameters

USABLE = 15 / 16  # share of the memory; the rest is for compiled programs and fragmentation


def row_bytes(hp: "Hyperparameters", kernels: Kernels) -> float:
    """Estimate the bytes of activations for a row of sequence_length tokens."""
    T, flash = hp.sequence_length, kernels.attention != "xla"
    return T * activation_bytes(hp.model, T, hp.dtype, flash, kernels.rematerialize)


class Sizes(NamedTuple):
    """The memory a run needs besides activations."""

    num_parameters: int
    state: int
    """Bytes of parameters and optimizer state."""
    device_state: int
    """Bytes of these on each device."""
    working: int
    """Bytes on each device for gradients, accumulated in float32, and for the parameters used in
    computation: copies in the run's dtype, and gathered ones of tables that are sharded. In float32
    nothing is copied, but the gradients of a micro-batch, before they are added, are as large."""


def room_beside(sizes: Sizes, memory: float | None) -> float | None:
    """Return the bytes left for activations on a device; None if its memory is unknown."""
    return memory and USABLE * memory - sizes.device_state - sizes.working


def sizes_of(
    hp: "Hyperparameters",
    optimizer: "GradientTransformation",
    readers: int,
    sharers: int,
    shard_params: bool,
) -> Sizes:
    """Return the sizes for `readers` devices along "data" and `sharers` along "model".

    Raises ConfigError if an array cannot be sharded evenly.
    """

    params = param_shapes(hp.model)
    optimizer_state = jax.eval_shape(optimizer.init, params)
    state = device_state = working = 0
    for path, array in jax.tree.leaves_with_path((params, optimizer_state)):
        num_bytes = array.size * array.dtype.itemsize
        state += num_bytes
        parts = num_parts(path, array, {"data": readers, "model": sharers}, shard_params)
        device_state += num_bytes // parts
    for path, param in jax.tree.leaves_with_path(params):
        sharded = num_parts(path, param, {"data": readers, "model": 1}, shard_params) > 1
        used = jnp.dtype(hp.dtype).itemsize
        if is_table(path) and not sharded:  # used as it is
            used = 0
        elif is_table(path) and path[-1].key not in ROUNDED:  # float32 in any run
            used = 4
        num_bytes = param.size * (4 + used)
        working += num_bytes // num_parts(path, param, {"data": 1, "model": sharers}, False)
    num_parameters = sum(param.size for param in jax.tree.leaves(params))
    return Sizes(num_parameters, state, device_state, working)
