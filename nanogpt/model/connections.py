"""Connections between distant layers with weights that each token computes for itself.

A small MLP reads the stream and returns a few weights per token, for outputs of earlier layers and
for what a layer adds to the stream: MUDD (Xiao et al., arXiv:2502.12170), in the last layer and
before the head only (modded-nanogpt, 2026-04-22).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from nanogpt.config import GPTConfig
from nanogpt.model.parameters import matrix

HIDDEN = 64  # width of the small MLPs
SCALE = 0.1  # of their outputs, which so move a tenth as far in each step
# What the last layer's attention adds to its values, and the layer to its stream: three sources
# each. Then the two gates of its value embedding.
SOURCES, GATES = 3, 2

Weight = float | Float[Array, ""] | Float[Array, "B T 1"]


class LayerWeights(NamedTuple):
    """A layer's weights: of the stream, and of what it adds to it."""

    stream: Weight
    embedding: Weight
    bigram: Weight
    attention: Weight = 1.0
    stream_again: Weight = 1.0  # the stream after attention
    mlp: Weight = 1.0


class Connections(nnx.Module):
    """Weights for each token, from its stream; they start at `first` for all."""

    def __init__(self, width: int, first: Sequence[float], key: Key[Array, ""]):
        self.up = nnx.Param(matrix(key, (width, HIDDEN), 3**-0.5))
        self.down = nnx.Param(jnp.zeros((HIDDEN, len(first))))
        self.bias = nnx.Param(jnp.array(first) / SCALE)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T weights"]:
        hidden = jax.nn.gelu(x @ self.up[...], approximate=False)
        return SCALE * (hidden @ self.down[...] + self.bias[...])


def mixed(
    weights: Float[Array, "B T sources"], *sources: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Return the sum of the sources, each times its weight for each token."""
    first, *others = (weights[..., n : n + 1] * source for n, source in enumerate(sources))
    return sum(others, start=first)


class LastLayer(Connections):
    """Those of the last layer; at first they change nothing, and both gates are 2."""

    def __init__(self, config: GPTConfig, key: Key[Array, ""]):
        stream = config.residual_init**0.5
        weights = stream, 0.0, 0.05, 1.0, stream, 1.0  # see LayerWeights
        super().__init__(config.width, [0.0] * 2 * SOURCES + [2.0] * GATES + [*weights], key)

    def weigh(
        self,
        x: Float[Array, "B T D"],
        x0: Float[Array, "B T D"],
        late: Float[Array, "B T D"],
        values: Float[Array, "B T D"] | None,
    ) -> tuple[LayerWeights, Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Return the layer's weights, what to add to its attention values, and its stream.

        Args:
            x, x0, late: the stream before this layer, before the first, and after the one that late
                attentions read.
            values: this layer's value embedding, if any; half of its channels have a gate each.
        """
        ends = SOURCES, 2 * SOURCES, 2 * SOURCES + GATES
        to_values, to_stream, gates, rest = jnp.split(self(x), ends, axis=-1)
        added = mixed(to_values, x0, late, x)
        if values is not None:
            added = added + jnp.repeat(gates, values.shape[-1] // GATES, axis=-1) * values
        weights = LayerWeights(*jnp.split(rest, len(LayerWeights._fields), axis=-1))
        return weights, added, x + mixed(to_stream, x0, late, x)


def before_head(config: GPTConfig, key: Key[Array, ""]) -> Connections:
    """Create those before the head; at first they subtract half of the second source."""
    sources = SOURCES + bool(config.value_layers) + len(config.skip_pairs)
    return Connections(config.width, [0.0, -0.5] + [0.0] * (sources - 2), key)
