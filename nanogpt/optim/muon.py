"""Muon: momentum whose every matrix is orthogonalised before it is applied.

An update of a hidden matrix by plain momentum has a few large singular values and many small ones;
Muon sets them all to about one, so that every direction learns at the same rate
(Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024). The
polynomials that do so are those of Polar Express (Amsel et al., arXiv:2505.16932). What comes out
still moves some neurons much more than others; dividing each neuron by its usual size evens that
out (NorMuon: Li et al., arXiv:2510.05491).

Here it is an Optax transformation for parameters whose last two axes are matrices [I, O] (inputs,
outputs) and whose other axes stack them. The devices of a mesh share all matrices of one shape
between them.
"""

from collections import defaultdict
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from nanogpt.devices.mesh import DEVICES, REPLICATED

# a s + b s³ + c s⁵, with one (a, b, c) after another, takes singular values s from 0.001 ... 1 to
# 0.84 ... 1.15. Each polynomial brings nearest to one whatever the one before it may leave. (They
# are the paper's with a cushion of 0.02 and a safety factor of 1.02 in all but the last, rounded
# to four decimals, which moves no singular value by more than 0.0021.)
SAFETY = 1.02  # rounding may lift a singular value of one as far as this
POLAR_EXPRESS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)

GROUP = 8  # matrices in one batched product, which fill a GPU if they are 768 x 768


class MuonState(NamedTuple):
    """Of every parameter, float32: its momentum, and the mean square that each neuron moves by."""

    momentum: optax.Updates
    neuron_mean_square: optax.Updates


def orthogonalize(
    matrices: Float[Array, "*stack I O"], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "*stack I O"]:
    """About U Vᵀ for each matrix U S Vᵀ, by the polynomials of Polar Express in `dtype`.

    The singular values of the result lie between 0.84 and 1.15, except that those which were below
    a thousandth of the matrix's Frobenius norm are still on their way up.
    """
    x = matrices.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = (x / (SAFETY * norm + 1e-6)).astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products below are then of the smaller size
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).astype(matrices.dtype)


def neuron_mean_square(matrices: Float[Array, "*stack I O"]) -> Float[Array, "..."]:
    """The mean square of each neuron: each column (output), or if I > O each row (input).

    The axis over which the mean is taken stays: [*stack, 1, O], or [*stack, I, 1].
    """
    I, O = matrices.shape[-2:]  # noqa: E741
    return jnp.mean(jnp.square(matrices), axis=-2 if I <= O else -1, keepdims=True)


def normalize_neurons(
    update: Float[Array, "*stack I O"], usual: Float[Array, "..."]
) -> Float[Array, "*stack I O"]:
    """Each neuron over the root of its `usual` mean square; each matrix keeps its Frobenius norm.

    So a factor that `usual` has in all neurons cancels, and a running mean which started at zero
    needs no correction for that.
    """
    now = neuron_mean_square(update)
    # Zero updates stay zero: both floors keep them from 0 / 0.
    inverse = 1 / jnp.maximum(usual, 1e-10)
    before, after = (jnp.sum(x, axis=(-2, -1), keepdims=True) for x in (now, now * inverse))
    return update * jnp.sqrt(inverse * before / jnp.maximum(after, 1e-10))


def scale_by_muon(
    neuron_decay: float | None = 0.95,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    shard_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Nesterov momentum, orthogonalised, each neuron normalised, times sqrt(max(1, O / I)).

    `update(gradients, state, momentum=...)` takes the decay of the running mean of gradients, a
    number or a scalar array.

    Args:
        neuron_decay: the decay of the running mean square of each neuron's updates; None leaves
            the neurons as they are, which is plain Muon.
        dtype: in which matrices are orthogonalised; bfloat16 is accurate enough, and fast where
            there are matrix units for it.
        mesh: devices that share the work; each takes its part of every stack, and the results are
            the same to the bit as when one device does it all.
        shard_params: whether devices along "data" hold parts of the matrices, which they then
            exchange for whole ones, and back.
    """

    orthogonalize_all = partial(
        _orthogonalize_by_shape, dtype=dtype, mesh=mesh, shard_params=shard_params
    )

    def init(params: optax.Params) -> MuonState:
        squares = jax.tree.map(neuron_mean_square, params)
        return MuonState(*jax.tree.map(jnp.zeros_like, (params, squares)))

    def update(gradients, state, params=None, *, momentum, **extra_args):
        del params, extra_args
        mean = optax.tree.update_moment(gradients, state.momentum, momentum, order=1)
        ahead = optax.tree.update_moment(gradients, mean, momentum, order=1)
        leaves, structure = jax.tree.flatten(ahead)
        updates = jax.tree.unflatten(structure, orthogonalize_all(leaves))
        if neuron_decay is None:
            return updates, MuonState(mean, state.neuron_mean_square)
        usual = optax.tree.update_moment(
            jax.tree.map(neuron_mean_square, updates), state.neuron_mean_square, neuron_decay, 1
        )
        return jax.tree.map(normalize_neurons, updates, usual), MuonState(mean, usual)

    return optax.GradientTransformationExtraArgs(init, update)


def _orthogonalize_by_shape(
    leaves: list[Array], dtype: jnp.dtype, mesh: Mesh | None, shard_params: bool
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
        stack = _orthogonalize_stack(jnp.concatenate(stacks), dtype, mesh, shard_params)
        ends = np.cumsum([len(stack) for stack in stacks])
        for i, update in zip(indices, jnp.split(stack, ends[:-1]), strict=True):
            inputs, outputs = leaves[i].shape[-2:]
            update = update if (inputs, outputs) == shape else update.mT
            update = max(1, outputs / inputs) ** 0.5 * update.astype(jnp.float32)
            updates[i] = update.reshape(leaves[i].shape)
    return updates


def _orthogonalize_stack(
    matrices: Float[Array, "S I O"], dtype: jnp.dtype, mesh: Mesh | None, shard_params: bool
) -> Float[Array, "S I O"]:
    """All matrices orthogonalised, in `dtype`: group by group, each device its share of groups.

    A group is one batched product wherever it is computed. That is why the devices' results are
    those of one device to the bit, which products of differently large batches would not be.
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

    def orthogonalize_groups(share: Float[Array, "share group I O"]) -> Float[Array, "..."]:
        return jax.lax.map(lambda group: orthogonalize(group, dtype).astype(dtype), share)

    def share_of_whole(grouped: Float[Array, "groups group I O"]) -> Float[Array, "..."]:
        each = groups // sharers
        first = jax.lax.axis_index("data") % sharers * each
        share = jax.lax.dynamic_slice_in_dim(grouped, first, each)
        teams = np.arange(devices).reshape(-1, sharers).tolist()
        return jax.lax.all_gather(
            orthogonalize_groups(share), "data", axis_index_groups=teams, tiled=True
        )

    if mesh and shard_params:
        each_its_share = jax.shard_map(
            orthogonalize_groups, mesh=mesh, in_specs=DEVICES, out_specs=DEVICES, check_vma=False
        )
        # From how matrices lie to whole ones and back, one axis of the mesh at a time: that is what
        # the compiler can do without gathering them all.
        lying = P(None, None, "data", "model")
        way = [NamedSharding(mesh, each) for each in (lying, P("data", None, None, "model"))]
        for step in way:
            grouped = jax.lax.with_sharding_constraint(grouped, step)
        grouped = each_its_share(grouped)
        for step in reversed(way):
            grouped = jax.lax.with_sharding_constraint(grouped, step)
    elif mesh:
        grouped = jax.shard_map(
            share_of_whole, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False
        )(grouped)
    else:
        grouped = orthogonalize_groups(grouped)
    return grouped.reshape(-1, *matrices.shape[1:])[:S]
