"""The GPT of jax-flax-nanogpt in PyTorch, for transformers.

    tokens -> embed -> norm -> x0 -> L layers -> norm -> head -> softcap -> logits

MODEL.md describes each array; nanogpt/model/gpt.py of jax-flax-nanogpt gives the source of each
trick. Matrices multiply from the right, and the arrays of attentions and MLPs are stacked along a
leading axis of layers, so that both programs share one model.safetensors.

The first layer of the KV cache holds the token ids. Each further layer holds an attention's rotated
keys and its values of all tokens: windows and documents only mask them.

Shapes: B batch, T new tokens, S new and cached tokens, D model width, N heads, H head size, F MLP
width, V vocabulary, L layers, A attentions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanogpt import NanoGPTConfig

GATE_INPUTS = 12  # channels of the residual stream that gates read
FIELDS = CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if "cache" in FIELDS else "past_key_values"  # its name in older versions


def parameter(*shape: int) -> nn.Parameter:
    """Return a parameter of zeros, to be loaded."""
    return nn.Parameter(torch.zeros(shape))


def norm(x: Tensor) -> Tensor:
    """Return x [..., D] divided by its root mean square."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=2**-23).to(x.dtype)


def opened(x: Tensor, gate: Tensor) -> Tensor:
    """Return how far each token of x [B, T, D] opens each of N gates, from 0 to 1 [B, T, N]."""
    return torch.sigmoid(x[:, :, : len(gate)] @ gate)


def pair(x: Tensor) -> Tensor:
    """Interleave pairs of heads, [B, N, S, H] to [B, N/2, 2S, H]."""
    B, N, S, H = x.shape
    return x.view(B, N // 2, 2, S, H).transpose(2, 3).reshape(B, N // 2, 2 * S, H)


def part(x: Tensor) -> Tensor:
    """Undo `pair`."""
    B, pairs, places, H = x.shape
    return x.view(B, pairs, places // 2, 2, H).transpose(2, 3).reshape(B, 2 * pairs, -1, H)


class Past:
    """How new tokens [B, T] access each other and the earlier tokens in the cache."""

    def __init__(
        self, config: NanoGPTConfig, new: Tensor, mask: Tensor | None, cache: Cache | None
    ):
        """`mask` [B, S] is 0 for padding, which is not part of the document after it."""
        self.config, self.cache, self.T = config, cache, new.shape[1]
        if cache is not None:  # a cache created from the configuration lacks layers
            missing = 1 + len(config.attentions) - len(cache.layers)
            cache.layers += [DynamicLayer() for _ in range(missing)]
        tokens = self.kept(0, new[:, None, :, None], new[:, None, :, None])[0][:, 0, :, 0]
        there = torch.ones_like(tokens) if mask is None else mask
        begins = there.bool() & ~F.pad(there, (1, 0))[:, :-1].bool()
        if config.model["document_separator"] is not None:
            begins |= tokens == config.model["document_separator"]
        self.begins, self.documents = begins, begins.cumsum(dim=1)
        self.tokens_before = self.before(tokens[:, :, None])[:, -self.T :, 0]
        speed, self.scale = config.rotation
        self.still = torch.from_numpy(speed == 0).repeat(2).to(tokens.device)  # channels
        self.turns = [self.turn(places, torch.from_numpy(speed)) for places in (1, 2)]

    def kept(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values to a layer of the cache; return all that it has."""
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer)

    def before(self, x: Tensor) -> Tensor:
        """Return x [B, ..., S, any] of the previous token, zero where a document begins."""
        begins = self.begins.view(len(x), *[1] * (x.ndim - 3), -1, 1)
        return F.pad(x, (0, 0, 1, 0))[..., :-1, :].masked_fill(begins, 0)

    def turn(self, places: int, speed: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [places T, pairs] of the rotary angles of a head's pairs.

        In float64 on the CPU: angles at late positions need it, and not all accelerators have it.
        """
        end = places * self.begins.shape[1]
        angle = torch.arange(end - places * self.T, end)[:, None] * speed
        return angle.cos(), angle.sin()

    def rotated(self, x: Tensor, places: int) -> Tensor:
        """Rotate the pairs (i, i + H/2) of each head in x [B, heads, places T, H]."""
        cos, sin = (each.to(x) for each in self.turns[places - 1])
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

    def seen(self, layer: int, places: int) -> Tensor:
        """Return which keys each query sees, [B, 1, places T, places S]."""
        documents = self.documents.repeat_interleave(places, dim=1)
        at = torch.arange(documents.shape[1], device=documents.device)
        ago = at[-places * self.T :, None] - at
        near = (ago >= 0) & (ago < self.config.window(layer, places))
        return (near & (documents[:, -places * self.T :, None] == documents[:, None]))[:, None]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention output; it and all arguments are [B, N, T, H]."""
        paired = layer in self.config.layers("paired_heads")
        places, joined, apart = (2, pair, part) if paired else (1, lambda x: x, lambda x: x)
        q, k = (apart(self.rotated(joined(x), places)) for x in (q, k))
        k, v = self.kept(1 + self.config.attentions.index(layer), k, v)
        if layer in self.config.layers("key_offset"):
            k = torch.where(self.still, self.before(k), k)
        q, k, v, seen = joined(q), joined(k), joined(v), self.seen(layer, places)
        return apart(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale))


class NanoGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder-only transformer language model."""

    config_class = NanoGPTConfig
    _supports_sdpa = True
    _no_split_modules = ()

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        c, V, D = config.model, config.vocab_size, config.hidden_size
        L, N, A = config.num_hidden_layers, config.num_attention_heads, len(config.attentions)
        tables, gated = c["value_embeddings"], c["value_gate"] and c["value_embeddings"]
        self.embed, self.head = parameter(V, D), parameter(D, V)
        if tables:
            self.value_embed = parameter(tables, V, D)
        if gated and config.value_tables:
            self.value_gate = parameter(len(config.value_tables), GATE_INPUTS, N)
        if c["smear"]:
            self.smear = nn.ParameterDict({"gate": parameter(GATE_INPUTS, 1), "share": parameter()})
        self.attention = nn.ParameterDict(
            {"qkv": parameter(A, 3, D, D), "out": parameter(A, D, D), "own_share": parameter(A)}
        )
        self.attention["out_share" if gated else "mixed_share"] = parameter(A)
        if c["attention_gate"]:
            self.attention["gate"] = parameter(A, GATE_INPUTS, N)
        up, down = parameter(L, D, c["mlp_width"]), parameter(L, c["mlp_width"], D)
        self.mlp = nn.ParameterDict({"up": up, "down": down})
        self.residual_shares, self.embedding_shares = parameter(L), parameter(L)
        if c["bigram_buckets"]:
            self.bigram_embed = parameter(c["bigram_buckets"], D)
            self.bigram_shares = parameter(L)
        if skips := len(config.skip_pairs):
            self.skips = parameter(skips)
        if c["skips"]:
            self.skip_gate = parameter(skips, GATE_INPUTS, 1)
        if c["backout"] is not None:
            self.backout = parameter()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits [B, T, V], float32; positions are not needed.

        The loss is the mean cross-entropy of `labels` [B, T] in nats, each predicted from the
        tokens before it; labels of -100 do not count.
        """
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if cache is None and use_cache else cache
        x = self.features(input_ids, Past(self.config, input_ids, attention_mask, cache))
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        c = self.config.model
        z = (x[:, last] @ self.head).float()
        logits = c["softcap"] * torch.tanh((z + c["logit_shift"]) * c["logit_scale"] / c["softcap"])
        loss = None
        if labels is not None:
            count = others.get("num_items_in_batch")
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=count
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def features(self, tokens: Tensor, past: Past) -> Tensor:
        """Return the input of the head [B, T, D]: the normalized stream after the last layer."""
        c, config = self.config.model, self.config
        x = x0 = self.embedded(tokens, past)
        bigrams = None
        if c["bigram_buckets"]:
            mixed = (tokens * 0x9E3779B1 ^ past.tokens_before * 0x85EBCA77) & 0xFFFFFFFF
            bigrams = self.bigram_embed[(mixed ^ (mixed >> 15)) % c["bigram_buckets"]].to(x.dtype)
        mixed_in = {
            layer: self.by_head(self.value_embed[table][tokens].to(x.dtype))
            for layer, table in config.value_tables.items()
        }
        outputs = []
        for layer in range(config.num_hidden_layers):
            for number, (source, target) in enumerate(config.skip_pairs):
                if target == layer:
                    x = x + self.skip_share(number, x0) * outputs[source]
            x = self.residual_shares[layer] * x + self.embedding_shares[layer] * x0
            if bigrams is not None:
                x = x + self.bigram_shares[layer] * bigrams
            if layer in config.attentions:
                added, values = self.attended(layer, norm(x), mixed_in.get(layer), past)
                x = x + added
                if not c["value_embeddings"] and not mixed_in:  # later layers add the first values
                    mixed_in = dict.fromkeys(range(config.num_hidden_layers), values)
            hidden = F.relu(norm(x) @ self.mlp["up"][layer]).square()
            x = x + hidden @ self.mlp["down"][layer]
            outputs.append(x)
        if c["backout"] is not None:
            x = x - self.backout * outputs[c["backout"]]
        return norm(x)

    def embedded(self, tokens: Tensor, past: Past) -> Tensor:
        """Return the input of the first layer: embeddings, each with some of the previous one."""
        x = self.embed[tokens].float()
        if self.config.model["smear"]:
            gate, share = (self.smear[name].float() for name in ("gate", "share"))
            before = self.embed[past.tokens_before].float()
            before = before.masked_fill(past.begins[:, -past.T :, None], 0)
            x = x + share * opened(x, gate) * before
        return norm(x).to(self.head.dtype)

    def skip_share(self, number: int, x0: Tensor) -> Tensor:
        """Return the coefficient of a skip connection, per token if it is gated."""
        if self.config.model["skips"] is None:
            return self.skips[number]
        return 2 * torch.sigmoid(self.skips[number]) * opened(x0, self.skip_gate[number])

    def attended(
        self, layer: int, x: Tensor, mixed_in: Tensor | None, past: Past
    ) -> tuple[Tensor, Tensor]:
        """Return what an attention adds to the stream, and its values, with `mixed_in` added."""
        i, p = self.config.attentions.index(layer), self.attention
        q, k, v = (self.by_head(x @ weight) for weight in p["qkv"][i])
        v = p["own_share"][i] * v
        if mixed_in is not None and "mixed_share" in p:
            v = v + p["mixed_share"][i] * mixed_in
        elif mixed_in is not None:
            gate = self.value_gate[[*self.config.value_tables].index(layer)]
            v = v + 2 * opened(x, gate).transpose(1, 2)[..., None] * mixed_in
        y = past.attention(layer, norm(q), norm(k), v).transpose(1, 2)
        if "gate" in p:
            y = y * opened(x, p["gate"][i])[..., None]
        out = p["out_share"][i] * p["out"][i] if "out_share" in p else p["out"][i]
        return y.flatten(2) @ out, v

    def by_head(self, x: Tensor) -> Tensor:
        """Split into heads, [B, T, D] to [B, N, T, H]."""
        return x.unflatten(2, (self.config.num_attention_heads, -1)).transpose(1, 2)
