"""What a run needs of a device's memory, reckoned from shapes before anything is compiled."""

from typing import TYPE_CHECKING, NamedTuple

import jax

from nanogpt.config import Kernels
from nanogpt.devices.hardware import activation_bytes
from nanogpt.devices.sharding import num_parts
from nanogpt.model.parameters import compute_copy
from nanogpt.training.step import init_params

if TYPE_CHECKING:
    from optax import GradientTransformation

    from train_gpt import Hyperparameters

USABLE = 15 / 16  # of the memory; the rest is for compiled programs and for gaps between arrays


def row_bytes(hp: "Hyperparameters", kernels: Kernels) -> float:
    """Bytes of activations that a row of sequence_length tokens needs, about."""
    T, flash = hp.sequence_length, kernels.attention != "xla"
    return T * activation_bytes(hp.model, T, hp.dtype, flash, kernels.rematerialize)


class Sizes(NamedTuple):
    """What stays in memory while a run computes its activations."""

    num_parameters: int
    state: int
    """Bytes of parameters and optimizer state."""
    device_state: int
    """What each device holds of them."""
    working: int
    """Bytes on each device of the gradients, added up in float32, and of what the parameters are
    computed with: copies in the dtype of the run, or with shard_params all that was gathered."""


def sizes_of(
    hp: "Hyperparameters", optimizer: "GradientTransformation", readers: int, sharers: int
) -> Sizes:
    """The sizes for so many devices that read different rows, and so many that share each.

    Raises ConfigError where the devices cannot divide an array evenly.
    """

    def init(key: jax.Array) -> tuple:
        params = init_params(hp.model, key)
        return params, optimizer.init(params), compute_copy(params, hp.dtype)

    params, optimizer_state, copies = jax.eval_shape(init, jax.random.key(0))
    state = device_state = working = 0
    for path, array in jax.tree.leaves_with_path((params, optimizer_state)):
        num_bytes = array.size * array.dtype.itemsize
        state += num_bytes
        parts = num_parts(path, array, {"data": readers, "model": sharers}, hp.shard_params)
        device_state += num_bytes // parts
    leaves = jax.tree.leaves_with_path(params)
    for (path, param), copy in zip(leaves, jax.tree.leaves(copies), strict=True):
        copied = hp.shard_params or copy.dtype != param.dtype
        num_bytes = param.size * (4 + (copy.dtype.itemsize if copied else 0))
        working += num_bytes // num_parts(path, param, {"data": 1, "model": sharers}, False)
    return Sizes(sum(param.size for _, param in leaves), state, device_state, working)
