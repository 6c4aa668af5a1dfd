"""The shape of a model, and which kernels compute it.

No JAX here, so that `--help` and wrong arguments answer at once.
"""

import re
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from msgspec import Meta

from nanogpt.checks import MOST, AboveZero, ConfigError, Count, Finite, Positive, Share, checked
from nanogpt.checks import UserError as UserError

AttentionKernel = Literal["xla", "cudnn", "pallas", "splash"]
LossKernel = Literal["xla", "pallas"]
TokenizerName = Literal["gpt2", "bytes"]
ComputeType = Literal["float32", "bfloat16"]

GATE_INPUTS = 12  # channels of the stream that gates read


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

    vocab_size: Positive = 50257
    """Token ids that the data may hold; tables are padded to a multiple of 128."""

    num_layers: Positive = 12
    """Transformer blocks, L."""

    num_heads: Positive = 6
    """Attention heads, N. The head size H is width / num_heads, a multiple of 4."""

    width: Positive = 768
    """Width of the residual stream, D."""

    mlp_width: Positive = 3072
    """Width of the hidden layer of each MLP, F."""

    mlp_only: tuple[int, ...] = ()
    """Layers without attention, counted from 0, or from -1 backwards."""

    windows: tuple[Count, ...] = ()
    """Keys that a query sees, itself included, in each layer in turn; 0, or no entry, for all."""

    earlier_windows: tuple[Positive, ...] = ()
    """The longest windows of the training stages before, whose rotations those of windows slow."""

    document_separator: Count | None = None
    """Token that begins a document, to keep attention within documents; None lets it cross them."""

    value_embeddings: int = 3
    """Token tables mixed into the values of the first, and again of the last, so many layers; with
    0 the values of the first attention are mixed into all others."""

    bigram_buckets: Count = 0
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

    attention_scale: AboveZero = 0.12
    """What q·k is multiplied with before the softmax; q and k are normalised to length √H."""

    rope_base: Annotated[float, Meta(ge=1, le=MOST)] = 1024.0
    """The slowest rotary pair turns by 1 / rope_base radians per token."""

    rope_fraction: Share = 0.5
    """Share of the pairs of each head that are rotated; the rest knows no positions."""

    softcap: Annotated[float, Meta(gt=0, le=40)] = 15.0
    """Logits are bounded smoothly to ± this; at most 40."""

    logit_scale: AboveZero = 1.0
    """What logits are multiplied with before they are bounded, after logit_shift was added."""

    logit_shift: Finite = 0.0
    """See logit_scale."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for a shape that cannot be built."""
        checked(asdict(self), GPTConfig)
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


@dataclass(frozen=True)
class ModelSettings:
    """How a trained model is used; the config.json of its run, or of its export, has it."""

    tokenizer: TokenizerName
    sequence_length: Positive
    dtype: ComputeType
    model: GPTConfig


def mesh_axes(text: str | None) -> dict[str, int]:
    """The arguments of `make_mesh` that a text such as "data=4,model=2" stands for."""
    if text is None:
        return {}
    found = re.fullmatch(r"(?:data=([1-9]\d*),)?model=([1-9]\d*)|data=([1-9]\d*)", text)
    if not found:
        raise ConfigError(
            f"mesh must be devices by axis, such as data=4,model=2 or model=2, not {text!r}."
        )
    data, model, alone = found.groups()
    return {"model": int(model or 1)} | ({"data": int(data or alone)} if data or alone else {})
