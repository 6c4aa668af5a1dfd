"""Which rule and rate each parameter learns by.

    matrices of the layers      Muon (see nanogpt/optim/muon.py), and cautious weight decay
    embeddings, head, scalars   Adam, each with its rate (Kingma and Ba, arXiv:1412.6980)

Whoever calls the optimizer gives each step's rate and momentum along with the gradients, so that
one compiled program serves every schedule.
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from nanogpt.model.parameters import is_table
from nanogpt.optim.muon import scale_by_muon


def group(path: tuple[jax.tree_util.DictKey, ...], parameter: Array | jax.ShapeDtypeStruct) -> str:
    """The group of a parameter by its name and shape: muon, embedding, head or scalar."""
    if path[-1].key == "head":
        return "head"
    if is_table(path):
        return "embedding"
    if path[-1].key.endswith("gate"):
        return "scalar"  # a few numbers per head: stacked like matrices, but too small to be some
    return "muon" if parameter.ndim >= 3 else "scalar"  # matrices are stacked over the layers


def cautious_decay(strength: float) -> optax.GradientTransformationExtraArgs:
    """Weight decay where the update shrinks the weight anyway (Chen et al., arXiv:2510.12402).

    `update(updates, state, params, rate=...)` adds `strength * rate * w` to the update of each
    weight w that has the sign of w. Updates are to be subtracted, after scaling with `rate`. The
    decay is thus in proportion to the square of the rate (modded-nanogpt, 2025-11-10).
    """

    def update(updates, state, params, *, rate, **extra_args):
        del extra_args

        def decayed(u: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
            return u + strength * rate * jnp.where(u * w > 0, w, 0)

        return jax.tree.map(decayed, updates, params), state

    # pyrefly: ignore[bad-argument-type]  (Optax has no type for arguments by name)
    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(
    *,
    learning_rate: float,
    embedding_learning_rate: float,
    head_learning_rate: float,
    scalar_learning_rate: float,
    adam_betas: tuple[float, float],
    weight_decay: float,
    neuron_decay: float | None = 0.95,
    newton_schulz_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    shard_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the whole model.

    `update(gradients, state, params, rate=..., momentum=...)` takes two numbers or scalar arrays:
    what all rates are multiplied with in this step, and Muon's momentum.

    Args:
        learning_rate: Muon's; the next three are Adam's, by group.
        weight_decay: of the matrices, in proportion to the current rate: with r for
            `learning_rate * rate`, a step takes the part r² * weight_decay off every weight which
            it brings nearer to zero.
        neuron_decay, newton_schulz_dtype, mesh, shard_params: see `scale_by_muon` in muon.py.
    """

    def adam(learning_rate: float) -> optax.GradientTransformation:
        b1, b2 = adam_betas
        return optax.chain(optax.scale_by_adam(b1, b2, eps=1e-10), optax.scale(learning_rate))

    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(
            scale_by_muon(neuron_decay, newton_schulz_dtype, mesh, shard_params),
            cautious_decay(weight_decay * learning_rate),
            optax.scale(learning_rate),
        ),
        "embedding": adam(embedding_learning_rate),
        "head": adam(head_learning_rate),
        "scalar": adam(scalar_learning_rate),
    }

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(group, params)

    by_group = optax.partition(rules, labels)

    def update(gradients, state, params, *, rate, momentum):
        updates, state = by_group.update(gradients, state, params, rate=rate, momentum=momentum)
        return jax.tree.map(lambda u: -rate * u, updates), state

    # pyrefly: ignore[bad-argument-type]  (Optax has no type for arguments by name)
    return optax.GradientTransformationExtraArgs(by_group.init, update)
