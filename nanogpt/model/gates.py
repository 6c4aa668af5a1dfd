"""Gates: factors from 0 to 1, or twice that, which each token computes from a few channels.

All start half open, with weights of zero (modded-nanogpt, 2025-08 to 2025-12).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nanogpt.config import GATE_INPUTS
from nanogpt.model.parameters import project


def opened(x: Float[Array, "B T C"], gate: Float[Array, "inputs N"]) -> Float[Array, "B T N 1"]:
    """Return the values of N gates for each token, from 0 to 1."""
    return jax.nn.sigmoid(project(x[:, :, : len(gate)], gate))[..., None]


class Smear(nnx.Module):
    """x_t + a gate(x_t) x_(t-1): a pair of tokens often means what neither of them does alone."""

    def __init__(self):
        self.gate = nnx.Param(jnp.zeros((GATE_INPUTS, 1)))
        self.share = nnx.Param(jnp.zeros(()))

    def __call__(
        self, x: Float[Array, "B T D"], before: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        gate = opened(x, self.gate[...].astype(x.dtype))[..., 0]
        return x + self.share[...] * gate * before


def value_share(
    x: Float[Array, "B T D"],
    values: Float[Array, "B T NH"],
    gate: Float[Array, "inputs N"],
    read_values: bool,
) -> Float[Array, "B T N 1"]:
    """Return the weight of a value embedding in each head; its gates may read half of each."""
    if read_values:
        x = jnp.concatenate([each[:, :, : len(gate) // 2] for each in (x, values)], axis=-1)
    return 2 * opened(x, gate)
