"""The shape of a model, and which kernels compute it.

JAX is not imported here, so that `--help` and errors in the arguments appear at once.
"""

import re
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from nanogpt.checks import (
    MOST,
    AboveZero,
    ConfigError,
    Count,
    Finite,
    NotNegative,
    Positive,
    Share,
    checked,
)
from nanogpt.checks import UserError as UserError

AttentionKernel = Literal["xla", "cudnn", "pallas", "splash"]
LossKernel = Literal["xla", "pallas"]
TokenizerName = Literal["gpt2", "bytes"]
ComputeType = Literal["float32", "bfloat16"]

GATE_INPUTS = 12  # channels of the stream that gates read


@dataclass(frozen=True)
class Kernels:
    """How a model is computed: affects speed and memory, but results only through rounding."""

    attention: AttentionKernel = "xla"
    """See nanogpt/model/attention.py."""

    loss: LossKernel = "xla"
    """See nanogpt/model/loss.py."""

    fp8_head: bool = False
    """Compute the head's matmuls in FP8."""

    rematerialize: bool = False
    """Recompute layers in the backward pass instead of storing their activations."""

    tensor_parallel: bool = False
    """Tensor parallelism over heads and MLPs; see nanogpt/devices/sharding.py."""


@dataclass(frozen=True)
class GPTConfig:
    """The model's architecture. The defaults have the size of the smallest GPT-2."""

    ADDED: ClassVar = {
        *("value_layers", "bigram_width", "attention_out_init", "attention_source"),
        *("exclusive", "dynamic", "gated", "composed", "composed_window"),
    }  # see `checked`

    vocab_size: Positive = 50257
    """Number of token ids, V; padded to a multiple of 128."""

    num_layers: Annotated[int, Meta(ge=1, le=1000)] = 12
    """Number of transformer layers, L."""

    num_heads: Positive = 6
    """Number of attention heads, N. The head size H = width / num_heads must be a multiple of 4."""

    width: Positive = 768
    """Width of the residual stream, D."""

    mlp_width: Positive = 3072
    """Hidden width of each MLP, F."""

    mlp_only: tuple[int, ...] = ()
    """Layers without attention; negative indices count from the last layer."""

    windows: tuple[Count, ...] = ()
    """Attention window of each layer: the number of keys a query sees, its own included; 0 or no
    entry: all. With paired heads, the keys of both heads count."""

    rotary_windows: tuple[Positive, ...] = ()
    """Longest windows of this and earlier stages, from which rotary frequencies are rescaled
    (YaRN)."""

    document_separator: Count | None = None
    """Token that begins each document: attention stays within documents; None: it crosses them."""

    value_embeddings: int = 3
    """Number of value embeddings: token tables mixed into the attention values of the last layers,
    one per layer; the first layers reuse all but the first table. With 0, the first attention's
    values are mixed into those of all others."""

    value_layers: tuple[Count, ...] = ()
    """Layers with a value embedding, each with its own table, which its gates read, too; empty: see
    value_embeddings."""

    value_gate: bool = True
    """Gate value embeddings per token and head; False: one learned share per layer."""

    bigram_buckets: Count = 0
    """Rows of the hashed bigram embedding table, added to the residual stream in each layer with
    attention; 0 for none."""

    bigram_width: Positive | None = None
    """Width of the bigram embeddings, which are added to the first channels of the stream, with
    other signs for each token pair; None: that of the stream, without signs."""

    smear: bool = True
    """Add a gated part of the previous token's embedding to each token's."""

    attention_gate: bool = True
    """Gate the output of each attention head, per token."""

    attention_init: AboveZero = 1.0
    """Initial standard deviation of the query, key and value matrices, times sqrt(width)."""

    attention_out_init: NotNegative = 0.0
    """The same for the attention's output matrices."""

    attention_source: int | None = None
    """Layer whose output is read by the attentions of all later layers; those up to it read the
    stream before token and bigram embeddings are added. None: all read the stream after that."""

    residual_init: AboveZero = 1.0
    """Initial value of the learned factor on the residual stream in each layer."""

    skips: tuple[tuple[Count, Count], ...] | None = None
    """Skip connections as pairs of layers: the first one's output is added, gated, before the
    second. None for a U-net: first half to second half, each with a learned weight."""

    key_offset: tuple[int, ...] = ()
    """Layers in which the unrotated half of each key comes from the previous token."""

    paired_heads: tuple[int, ...] = ()
    """Layers with paired heads: two heads attend to the keys of both."""

    exclusive: tuple[int, ...] = ()
    """Layers that remove a share of the attention output along the token's own value; the share
    is dynamic."""

    gated: tuple[int, ...] = ()
    """Layers with a dynamic gate for each attention head."""

    composed: tuple[int, ...] = ()
    """Layers whose heads also attend where other heads do, with dynamic weights."""

    composed_window: Positive = 112
    """Number of keys, a query's own included, that composed heads share."""

    backout: int | None = None
    """Layer whose output, times a learned factor, is subtracted before the head; None for none."""

    dynamic: bool = False
    """Let each token choose the gates of all layers, and how the last layer and the head combine
    earlier outputs; needs attention_source."""

    tied_head: bool = False
    """Tie embedding and head until a stage of the run splits them."""

    attention_scale: AboveZero = 0.12
    """Scale of q·k before the softmax; q and k are normalized to length √H."""

    rope_base: Annotated[float, Meta(ge=1, le=MOST)] = 1024.0
    """Base of the rotary frequencies: the slowest is 1 / rope_base radians per token."""

    rope_fraction: Share = 0.5
    """Fraction of each head's channel pairs that are rotated."""

    softcap: Annotated[float, Meta(gt=0, le=40)] = 15.0
    """Soft cap on the logits, at most 40."""

    logit_scale: AboveZero = 1.0
    """Factor on the logits before the soft cap, after logit_shift is added."""

    logit_shift: Finite = 0.0
    """Added to the logits before logit_scale and the soft cap."""

    def check(self) -> None:
        """Raise ConfigError, with a sentence for the user, if the configuration is invalid."""
        checked(asdict(self), GPTConfig)
        if self.width % (4 * self.num_heads):
            raise ConfigError(
                f"width ({self.width}) must be a multiple of 4 * num_heads ({4 * self.num_heads})."
            )
        if not 0 <= self.value_embeddings <= self.num_layers:
            raise ConfigError(
                f"value_embeddings must be 0 to num_layers, {self.num_layers}, "
                f"not {self.value_embeddings}."
            )
        for name, layer in {
            "backout": self.backout,
            "attention_source": self.attention_source,
        }.items():
            if layer is not None and not 0 <= layer < self.num_layers:
                raise ConfigError(
                    f"{name} is layer {layer}, but layers are numbered 0 to {self.num_layers - 1}."
                )
        for source, target in self.skips or ():
            if not source < target < self.num_layers:
                raise ConfigError(
                    f"skips has ({source}, {target}), but a skip must go from one of the layers 0 "
                    f"to {self.num_layers - 1} to a later one."
                )
        for name, layers in {
            "mlp_only": self.mlp_only,
            "key_offset": self.key_offset,
            "paired_heads": self.paired_heads,
            "exclusive": self.exclusive,
            "gated": self.gated,
            "composed": self.composed,
            "value_layers": self.value_layers,
        }.items():
            for layer in layers:
                if not -self.num_layers <= layer < self.num_layers:
                    raise ConfigError(
                        f"{name} contains layer {layer}, but layers are numbered 0 to "
                        f"{self.num_layers - 1}."
                    )
        if self.paired_heads and self.num_heads % 2:
            raise ConfigError(f"paired_heads needs an even num_heads, not {self.num_heads}.")
        for name in ("exclusive", "composed"):
            if both := self.layers(self.paired_heads) & self.layers(getattr(self, name)):
                raise ConfigError(f"paired_heads and {name} both contain layer {min(both)}.")
        for name in ("exclusive", "gated", "composed"):
            if getattr(self, name) and not self.dynamic:
                raise ConfigError(f"{name} needs dynamic, but it is False.")
        if (own := self.value_layers) and not self.value_embeddings == len(own) == len({*own}):
            raise ConfigError(
                f"value_layers must be as many different layers as value_embeddings, "
                f"{self.value_embeddings}, not {own}."
            )
        if idle := self.layers(self.value_layers) & self.layers(self.mlp_only):
            raise ConfigError(f"value_layers contains layer {min(idle)}, which has no attention.")
        if self.bigram_width and self.bigram_width > self.width:
            raise ConfigError(
                f"bigram_width ({self.bigram_width}) must be at most width ({self.width})."
            )
        last = self.num_layers - 1
        if self.dynamic and self.attention_source in (None, last):
            raise ConfigError("dynamic needs an attention_source before the last layer.")
        again, mlp_only = self.late_gates_from, self.layers(self.mlp_only)
        if self.dynamic and again >= last:
            raise ConfigError(f"dynamic needs 3 layers or more, not {self.num_layers}.")
        for first, end in ((0, 0), (again, last - 1), (last, last)) if self.dynamic else ():
            if mlp_only.issuperset(range(first, end + 1)):
                which = f"layer {first}" if first == end else f"one of layers {first} to {end}"
                raise ConfigError(f"dynamic needs attention in {which}: change mlp_only.")
        if self.num_attentions == 0:
            raise ConfigError("mlp_only contains all layers, but at least one needs attention.")
        for name, used in {
            "smear": self.smear,
            "attention_gate": self.attention_gate,
            "value_gate": self.value_gate and self.value_embeddings,
        }.items():
            if used and self.width < GATE_INPUTS:
                raise ConfigError(
                    f"{name} reads {GATE_INPUTS} channels, but width is {self.width}: set it to "
                    "False."
                )
        if self.skips and not self.dynamic and self.width < GATE_INPUTS:
            raise ConfigError(
                f"skips reads {GATE_INPUTS} channels, but width is {self.width}: set it to None."
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
        """Return the layers in a setting, counted from 0."""
        return {layer % self.num_layers for layer in named}

    @property
    def skip_pairs(self) -> tuple[tuple[int, int], ...]:
        """The source and target layer of each skip connection."""
        L = self.num_layers
        unet = tuple((L - 1 - layer, layer) for layer in range(L - L // 2, L))
        return unet if self.skips is None else self.skips

    @property
    def value_tables(self) -> dict[int, int]:
        """The value table of each layer that mixes one in."""
        L, count = self.num_layers, self.value_embeddings
        tables = {layer: layer + 1 for layer in range(count - 1)}
        tables |= {L - count + table: table for table in range(count)}
        if self.value_layers:
            tables = {layer: table for table, layer in enumerate(self.value_layers)}
        return {
            layer: tables[layer] for layer in sorted(tables.keys() - self.layers(self.mlp_only))
        }

    @property
    def gated_values(self) -> tuple[int, ...]:
        """The layers whose value embeddings have gates."""
        last = self.num_layers - 1 if self.dynamic else None
        return tuple(layer for layer in self.value_tables if self.value_gate and layer != last)

    @property
    def late_gates_from(self) -> int:
        """With `dynamic`, the first layer whose gates are chosen late, from the stream before it;
        those of earlier layers are chosen from the embeddings."""
        return max(1, ((self.attention_source or 0) + 1) // 2)

    @property
    def num_attentions(self) -> int:
        """Number of layers with attention."""
        return self.num_layers - len(self.layers(self.mlp_only))

    @property
    def padded_vocab_size(self) -> int:
        """V, the vocabulary size rounded up to a multiple of 128 for matrix units (50304)."""
        return -(-self.vocab_size // 128) * 128

    def reach(self, row_length: int) -> int:
        """Return the most keys that a query of any layer sees in rows of this length."""
        return max(self.window(layer) or row_length for layer in range(self.num_layers))

    def window(self, layer: int) -> int | None:
        """Return how many keys a query of this layer sees, its own included; None for all."""
        return (self.windows[layer % len(self.windows)] or None) if self.windows else None


@dataclass(frozen=True)
class ModelSettings:
    """The settings needed to use a trained model, in the config.json of its run or export."""

    tokenizer: TokenizerName
    sequence_length: Positive
    dtype: ComputeType
    model: GPTConfig


def mesh_axes(text: str | None) -> dict[str, int]:
    """Parse a text such as "data=4,model=2" into arguments of `make_mesh`, or raise ConfigError."""
    if text is None:
        return {}
    found = re.fullmatch(r"(?:data=([1-9]\d*),)?model=([1-9]\d*)|data=([1-9]\d*)", text)
    if not found:
        raise ConfigError(
            f"mesh must give devices per axis, such as data=4,model=2 or model=2, not {text!r}."
        )
    data, model, alone = found.groups()
    return {"model": int(model or 1)} | ({"data": int(data or alone)} if data or alone else {})
