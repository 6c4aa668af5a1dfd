"""config.json of an exported model, as transformers reads it.

`model` holds the settings of GPTConfig in nanogpt/config.py of jax-flax-nanogpt, which documents
them; what the model in modeling_nanogpt.py takes from them is below.
"""

from itertools import pairwise
from math import inf
from typing import Any, ClassVar

import numpy as np
from transformers import PretrainedConfig


class NanoGPTConfig(PretrainedConfig):
    """The shape of a model, its tokenizer, its training length and where it comes from."""

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
        """L."""
        return self.model["num_layers"]

    @property
    def num_attention_heads(self) -> int:
        """N."""
        return self.model["num_heads"]

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids, rounded up to a multiple of 128."""
        return -(-self.model["vocab_size"] // 128) * 128

    def layers(self, name: str) -> set[int]:
        """The layers that a setting names; negative numbers count from the last one."""
        return {layer % self.num_hidden_layers for layer in self.model[name]}

    @property
    def attentions(self) -> list[int]:
        """The layers that have attention."""
        return sorted(set(range(self.num_hidden_layers)) - self.layers("mlp_only"))

    @property
    def skip_pairs(self) -> list[tuple[int, int]]:
        """The layers that each skip leads from and to: by default those of a U-net."""
        L = self.num_hidden_layers
        if self.model["skips"] is None:
            return [(L - 1 - layer, layer) for layer in range(L - L // 2, L)]
        return [(source, target) for source, target in self.model["skips"]]

    @property
    def value_tables(self) -> dict[int, int]:
        """The table of each layer that adds one to its values: the last layers, and the first."""
        L, count = self.num_hidden_layers, self.model["value_embeddings"]
        tables = {layer: layer + 1 for layer in range(count - 1)}
        tables |= {L - count + table: table for table in range(count)}
        return {layer: tables[layer] for layer in self.attentions if layer in tables}

    def window(self, layer: int, places: int) -> float:
        """How many keys a query sees, itself included, where a token has so many places.

        No layer looks back further than a training row.
        """
        windows = self.model["windows"] or [0]
        return min(windows[layer % len(windows)] or inf, places * self.sequence_length)

    @property
    def rotation(self) -> tuple[np.ndarray, float]:
        """Rotation of each pair of a head per token, in radians, and the scale of q·k.

        Later stages of training had wider windows, to which YaRN adapted both.
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
