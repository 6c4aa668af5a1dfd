"""How parameters are sharded, and what devices communicate to compute with the shards.

A mesh has two axes. Devices along "data" train on different rows. Devices along "model" share the
heads and MLPs of the same rows (tensor parallelism: Megatron-LM, arXiv:1909.08053):

    qkv, up, gate        sharded by output: each device computes its heads, or its part of F
    out, down            sharded by input: each device's product is a term of an all-reduce
    value embeddings     sharded by output: each device looks up the channels of its heads
    head                 replicated: each device computes the loss of its part of the tokens
    all others           replicated, and all devices compute the same with them

Devices along "data" shard embeddings and head, and with them their gradients and optimizer state
(ZeRO-3: arXiv:1910.02054, FSDP: arXiv:2304.11277): most of the state, and of Adam's work. With
`shard_params` they shard all large parameters, 16 bytes or more per weight. Shards are all-gathered
layer by layer, 2 bytes per weight in bfloat16, and kept from the first forward pass of a step to
its last backward pass: they are sent once, however many micro-batches there are, while freeing a
layer in between would mean sending it again.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree, Shaped

from nanogpt.config import ConfigError, GPTConfig

# The mesh axes over which the last two axes of a parameter, inputs and outputs, are sharded.
LAYOUT = {
    "attention.qkv": P("data", "model"),  # [3, D, N H]
    "attention.out": P(("model", "data"), None),  # [N H, D]
    "attention.gate": P(None, "model"),  # [inputs, N]
    "value_gate": P(None, "model"),
    "mlp.up": P("data", "model"),  # [D, F]
    "mlp.down": P("model", "data"),  # [F, D]
    "value_embed": P("data", "model"),  # [tables, V, N H]
    "bigram_embed": P("data", None),
    "embed": P("data", None),
    "head": P(None, "data"),  # like the embedding, whose gradient it may share
}
# Sharded along "data" without `shard_params`, too, if their rows can be divided evenly.
ALWAYS_SHARDED = ("value_embed", "bigram_embed", "embed", "head")
# Tables whose rows are rounded to the run's dtype wherever they are used.
ROUNDED = ("value_embed", "bigram_embed")
# Parameters that are replicated along "model", but used by each device for its own heads or tokens.
USED_IN_PARTS = ("head", "own_share", "mixed_share", "out_share")

Path = tuple[jax.tree_util.KeyEntry, ...]


def _names(path: Path) -> list[str]:
    """Return the names in a path, without the numbers of separate layers."""
    return [key.key for key in path if isinstance(getattr(key, "key", None), str)]


def spec_of(
    path: Path,
    array: Array | jax.ShapeDtypeStruct,
    devices: Mapping[str, int],
    shard_params: bool,
) -> P:
    """Return how a parameter, or its optimizer state, is sharded; their paths end the same way.

    `devices` has the number of devices along each mesh axis. Axes of size 1, as in means, are not
    sharded, nor are the axes of stacks.
    """
    names = _names(path)
    layout = LAYOUT.get(".".join(names[-2:])) or LAYOUT.get("".join(names[-1:]))
    if layout is None or array.ndim < 2:
        return P()
    dividing: list[str | tuple[str, ...] | None] = []
    for size, axes in zip(array.shape[-2:], layout, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        even = names[-1] in ALWAYS_SHARDED and size % devices["data"] == 0
        use = {"model": True, "data": shard_params or even}
        here = [axis for axis in axes if size > 1 and devices[axis] > 1 and use[axis]]
        dividing.append(tuple(here) if len(here) > 1 else here[0] if here else None)
    return P(*[None] * (array.ndim - 2), *dividing)


def specs(arrays: PyTree, mesh: Mesh, shard_params: bool) -> PyTree:
    """Return the `spec_of` each array in a tree of parameters or of training state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, array: spec_of(path, array, mesh.shape, shard_params), arrays
    )


def shardings(arrays: PyTree, mesh: Mesh, shard_params: bool) -> PyTree:
    """Return the sharding of each array in a tree of parameters or of training state.

    Raises:
        ConfigError: if an array cannot be sharded evenly; the message names it.
    """

    def sharding(path: Path, array: Array | jax.ShapeDtypeStruct) -> NamedSharding:
        num_parts(path, array, mesh.shape, shard_params)
        return NamedSharding(mesh, spec_of(path, array, mesh.shape, shard_params))

    return jax.tree_util.tree_map_with_path(sharding, arrays)


def num_parts(
    path: Path,
    array: Array | jax.ShapeDtypeStruct,
    devices: Mapping[str, int],
    shard_params: bool,
) -> int:
    """Return the number of shards of an array, for the number of devices along each mesh axis.

    Raises:
        ConfigError: if it cannot be sharded evenly; the message names it.
    """
    parts = 1
    spec = spec_of(path, array, devices, shard_params)
    for size, axes in zip(array.shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        among = prod(devices[axis] for axis in axes)
        if size % among:
            by = " * ".join(f"{axis}={devices[axis]}" for axis in axes)
            raise ConfigError(
                f"The {size:,} rows or columns of {'.'.join(_names(path))} cannot be divided "
                f"by {by}: choose another mesh or model size, or leave out shard_params."
            )
        parts *= among
    return parts


def check_shared(config: GPTConfig, row_lengths: Sequence[int], devices: int) -> None:
    """Raise ConfigError if a model and its rows cannot be split over devices along "model"."""
    if devices > 1 and (config.value_layers or config.dynamic):
        raise ConfigError(
            f"This model cannot be split over {devices} devices along model, because each head "
            "needs whole value embeddings: leave out --mesh, or use --shard-params."
        )
    heads, pairs = config.num_heads, config.num_heads // 2
    for what, count in (
        ("Pairs of heads (num_heads / 2)", pairs) if config.paired_heads else ("num_heads", heads),
        ("mlp_width", config.mlp_width),
        *(("Tokens per row", T) for T in row_lengths),
    ):
        if count % devices:
            raise ConfigError(
                f"{what}: {count} cannot be split over {devices} devices; use another "
                "mesh, or another model size."
            )


def _data_axis(spec: P) -> int | None:
    """Return the axis of an array that is sharded along "data", or None."""
    dividing = (i for i, axes in enumerate(spec) if axes and "data" in axes)
    return next(dividing, None)


def gathered(parts: PyTree, placed: PyTree, dtype: str) -> PyTree:
    """All-gather the arrays that are sharded along "data"; in `jax.shard_map`.

    Rows that are rounded to `dtype` when used are sent in it.
    """

    def gather(path: Path, part: Float[Array, "..."], spec: P) -> Float[Array, "..."]:
        if (axis := _data_axis(spec)) is None:
            return part
        sent = part.astype(dtype) if path[-1].key in ROUNDED else part
        return jax.lax.all_gather(sent, "data", axis=axis, tiled=True).astype(part.dtype)

    return jax.tree_util.tree_map_with_path(gather, parts, placed)


def reduced(gradients: PyTree, placed: PyTree) -> PyTree:
    """Average the devices' gradients over "data", each device keeping its shard.

    The counterpart of `gathered`, in `jax.shard_map`.
    """
    sum_of_part = partial(jax.lax.psum_scatter, axis_name="data", tiled=True)

    def reduce(path: Path, gradient: Float[Array, "..."], spec: P) -> Float[Array, "..."]:
        if path[-1].key in USED_IN_PARTS:
            gradient = sum_over_model(gradient)
        if (axis := _data_axis(spec)) is None:
            return jax.lax.pmean(gradient, "data")
        if gradient.ndim == 3:  # each matrix by itself: for stacks, TPUs send twice as much
            summed = jnp.stack([sum_of_part(x, scatter_dimension=axis - 1) for x in gradient])
        else:
            summed = sum_of_part(gradient, scatter_dimension=axis)
        return summed / jax.lax.axis_size("data")

    return jax.tree_util.tree_map_with_path(reduce, gradients, placed)


def sum_over_model(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sum x over the devices along "model"; in `jax.shard_map`."""
    return jax.lax.psum(x, "model") if jax.lax.axis_size("model") > 1 else x


@jax.custom_vjp
def to_parts(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x, which each device along "model" uses for its part; their gradients are summed."""
    return x


@jax.custom_vjp
def from_parts(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sum the results of devices along "model"; the gradient is passed to each unchanged."""
    return sum_over_model(x)


to_parts.defvjp(lambda x: (x, None), lambda _, g: (sum_over_model(g),))
from_parts.defvjp(lambda x: (from_parts(x), None), lambda _, g: (g,))


def share_of_row(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B part ..."]:
    """Return this device's part of the tokens of each row, which are split along "model"."""
    T = x.shape[1] // jax.lax.axis_size("model")
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("model") * T, T, axis=1)
