"""The optimizer: which update rule and learning rate each parameter gets.

    matrices of the layers      Muon (see nanogpt/optim/muon.py)
    all others, by group        Adam (Kingma and Ba, arXiv:1412.6980)

both with cautious weight decay. Adam may update only every few steps, with their mean gradient,
which helps tables and gates: their gradients are noisier than those of matrices (modded-nanogpt,
2025-09-30).

The rate and momentum of each step are passed along with the gradients, so that one compiled program
serves every schedule.
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from nanogpt.adam import Adam, AdamGroups
from nanogpt.optim.muon import scale_by_muon

# Adam's epsilon, for gradients of losses that are summed over the tokens of a step. (modded-nanogpt
# uses 1e-10 for an eighth of such a sum, of two steps where Adam updates every second one.)
EPSILON = 8e-10

Path = tuple[jax.tree_util.DictKey, ...]


def group(path: Path, parameter: Array | jax.ShapeDtypeStruct) -> str:
    """Return the group of a parameter, by its name and shape: muon, or one of Adam's groups."""
    name, module = path[-1].key, path[-2].key if len(path) > 1 else ""
    if name in ("head", "skip_gate"):
        return name
    if name == "embed":
        return "embedding"
    if name.endswith("embed"):
        return "tables"
    if module in ("last_layer", "before_head"):
        return "connection_biases" if name == "bias" else "connections"
    if name == "gate_scale" or module in ("early_gates", "late_gates"):
        return "dynamic_gates" if name in ("up", "down") else "dynamic_gate_biases"
    if name == "residual_shares":
        return "stream"
    if name == "embedding_shares":
        return "shortcuts"
    if name.endswith("_shares"):
        return "additions"
    if name.endswith("gate"):  # stacked like matrices, but only a few numbers per head
        return "smear_gate" if module == "smear" else "gates"
    return "muon" if parameter.ndim >= 3 else "scalars"  # matrices are stacked over the layers


def cautious_decay(strength: float) -> optax.GradientTransformationExtraArgs:
    """Decay weights only where the update shrinks them anyway (Chen et al., arXiv:2510.12402).

    `update(updates, state, params, rate=...)` adds `strength * rate * w` to updates with the same
    sign as their weight w. The caller scales updates by `rate` and subtracts them, so the decay
    is proportional to the square of the rate (modded-nanogpt, 2025-11-10).
    """

    def update(updates, state, params, *, rate, **extra_args):
        del extra_args

        def decayed(u: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
            return u + strength * rate * jnp.where(u * w > 0, w, 0)

        return jax.tree.map(decayed, updates, params), state

    # pyrefly: ignore[bad-argument-type]  (Optax has no type for keyword arguments)
    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_by_shape(mlp_out: float) -> optax.GradientTransformation:
    """Scale updates of matrices [I, O] by sqrt(max(1, O / I)), MLP output matrices by `mlp_out`."""

    def scaled(path: Path, update: Float[Array, "*stack I O"]) -> Float[Array, "*stack I O"]:
        inputs, outputs = update.shape[-2:]
        return update * (mlp_out if path[-1].key == "down" else max(1, outputs / inputs) ** 0.5)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def make_optimizer(
    *,
    learning_rate: float,
    weight_decay: float,
    adam: AdamGroups,
    adam_every: int = 1,
    mlp_out_factor: float = 1.0,
    neuron_decay: float | None = 0.95,
    head_groups: int = 1,
    newton_schulz_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    shard_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer of the whole model.

    `update(gradients, state, params, rate=..., momentum=...)` takes two numbers or scalar arrays:
    the factor on all learning rates in this step, and Muon's momentum.

    Args:
        learning_rate: Muon's learning rate.
        weight_decay: cautious decay of the matrices: with r = `learning_rate * rate`, a step
            shrinks each weight that it moves toward zero by the fraction r² * weight_decay, times
            the factor of `scale_by_shape`.
        adam: Adam's settings for each group.
        adam_every: number of steps per Adam update, which uses their mean gradient.
        mlp_out_factor: see `scale_by_shape`.
        neuron_decay, head_groups, newton_schulz_dtype, mesh, shard_params: see `scale_by_muon` in
            muon.py.
    """

    def by_adam(how: Adam) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(*how.betas, eps=EPSILON),
            cautious_decay(how.weight_decay * how.learning_rate),
            optax.scale(how.learning_rate),
        )

    merged = [name for name in AdamGroups.LATER if getattr(adam, name) == adam.scalars]
    groups: dict[Hashable, optax.GradientTransformation] = {
        name: by_adam(how) for name, how in vars(adam).items() if name not in merged
    }

    def label(path: Path, parameter: Array | jax.ShapeDtypeStruct) -> str:
        name = group(path, parameter)
        return "scalars" if name in merged else name

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(label, params)

    def rules_of(params: PyTree) -> PyTree:
        return jax.tree.map(lambda name: name if name == "muon" else "adam", labels(params))

    all_adam = optax.partition(groups, labels)
    if adam_every > 1:
        several = optax.MultiSteps(all_adam, adam_every)
        # pyrefly: ignore[bad-argument-type]  (Optax has no type for keyword arguments)
        all_adam = optax.GradientTransformationExtraArgs(several.init, several.update)
    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(
            scale_by_muon(neuron_decay, head_groups, newton_schulz_dtype, mesh, shard_params),
            cautious_decay(weight_decay * learning_rate),
            scale_by_shape(mlp_out_factor),
            optax.scale(learning_rate),
        ),
        "adam": all_adam,
    }
    by_rule = optax.partition(rules, rules_of)

    def update(gradients, state, params, *, rate, momentum):
        updates, state = by_rule.update(gradients, state, params, rate=rate, momentum=momentum)
        return jax.tree.map(lambda u: -rate * u, updates), state

    # pyrefly: ignore[bad-argument-type]  (Optax has no type for keyword arguments)
    return optax.GradientTransformationExtraArgs(by_rule.init, update)
