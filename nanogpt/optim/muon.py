"""Muon: momentum whose every matrix is orthogonalized before it is applied.

An update of a hidden matrix by plain momentum has a few large singular values and many small ones;
Muon sets them all to about one, so that every direction learns at the same rate
(Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024). The
polynomials that do so are those of Polar Express (Amsel et al., arXiv:2505.16932). What comes out
still moves some neurons much more than others; dividing each neuron by its usual size evens that
out (NorMuon: Li et al., arXiv:2510.05491).

Here it is an Optax transformation for parameters whose last two axes are matrices [I, O] (inputs,
outputs) and whose other axes stack them. The devices of a mesh share the work: see sharing.py.
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

from nanogpt.optim.sharing import map_matrices

# a s + b s³ + c s⁵, with one (a, b, c) after another, takes singular values s from 0.001 ... 1 to
# 0.84 ... 1.15. Each polynomial brings nearest to one whatever the one before it may leave. (They
# are the paper's with a cushion of 0.02 and a safety factor of 1.02 in all but the last.)
SAFETY = 1.02  # rounding may lift a singular value of one as far as this
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonState(NamedTuple):
    """Of every parameter, float32: its momentum, and the mean square that each neuron moves by."""

    momentum: optax.Updates
    neuron_mean_square: optax.Updates


def orthogonalize(
    matrices: Float[Array, "*stack I O"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*stack I O"]:
    """About U Vᵀ for each matrix U S Vᵀ, by the polynomials of Polar Express in `dtype`.

    The singular values of the result lie between 0.84 and 1.15, except that those which were below
    a thousandth of the matrix's Frobenius norm are still on their way up.
    """
    x = matrices.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = (x / (SAFETY * norm + 8e-6)).astype(dtype)
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
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    shard_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Nesterov momentum, orthogonalized, each neuron normalized.

    `update(gradients, state, momentum=...)` takes the decay of the running mean of gradients, a
    number or a scalar array.

    Args:
        neuron_decay: the decay of the running mean square of each neuron's updates; None leaves
            the neurons as they are, which is plain Muon.
        dtype: in which matrices are orthogonalized; bfloat16 is accurate enough, and fast where
            there are matrix units for it.
        mesh, shard_params: see `map_matrices` in sharing.py; the results are the same to the bit
            as when one device does it all.
    """

    def orthogonalize_stack(matrices: Float[Array, "S I O"]) -> Float[Array, "S I O"]:
        return map_matrices(
            lambda group: orthogonalize(group, dtype).astype(dtype), matrices, mesh, shard_params
        )

    def init(params: optax.Params) -> MuonState:
        squares = jax.tree.map(neuron_mean_square, params)
        return MuonState(*jax.tree.map(jnp.zeros_like, (params, squares)))

    def update(gradients, state, params=None, *, momentum, **extra_args):
        del params, extra_args
        mean = optax.tree.update_moment(gradients, state.momentum, momentum, order=1)
        ahead = optax.tree.update_moment(gradients, mean, momentum, order=1)
        leaves, structure = jax.tree.flatten(ahead)
        updates = jax.tree.unflatten(structure, _by_shape(orthogonalize_stack, leaves))
        if neuron_decay is None:
            return updates, MuonState(mean, state.neuron_mean_square)
        usual = optax.tree.update_moment(
            jax.tree.map(neuron_mean_square, updates), state.neuron_mean_square, neuron_decay, 1
        )
        return jax.tree.map(normalize_neurons, updates, usual), MuonState(mean, usual)

    # pyrefly: ignore[bad-argument-type]  (Optax has no type for arguments by name)
    return optax.GradientTransformationExtraArgs(init, update)


def _by_shape(
    orthogonalize_stack: Callable[[Array], Array], leaves: list[Array]
) -> list[Float[Array, "*stack I O"]]:
    """The leaves, orthogonalized, all matrices of one shape together."""
    members = defaultdict(list)
    for index, leaf in enumerate(leaves):
        members[tuple(sorted(leaf.shape[-2:]))].append(index)

    updates = list(leaves)
    for shape, indices in members.items():
        # Tall matrices lie down beside the wide ones: UVᵀ of a transpose is the transpose of UVᵀ.
        lying = [leaves[i] if leaves[i].shape[-2:] == shape else leaves[i].mT for i in indices]
        stacks = [leaf.reshape(-1, *shape) for leaf in lying]
        stack = orthogonalize_stack(jnp.concatenate(stacks))
        ends = np.cumsum([len(stack) for stack in stacks])
        for i, update in zip(indices, jnp.split(stack, ends[:-1]), strict=True):
            update = update if leaves[i].shape[-2:] == shape else update.mT
            updates[i] = update.astype(jnp.float32).reshape(leaves[i].shape)
    return updates
