"""Muon: momentum, with the update of each matrix orthogonalized.

The plain momentum update of a hidden matrix has a few large singular values and many small ones;
Muon sets them all to about one, so that every direction learns at the same rate
(Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024). It uses the
polynomials of Polar Express (Amsel et al., arXiv:2505.16932). The orthogonalized update still moves
some neurons much more than others; dividing each neuron's update by its usual size evens that out
(NorMuon: Li et al., arXiv:2510.05491).

This is an Optax transformation for parameters that are matrices or stacks of them, [*stack, I, O]
(I inputs, O outputs). The devices of a mesh share the work: see sharing.py.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanogpt.optim.heads import apart, together
from nanogpt.optim.sharing import map_matrices

# Applying a s + b s³ + c s⁵ for each (a, b, c) in turn maps singular values s in [0.001, 1] to
# [0.84, 1.15]. Each polynomial is optimal for the range of values that those before it leave. (They
# are the paper's with a cushion of 0.02 and a safety factor of 1.02 in all but the last.)
SAFETY = 1.02  # rounding can raise a singular value of 1 to at most this
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonState(NamedTuple):
    """For each parameter, float32: momentum, and the mean square of each neuron's updates."""

    momentum: optax.Updates
    neuron_mean_square: optax.Updates


def orthogonalize(
    matrices: Float[Array, "*stack I O"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*stack I O"]:
    """Approximate U Vᵀ for each matrix U S Vᵀ, with the polynomials of Polar Express in `dtype`.

    The singular values of the result lie in [0.84, 1.15], or below if they were less than a
    thousandth of the matrix's Frobenius norm.
    """
    x = matrices.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = (x / (SAFETY * norm + 8e-6)).astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # so that gram has the smaller size
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).astype(matrices.dtype)


def neuron_mean_square(matrices: Float[Array, "*stack I O"]) -> Float[Array, "..."]:
    """Return the mean square of each neuron: each column (output), or if I > O each row (input).

    The axis of the mean is kept: [*stack, 1, O] or [*stack, I, 1].
    """
    I, O = matrices.shape[-2:]  # noqa: E741
    return jnp.mean(jnp.square(matrices), axis=-2 if I <= O else -1, keepdims=True)


def normalize_neurons(
    update: Float[Array, "*stack I O"], usual: Float[Array, "..."]
) -> Float[Array, "*stack I O"]:
    """Divide each neuron by the root of `usual`, then rescale to keep each matrix's Frobenius norm.

    A common factor in `usual` thus cancels, so a running mean that started at zero needs no bias
    correction.
    """
    now = neuron_mean_square(update)
    # Both floors avoid 0 / 0, so that zero updates stay zero.
    inverse = 1 / jnp.maximum(usual, 1e-10)
    before, after = (jnp.sum(x, axis=(-2, -1), keepdims=True) for x in (now, now * inverse))
    return update * jnp.sqrt(inverse * before / jnp.maximum(after, 1e-10))


def scale_by_muon(
    neuron_decay: float | None = 0.95,
    head_groups: int = 1,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    shard_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Build the transformation: Nesterov momentum, orthogonalized, each neuron normalized.

    In `update(gradients, state, momentum=...)`, momentum is the decay of the running mean of
    gradients, a number or a scalar array.

    Args:
        neuron_decay: decay of the running mean square of each neuron's updates; None does not
            normalize neurons, which is plain Muon.
        head_groups: number of groups of heads whose queries and keys are matrices of their own:
            see heads.py.
        dtype: dtype of the orthogonalization; bfloat16 is accurate enough, and fast on hardware
            with matrix units for it.
        mesh, shard_params: see `map_matrices` in sharing.py; the results are bit for bit those of
            a single device.
    """

    def orthogonalize_stack(matrices: Float[Array, "S I O"]) -> Float[Array, "S I O"]:
        return map_matrices(
            lambda group: orthogonalize(group, dtype).astype(dtype), matrices, mesh, shard_params
        )

    def init(params: optax.Params) -> MuonState:
        squares = jax.tree.map(neuron_mean_square, apart(params, head_groups))
        return MuonState(*jax.tree.map(jnp.zeros_like, (params, squares)))

    def update(gradients, state, params=None, *, momentum, **extra_args):
        del params, extra_args
        mean = optax.tree.update_moment(gradients, state.momentum, momentum, order=1)
        ahead = optax.tree.update_moment(gradients, mean, momentum, order=1)
        leaves, structure = jax.tree.flatten(apart(ahead, head_groups))
        updates = jax.tree.unflatten(structure, _by_shape(orthogonalize_stack, leaves))
        if neuron_decay is None:
            return together(updates), MuonState(mean, state.neuron_mean_square)
        usual = optax.tree.update_moment(
            jax.tree.map(neuron_mean_square, updates), state.neuron_mean_square, neuron_decay, 1
        )
        updates = together(jax.tree.map(normalize_neurons, updates, usual))
        return updates, MuonState(mean, usual)

    # pyrefly: ignore[bad-argument-type]  (Optax has no type for keyword arguments)
    return optax.GradientTransformationExtraArgs(init, update)


def _by_shape(
    orthogonalize_stack: Callable[[Array], Array], leaves: list[Array]
) -> list[Float[Array, "*stack I O"]]:
    """Orthogonalize the leaves, all matrices of one shape together."""
    members = defaultdict(list)
    for index, leaf in enumerate(leaves):
        members[tuple(sorted(leaf.shape[-2:]))].append(index)

    updates = list(leaves)
    for shape, indices in members.items():
        # Tall matrices are transposed to join wide ones; UVᵀ of the transpose is (UVᵀ)ᵀ.
        lying = [leaves[i] if leaves[i].shape[-2:] == shape else leaves[i].mT for i in indices]
        stacks = [leaf.reshape(-1, *shape) for leaf in lying]
        stack = orthogonalize_stack(jnp.concatenate(stacks))
        ends = np.cumsum([len(stack) for stack in stacks])
        for i, update in zip(indices, jnp.split(stack, ends[:-1]), strict=True):
            update = update if leaves[i].shape[-2:] == shape else update.mT
            updates[i] = update.astype(jnp.float32).reshape(leaves[i].shape)
    return updates
