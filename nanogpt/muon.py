"""Muon: momentum whose every matrix is orthogonalised before it is applied.

An update of a hidden matrix by plain momentum has a few large singular values and many small ones;
Muon sets them all to about one, so that every direction learns at the same rate
(Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024).

Here it is an Optax transformation for parameters whose last two axes are matrices [I, O] (inputs,
outputs) and whose other axes stack them. The devices of a mesh share all matrices of one shape
between them.
"""

from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from nanogpt.mesh import REPLICATED, ROWS

# p(s) = a s + b s³ + c s⁵, five times over, takes singular values from (0, 1] to about 0.7 ... 1.2
# (Jordan's coefficients: the steepest rise from zero that does not leave that band).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

GROUP = 8  # matrices in one batched product, which fill a GPU if they are 768 x 768


class MuonState(NamedTuple):
    """Momentum of every parameter, float32, and how many updates were made."""

    count: Int[Array, ""]
    momentum: optax.Updates


def orthogonalize(
    matrices: Float[Array, "*stack I O"], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "*stack I O"]:
    """About U Vᵀ for each matrix U S Vᵀ, by Newton-Schulz iteration in `dtype`.

    The singular values of the result lie between about 0.7 and 1.2, except that those which were
    below about a thousandth of the matrix's norm are still on their way up.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.astype(jnp.float32)
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products below are then of the smaller size
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).astype(matrices.dtype)


def scale_by_muon(
    momentum: optax.Schedule, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, O / I)) for each matrix [I, O].

    Args:
        momentum: the decay of the running mean of gradients, by count of updates.
        dtype: in which Newton-Schulz runs; bfloat16 is accurate enough, and fast where there are
            matrix units for it.
        mesh: devices that share the work; each takes its part of every stack, and the results are
            the same to the bit as when one device does it all.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        del params
        decay = momentum(state.count)
        mean = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, state.momentum, gradients)
        ahead = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, mean, gradients)
        leaves, structure = jax.tree.flatten(ahead)
        updates = jax.tree.unflatten(structure, _orthogonalize_by_shape(leaves, dtype, mesh))
        return updates, MuonState(state.count + 1, mean)

    return optax.GradientTransformation(init, update)


def _orthogonalize_by_shape(
    leaves: list[Array], dtype: jnp.dtype, mesh: Mesh | None
) -> list[Array]:
    """The leaves, orthogonalised and scaled, all matrices of one shape together."""
    members = defaultdict(list)
    for index, leaf in enumerate(leaves):
        members[tuple(sorted(leaf.shape[-2:]))].append(index)

    updates = list(leaves)
    for shape, indices in members.items():
        # Tall matrices lie down beside the wide ones: UVᵀ of a transpose is the transpose of UVᵀ.
        lying = [leaves[i] if leaves[i].shape[-2:] == shape else leaves[i].mT for i in indices]
        stacks = [leaf.reshape(-1, *shape) for leaf in lying]
        stack = _orthogonalize_stack(jnp.concatenate(stacks), dtype, mesh)
        ends = np.cumsum([len(stack) for stack in stacks])
        for i, update in zip(indices, jnp.split(stack, ends[:-1]), strict=True):
            inputs, outputs = leaves[i].shape[-2:]
            update = update if (inputs, outputs) == shape else update.mT
            update = max(1, outputs / inputs) ** 0.5 * update.astype(jnp.float32)
            updates[i] = update.reshape(leaves[i].shape)
    return updates


def _orthogonalize_stack(
    matrices: Float[Array, "S I O"], dtype: jnp.dtype, mesh: Mesh | None
) -> Float[Array, "S I O"]:
    """All matrices orthogonalised, in `dtype`: group by group, each device its share of groups.

    A group is one batched product wherever it is computed. That is why the devices' results are
    those of one device to the bit, which products of differently large batches would not be.
    """
    S, devices = len(matrices), mesh.size if mesh else 1
    groups = -(-S // (GROUP * devices)) * devices
    padding = [(0, groups * GROUP - S), (0, 0), (0, 0)]
    grouped = jnp.pad(matrices, padding).reshape(groups, GROUP, *matrices.shape[1:])

    def orthogonalize_groups(share: Float[Array, "share group I O"]) -> Float[Array, "..."]:
        return jax.lax.map(lambda group: orthogonalize(group, dtype).astype(dtype), share)

    if mesh:
        each_its_share = jax.shard_map(
            orthogonalize_groups, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False
        )
        # Whole before and after: else the compiler divides the momentum, too, and gathers it.
        whole = NamedSharding(mesh, REPLICATED)
        grouped = jax.lax.with_sharding_constraint(grouped, whole)
        grouped = jax.lax.with_sharding_constraint(each_its_share(grouped), whole)
    else:
        grouped = orthogonalize_groups(grouped)
    return grouped.reshape(-1, *matrices.shape[1:])[:S]
