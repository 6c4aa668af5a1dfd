"""The shape of a model, and which kernels compute it.

No JAX here, so that `--help` and wrong arguments answer at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, TypeVar

AttentionKernel = Literal["xla", "cudnn", "pallas", "splash"]
LossKernel = Literal["xla", "pallas"]


Settings = TypeVar("Settings")

GATE_INPUTS = 12  # channels of the stream that gates read


class ConfigError(ValueError):
    """Settings that make no sense, alone or together; the message is a sentence for the user."""


@dataclass(frozen=True)
class Kernels:
    """How a model is computed: a choice of speed and memory, hardly of results."""

    attention: AttentionKernel = "xla"
    """See nanogpt/model/attention.py."""

    loss: LossKernel = "xla"
    """See nanogpt/model/loss.py."""

    fp8_head: bool = False
    """Multiply with the head in 8-bit floating point."""

    rematerialize: bool = False
    """Keep of each layer only what it reads, and compute the rest again in the backward pass."""

    tensor_parallel: bool = False
    """Devices share heads and MLPs; see nanogpt/devices/sharding.py."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network. The defaults are the 12-layer, 768-wide model of the speedrun."""

    vocab_size: int = 50257
    """Token ids that the data may hold; tables are padded to a multiple of 128."""

    num_layers: int = 12
    """Transformer blocks, L."""

    num_heads: int = 6
    """Attention heads, N. The head size H is width / num_heads, a multiple of 4."""

    width: int = 768
    """Width of the residual stream, D."""

    mlp_width: int = 3072
    """Width of the hidden layer of each MLP, F."""

    mlp_only: tuple[int, ...] = ()
    """Layers without attention, counted from 0, or from -1 backwards."""

    windows: tuple[int, ...] = ()
    """Keys that a query sees, itself included, in each layer in turn; 0, or no entry, for all."""

    earlier_windows: tuple[int, ...] = ()
    """The longest windows of the training stages before, whose rotations those of windows slow."""

    document_separator: int | None = None
    """Token that begins a document, to keep attention within documents; None lets it cross them."""

    value_embeddings: int = 3
    """Token tables mixed into the values of the first, and again of the last, so many layers; with
    0 the values of the first attention are mixed into all others."""

    bigram_buckets: int = 0
    """Rows of the table that embeds hashed pairs of neighbouring tokens; 0 for no such table."""

    smear: bool = True
    """Add a gated part of each token's embedding to that of the next."""

    attention_gate: bool = True
    """Scale what each head adds by a gate that the token opens or closes."""

    key_offset: tuple[int, ...] = ()
    """Layers in which the half of each key that is not rotated is that of the token before."""

    paired_heads: tuple[int, ...] = ()
    """Layers in which the heads attend two by two, each to the keys of both."""

    backout: int | None = None
    """Layer whose output is taken back, by a learned share, before the head; None for no such."""

    attention_scale: float = 0.12
    """What q·k is multiplied with before the softmax; q and k are normalised to length √H."""

    rope_base: float = 1024.0
    """The slowest rotary pair turns by 1 / rope_base radians per token."""

    rope_fraction: float = 0.5
    """Share of the pairs of each head that are rotated; the rest knows no positions."""

    softcap: float = 15.0
    """Logits are bounded smoothly to ± this; at most 40."""

    logit_scale: float = 1.0
    """What logits are multiplied with before they are bounded, after logit_shift was added."""

    logit_shift: float = 0.0
    """See logit_scale."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for a shape that cannot be built."""
        for name in ("vocab_size", "num_layers", "num_heads", "width", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.width % (4 * self.num_heads):
            raise ConfigError(
                f"width must be a multiple of 4 * num_heads, which {self.width} is not of "
                f"4 * {self.num_heads}: the head size must be a multiple of 4."
            )
        if not 0 <= self.value_embeddings <= self.num_layers:
            raise ConfigError(
                f"value_embeddings must be 0 to num_layers, {self.num_layers}, "
                f"not {self.value_embeddings}."
            )
        if min(self.bigram_buckets, *self.windows, 0) < 0:
            raise ConfigError("bigram_buckets and windows must not be negative.")
        if min(self.earlier_windows, default=1) < 1:
            raise ConfigError(f"earlier_windows must be at least 1: {self.earlier_windows}.")
        if self.earlier_windows and not min(self.windows, default=0):
            raise ConfigError("earlier_windows need windows, all of them at least 1.")
        if self.backout is not None and not 0 <= self.backout < self.num_layers:
            raise ConfigError(
                f"backout names layer {self.backout}, but there are layers 0 to "
                f"{self.num_layers - 1}."
            )
        for name, layers in {
            "mlp_only": self.mlp_only,
            "key_offset": self.key_offset,
            "paired_heads": self.paired_heads,
        }.items():
            for layer in layers:
                if not -self.num_layers <= layer < self.num_layers:
                    raise ConfigError(
                        f"{name} names layer {layer}, but there are layers 0 to "
                        f"{self.num_layers - 1}."
                    )
        if self.paired_heads and self.num_heads % 2:
            raise ConfigError(f"paired_heads needs an even num_heads, not {self.num_heads}.")
        if self.num_attentions == 0:
            raise ConfigError("mlp_only names all layers, but one must have attention.")
        for name in ("smear", "attention_gate"):
            if getattr(self, name) and self.width < GATE_INPUTS:
                raise ConfigError(
                    f"{name} reads {GATE_INPUTS} channels, but width is {self.width}: set it to "
                    "False."
                )
        if not 0 <= (self.document_separator or 0) < self.vocab_size:
            raise ConfigError(
                f"document_separator must be one of the {self.vocab_size:,} token ids, "
                f"not {self.document_separator}."
            )
        if not 0 < self.attention_scale < inf:
            raise ConfigError(f"attention_scale must be positive, not {self.attention_scale}.")
        if not 1 <= self.rope_base < inf:
            raise ConfigError(f"rope_base must be at least 1, not {self.rope_base}.")
        if not 0 <= self.rope_fraction <= 1:
            raise ConfigError(
                f"rope_fraction must lie between 0 and 1, not at {self.rope_fraction}."
            )
        if not 0 < self.softcap <= 40:
            raise ConfigError(f"softcap must lie above 0 and not above 40, not at {self.softcap}.")
        if not 0 < self.logit_scale < inf or not -inf < self.logit_shift < inf:
            raise ConfigError(
                f"logit_scale must be positive and logit_shift a number, not {self.logit_scale} "
                f"and {self.logit_shift}."
            )

    @property
    def head_size(self) -> int:
        """H, the width of one attention head."""
        return self.width // self.num_heads

    def layers(self, named: tuple[int, ...]) -> set[int]:
        """The layers that a setting names, counted from 0."""
        return {layer % self.num_layers for layer in named}

    @property
    def num_attentions(self) -> int:
        """How many layers have attention."""
        return self.num_layers - len(self.layers(self.mlp_only))

    @property
    def padded_vocab_size(self) -> int:
        """V, the vocabulary rounded up to a multiple of 128 as matrix units like it (50304)."""
        return -(-self.vocab_size // 128) * 128

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, itself included; None for all before it."""
        return (self.windows[layer % len(self.windows)] or None) if self.windows else None


def from_json(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The dataclass with these values, whose tuples JSON made lists."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def mesh_axes(text: str | None) -> dict[str, int]:
    """Devices along each axis of a mesh, from such as "data=4,model=2"; none for None."""
    if text is None:
        return {}
    found = re.fullmatch(r"(?:data=([1-9]\d*),)?model=([1-9]\d*)|data=([1-9]\d*)", text)
    if not found:
        raise ConfigError(
            f"mesh must be devices by axis, such as data=4,model=2 or model=2, not {text!r}."
        )
    data, model, alone = (int(group) if group else None for group in found.groups())
    return {"data": data or alone, "model": model or 1}
