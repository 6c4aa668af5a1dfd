"""How the devices of a mesh share work on a stack of matrices.

Muon's work is the same on every device; here each does its part of it, and all get the results.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from nanogpt.devices.mesh import DEVICES, REPLICATED

GROUP = 8  # matrices in one batched product, which fill a GPU if they are 768 x 768


def map_matrices(
    function: Callable[[Float[Array, "group I O"]], Float[Array, "group I O"]],
    matrices: Float[Array, "S I O"],
    mesh: Mesh | None,
    shard_params: bool,
) -> Float[Array, "S I O"]:
    """`function` of all matrices: group by group, each device its share of groups.

    A group is one batched product wherever it is computed. That is why the devices' results are
    those of one device to the bit, which products of differently large batches would not be.

    Args:
        mesh: devices that share the work; None for one that does it all.
        shard_params: whether devices along "data" hold parts of the matrices, which they then
            exchange for whole ones, and back.
    """
    S, devices = len(matrices), 1
    if mesh:
        devices = mesh.size if shard_params else mesh.shape["data"]
    # Devices without a group of their own would only lengthen what all gather: they do the work of
    # another instead. Parts of matrices that lie divided must reach every device anyway.
    fewest = devices if shard_params else min(devices, -(-S // GROUP))
    sharers = min(n for n in range(fewest, devices + 1) if devices % n == 0)
    groups = -(-S // (GROUP * sharers)) * sharers
    padding = [(0, groups * GROUP - S), (0, 0), (0, 0)]
    grouped = jnp.pad(matrices, padding).reshape(groups, GROUP, *matrices.shape[1:])

    def map_groups(share: Float[Array, "share group I O"]) -> Float[Array, "share group I O"]:
        return jax.lax.map(function, share)

    if mesh and shard_params:
        grouped = _exchanged(map_groups, grouped, mesh)
    elif mesh:
        grouped = _gathered(map_groups, grouped, mesh, sharers)
    else:
        grouped = map_groups(grouped)
    return grouped.reshape(-1, *matrices.shape[1:])[:S]


def _gathered(map_groups: Callable, grouped: Array, mesh: Mesh, sharers: int) -> Array:
    """All devices have all groups: so many work on different ones, and gather the results."""

    def share_of_whole(grouped: Float[Array, "groups group I O"]) -> Float[Array, "..."]:
        each = len(grouped) // sharers
        first = jax.lax.axis_index("data") % sharers * each
        share = jax.lax.dynamic_slice_in_dim(grouped, first, each)
        teams = np.arange(mesh.shape["data"]).reshape(-1, sharers).tolist()
        return jax.lax.all_gather(map_groups(share), "data", axis_index_groups=teams, tiled=True)

    return jax.shard_map(
        share_of_whole, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False
    )(grouped)


def _exchanged(map_groups: Callable, grouped: Array, mesh: Mesh) -> Array:
    """Devices have a part of every matrix: they exchange it for whole matrices, and back."""
    each_its_share = jax.shard_map(
        map_groups, mesh=mesh, in_specs=DEVICES, out_specs=DEVICES, check_vma=False
    )
    # One axis of the mesh at a time: that is what the compiler can do without gathering them all.
    lying = P(None, None, "data", "model")
    way = [NamedSharding(mesh, each) for each in (lying, P("data", None, None, "model"))]
    for step in way:
        grouped = jax.lax.with_sharding_constraint(grouped, step)
    grouped = each_its_share(grouped)
    for step in reversed(way):
        grouped = jax.lax.with_sharding_constraint(grouped, step)
    return grouped
