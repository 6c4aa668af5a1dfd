"""How the devices of a mesh share the work on a stack of matrices.

Instead of every device doing all of Muon's work, each does a part of it, and all get the results.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from nanogpt.devices.mesh import DEVICES, REPLICATED

GROUP = 8  # matrices in one batched product, enough to fill a GPU if they are 768 x 768


def map_matrices(
    function: Callable[[Float[Array, "group I O"]], Float[Array, "group I O"]],
    matrices: Float[Array, "S I O"],
    mesh: Mesh | None,
    shard_params: bool,
) -> Float[Array, "S I O"]:
    """Apply `function` to all matrices, group by group, each device to its share of the groups.

    A group is one batched product, whichever device computes it, so the results are bit for bit
    those of a single device; products with other batch sizes would differ.

    Args:
        mesh: devices that share the work; None for a single device.
        shard_params: whether the matrices are sharded along "data"; devices then exchange their
            shards for whole matrices, and back.
    """
    S, devices = len(matrices), 1
    if mesh:
        devices = mesh.size if shard_params else mesh.shape["data"]
    # A device without a group would only make the gathered array longer, so it repeats another's
    # work instead. Sharded matrices must be exchanged with every device anyway.
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
    """Map replicated groups: `sharers` devices compute different groups and gather the results."""

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
    """Map sharded groups: devices exchange their shards for whole matrices, and back."""
    each_its_share = jax.shard_map(
        map_groups, mesh=mesh, in_specs=DEVICES, out_specs=DEVICES, check_vma=False
    )
    # One mesh axis at a time, which the compiler can do without gathering whole arrays.
    lying = P(None, None, "data", "model")
    way = [NamedSharding(mesh, each) for each in (lying, P("data", None, None, "model"))]
    for step in way:
        grouped = jax.lax.with_sharding_constraint(grouped, step)
    grouped = each_its_share(grouped)
    for step in reversed(way):
        grouped = jax.lax.with_sharding_constraint(grouped, step)
    return grouped
