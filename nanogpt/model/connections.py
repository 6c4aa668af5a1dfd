"""Dynamic connections and gates: weights that each token computes for itself.

Two small MLPs, one in the last layer and one before the head, read the stream and return a few
weights per token, for outputs of earlier layers and for what the last layer adds to the stream:
MUDD (Xiao et al., arXiv:2502.12170; modded-nanogpt, 2026-04-22). Two others return the gates of all
layers (2026-05-27).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from nanogpt.config import GPTConfig
from nanogpt.model.gates import opened
from nanogpt.model.parameters import matrix

if TYPE_CHECKING:
    from nanogpt.model.gpt import GPT

HIDDEN = 64  # width of the small MLPs
SCALE = 0.1  # factor on their outputs, which then move a tenth as far in each step
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

    def __call__(
        self, x: Float[Array, "B T D"], scale: float | Float[Array, ""] = SCALE
    ) -> Float[Array, "B T weights"]:
        hidden = jax.nn.gelu(x @ self.up[...], approximate=False)
        return scale * (hidden @ self.down[...] + self.bias[...])


def mixed(
    weights: Float[Array, "B T sources"], *sources: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Return the sum of the sources, each times its weight for each token."""
    first, *others = (weights[..., n : n + 1] * source for n, source in enumerate(sources))
    return sum(others, start=first)


class LastLayer(Connections):
    """The connections of the last layer.

    At first they add no earlier output, and both gates of its value embedding are 2.
    """

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
    """Create the connections before the head; at first they subtract half the second source."""
    sources = SOURCES + bool(config.value_layers) + len(config.skip_pairs)
    return Connections(config.width, [0.0, -0.5] + [0.0] * (sources - 2), key)


Gates = dict[tuple[str, int], Float[Array, "..."]]  # by kind and layer, or number of the skip


def initial_gates(c: GPTConfig, layers: range) -> dict[tuple[str, int], tuple[int, float]]:
    """Return, for each gate of these layers, its size per token and its initial value."""
    N, attending = c.num_heads, [n for n in layers if n not in c.layers(c.mlp_only)]
    first = {("exclusion", n): (N, 0.0) for n in attending if n in c.layers(c.exclusive)}
    first |= {("gate", n): (N, 0.25) for n in attending if n in c.layers(c.gated)}
    for layer in attending:
        if layer < c.num_layers - 1:  # the last one has connections
            first["embedding", layer] = 1, 0.0
            if c.bigram_buckets:
                first["bigram", layer] = 1, 0.05
    skips = enumerate(c.skips or ())
    first |= {("skip", n): (1, 0.5) for n, (_, target) in skips if target in layers}
    for layer in attending:
        if layer in c.layers(c.composed):
            first |= {("given", layer): (N, 1.0), ("taken", layer): (N, 0.0)}
    return first


class DynamicGates(Connections):
    """The gates of some layers."""

    def __init__(self, config: GPTConfig, layers: range, key: Key[Array, ""]):
        first = initial_gates(config, layers)
        super().__init__(
            config.width, [value for n, value in first.values() for _ in range(n)], key
        )
        self.names = tuple(first)
        self.ends = tuple(np.cumsum([n for n, _ in first.values()])[:-1].tolist())

    def chosen(self, x: Float[Array, "B T D"], scale: Float[Array, ""]) -> Gates:
        """Return each of the gates."""
        each = jnp.split(self(x, scale), self.ends, axis=-1)
        return dict(zip(self.names, each, strict=True))


class Dynamic(nnx.Module):
    """All weights and gates that each token computes for itself."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        again, L = config.late_gates_from, config.num_layers
        self.last_layer = LastLayer(config, rngs.params())
        self.before_head = before_head(config, rngs.params())
        self.early_gates = DynamicGates(config, range(again), rngs.params())
        self.late_gates = DynamicGates(config, range(again, L), rngs.params())
        self.gate_scale = nnx.Param(jnp.array(SCALE))

    def early(self, x0: Float[Array, "B T D"]) -> Gates:
        """Return the gates of the early layers, from the embeddings."""
        return self.early_gates.chosen(x0, self.gate_scale[...])

    def late(self, x: Float[Array, "B T D"]) -> Gates:
        """Return the gates of later layers, from the stream before them."""
        return self.late_gates.chosen(x, self.gate_scale[...])


def fixed_gates(model: "GPT", x0: Float[Array, "B T D"]) -> Gates:
    """Return the gates of a model whose tokens do not choose them."""
    gates: Gates = {("embedding", n): share for n, share in enumerate(model.embedding_shares[...])}
    if model.config.bigram_buckets:
        gates |= {("bigram", n): share for n, share in enumerate(model.bigram_shares[...])}
    if model.config.skips:
        opens = (2 * opened(x0, gate)[..., 0] for gate in model.skip_gate[...])
        gates |= {("skip", n): gate for n, gate in enumerate(opens)}
    return gates


def layer_weights(model: "GPT", layer: int, gates: Gates) -> LayerWeights:
    """Return the weights of a layer without dynamic connections."""
    stream, late = model.residual_shares[layer], model.config.attention_source is not None
    embedding, bigram = (gates.get((kind, layer), 0.0) for kind in ("embedding", "bigram"))
    if not late:
        return LayerWeights(stream, embedding, bigram)
    bigram = bigram if layer > 0 else 0.0  # the first layer begins with them
    (stream, again), (attention, mlp) = stream, model.output_shares[layer]
    return LayerWeights(stream, embedding, bigram, attention, again, mlp)
