"""Queries and keys of a few heads, as matrices that Muon orthogonalizes on their own.

Heads specialize, so that a direction which is strong in the update of one is weak in another's
(modded-nanogpt, 2026-04-08).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class Apart(NamedTuple):
    """Matrices of a stack "qkv"."""

    heads: Float[Array, "*stack 2 groups I part"]
    values: Float[Array, "*stack 1 I O"]


def apart(updates: optax.Updates, groups: int) -> optax.Updates:
    """Separate the queries and keys of each group of heads.

    Each "qkv" [*stack, 3, D, N H] becomes an `Apart` if there are several groups.
    """

    def split(path: tuple, x: Float[Array, "*stack I O"]) -> Any:
        if groups == 1 or path[-1].key != "qkv":
            return x
        heads = x[..., :2, :, :].reshape(*x.shape[:-3], 2, x.shape[-2], groups, -1)
        return Apart(heads.swapaxes(-2, -3), x[..., 2:, :, :])

    return jax.tree_util.tree_map_with_path(split, updates)


def together(updates: optax.Updates) -> optax.Updates:
    """Undo `apart`."""

    def join(x: Any) -> Float[Array, "*stack I O"]:
        if not isinstance(x, Apart):
            return x
        heads, values = x
        whole = heads.swapaxes(-2, -3).reshape(*values.shape[:-3], 2, *values.shape[-2:])
        return jnp.concatenate([whole, values], axis=-3)

    return jax.tree.map(join, updates, is_leaf=lambda x: isinstance(x, Apart))
