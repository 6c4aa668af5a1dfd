"""Which rule and rate each parameter learns by.

    matrices of the blocks      Muon                      (Jordan et al., 2024)
    embeddings, head, scalars   Adam, each with its rate  (Kingma and Ba, arXiv:1412.6980)

All rates follow one schedule: constant, then linearly down (Hägele et al., arXiv:2405.18392).
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from nanogpt.model import is_table
from nanogpt.muon import scale_by_muon


def learning_rate_factor(
    num_steps: int, cooldown_fraction: float, final_factor: float, step: int | Array
) -> float | Float[Array, ""]:
    """What all rates are multiplied with after `step` steps: 1, then linearly to `final_factor`.

    The descent takes the last `cooldown_fraction` of the `num_steps` steps. For a plain integer
    the result is a plain number, computed without the device.
    """
    remaining = (num_steps - step) / max(1.0, cooldown_fraction * num_steps)
    clip = jnp.clip if isinstance(step, jax.Array) else lambda x, low, high: min(max(x, low), high)
    return final_factor + (1 - final_factor) * clip(remaining, 0.0, 1.0)


def group(path: tuple[jax.tree_util.DictKey, ...], parameter: Array) -> str:
    """The group of a parameter by its name and shape: muon, embedding, head or scalar."""
    if path[-1].key == "head":
        return "head"
    if is_table(path):
        return "embedding"
    return "muon" if parameter.ndim >= 3 else "scalar"  # matrices are stacked over the layers


def make_optimizer(
    *,
    schedule: optax.Schedule,
    learning_rate: float,
    embedding_learning_rate: float,
    head_learning_rate: float,
    scalar_learning_rate: float,
    momentum: float,
    momentum_warmup_steps: int,
    adam_betas: tuple[float, float],
    weight_decay: float,
    newton_schulz_dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """The optimizer of the whole model.

    Args:
        schedule: what all rates are multiplied with, by count of updates.
        learning_rate: Muon's; the next three are Adam's, by group.
        momentum: Muon's, reached from 0.85 in `momentum_warmup_steps` steps: the first gradients
            turn quickly and are best forgotten quickly.
        weight_decay: of the matrices; one step shrinks them by the rate times this.
        newton_schulz_dtype, mesh: see `nanogpt.muon.scale_by_muon`.
    """

    def momentum_at(step: Array) -> Array:
        warm = jnp.minimum(step / max(1, momentum_warmup_steps), 1.0)
        return 0.85 + (momentum - 0.85) * warm

    def adam(rate: float) -> optax.GradientTransformation:
        b1, b2 = adam_betas
        return optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=1e-10), optax.scale(rate))

    rules = {
        "muon": optax.chain(
            scale_by_muon(momentum_at, newton_schulz_dtype, mesh),
            optax.add_decayed_weights(weight_decay),
            optax.scale(learning_rate),
        ),
        "embedding": adam(embedding_learning_rate),
        "head": adam(head_learning_rate),
        "scalar": adam(scalar_learning_rate),
    }

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(group, params)

    return optax.chain(
        optax.partition(rules, labels), optax.scale_by_schedule(lambda step: -schedule(step))
    )
