"""The config.json of an exported model, for transformers.

`model` holds the settings of the model; GPTConfig in nanogpt/config.py of jax-flax-nanogpt
documents them. Below is what the model in modeling_nanogpt.py derives from them.
"""

from itertools import pairwise
from math import inf
from typing import Any, ClassVar

import numpy as np
from transformers import PretrainedConfig


class NanoGPTConfig(PretrainedConfig):
    """The model's settings, its tokenizer, its training length and where it comes from."""

    model_type = "nanogpt"
    attribute_map: ClassVar = {"max_position_embeddings": "sequence_length"}

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        tokenizer: str = "bytes",
        sequence_length: int = 1024,
        **others: Any,
    ):
        self.model, self.tokenizer, self.sequence_length = model or {}, tokenizer, sequence_length
        super().__init__(**{"tie_word_embeddings": False, **others})

    @property
    def hidden_size(self) -> int:
        """D, the width of the residual stream."""
        return self.model["width"]

    @property
    def num_hidden_layers(self) -> int:
        """L, the number of layers."""
        return self.model["num_layers"]

    @property
    def num_attention_heads(self) -> int:
        """N, the number of attention heads."""
        return self.model["num_heads"]

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids, rounded up to a multiple of 128."""
        return -(-self.model["vocab_size"] // 128) * 128

    def layers(self, name: str) -> set[int]:
        """Return the layers listed in a setting; negative numbers count from the last layer."""
        return {layer % self.num_hidden_layers for layer in self.model[name]}

    @property
    def attentions(self) -> list[int]:
        """The layers with attention."""
        return sorted(set(range(self.num_hidden_layers)) - self.layers("mlp_only"))

    @property
    def skip_pairs(self) -> list[tuple[int, int]]:
        """The source and target layers of each skip connection, by default those of a U-net."""
        L = self.num_hidden_layers
        if self.model["skips"] is None:
            return [(L - 1 - layer, layer) for layer in range(L - L // 2, L)]
        return [(source, target) for source, target in self.model["skips"]]

    @property
    def value_tables(self) -> dict[int, int]:
        """The value embedding table of each layer with one, by default the first and last ones."""
        L, count = self.num_hidden_layers, self.model["value_embeddings"]
        tables = {layer: layer + 1 for layer in range(count - 1)}
        tables |= {L - count + table: table for table in range(count)}
        if self.model["value_layers"]:
            tables = {layer: table for table, layer in enumerate(self.model["value_layers"])}
        return {layer: tables[layer] for layer in self.attentions if layer in tables}

    @property
    def gated_values(self) -> list[int]:
        """The layers whose value embeddings have gates other than dynamic connections."""
        tables = self.value_tables if self.model["value_gate"] else {}
        return [layer for layer in tables if layer != self.dynamic_layer]

    @property
    def dynamic_layer(self) -> int | None:
        """The layer with dynamic connections, if any."""
        return self.num_hidden_layers - 1 if self.model["dynamic"] else None

    @property
    def late_gates_from(self) -> int:
        """With `dynamic`, the layer before which tokens choose the gates of that and later ones."""
        return max(1, (self.model["attention_source"] + 1) // 2)

    def gates(self, layers: range) -> dict[tuple[str, int], int]:
        """Return how many numbers each gate of these layers is, by kind and layer, or skip."""
        N, attending = self.num_attention_heads, [n for n in self.attentions if n in layers]
        found = {("exclusion", n): N for n in attending if n in self.layers("exclusive")}
        found |= {("gate", n): N for n in attending if n in self.layers("gated")}
        for layer in attending:
            if layer != self.dynamic_layer:
                found["embedding", layer] = 1
                if self.model["bigram_buckets"]:
                    found["bigram", layer] = 1
        skips = enumerate(self.model["skips"] or ())
        found |= {("skip", n): 1 for n, (_, target) in skips if target in layers}
        for layer in attending:
            if layer in self.layers("composed"):
                found |= {("given", layer): N, ("taken", layer): N}
        return found

    def window(self, layer: int, places: int) -> float:
        """Return how many keys a query sees, its own included; a token has `places` positions.

        No layer looks back further than a training row.
        """
        windows = self.model["windows"] or [0]
        return min(windows[layer % len(windows)] or inf, places * self.sequence_length)

    @property
    def rotation(self) -> tuple[np.ndarray, float]:
        """Rotation of each of a head's pairs per token, in radians, and the scale of q·k.

        YaRN adapted both to the longer windows of later training stages.
        """
        c = self.model
        pairs = c["width"] // c["num_heads"] // 2
        turning = round(c["rope_fraction"] * pairs)
        speed = np.zeros(pairs)
        speed[:turning] = c["rope_base"] ** -np.linspace(0, 1, turning)
        scale = c["attention_scale"]
        for old, new in pairwise(c["rotary_windows"]):
            kept = np.clip((old * speed / (2 * np.pi) - 1) / (32 - 1), 0, 1)
            speed = speed * (kept + (1 - kept) * old / new)
            scale *= 1 + 0.2 * np.log(new / old)
        return speed, float(scale)
