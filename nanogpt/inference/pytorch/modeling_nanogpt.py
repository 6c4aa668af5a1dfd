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

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanogpt import NanoGPTConfig

GATE_INPUTS = 12  # channels of the residual stream that gates read
HIDDEN = 64  # width of the MLPs of dynamic connections and gates
MODULUS = 2**32  # of hashes
FIELDS = CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if "cache" in FIELDS else "past_key_values"  # its name in older versions
Gates = dict[tuple[str, int], Tensor]  # [B, T, 1 or N], or one for all tokens, by kind and layer


def parameter(*shape: int) -> nn.Parameter:
    """Return a parameter of zeros, to be loaded."""
    return nn.Parameter(torch.zeros(shape))


def norm(x: Tensor) -> Tensor:
    """Return x [..., D] divided by its root mean square."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=2**-23).to(x.dtype)


def opened(x: Tensor, gate: Tensor) -> Tensor:
    """Return how far each token of x [B, T, D] opens each of N gates, from 0 to 1 [B, T, N]."""
    return torch.sigmoid(x[:, :, : len(gate)] @ gate)


class Shares(NamedTuple):
    """The coefficients of the stream in a layer, and of all that is added to it."""

    stream: Tensor
    embedding: Tensor | float
    bigrams: Tensor | float
    attention: Tensor | float = 1.0
    stream_again: Tensor | float = 1.0  # the stream after attention
    mlp: Tensor | float = 1.0


class Connections(nn.Module):
    """Weights that each token computes for itself, with an MLP."""

    def __init__(self, width: int, weights: int):
        super().__init__()
        self.up, self.down = parameter(width, HIDDEN), parameter(HIDDEN, weights)
        self.bias = parameter(weights)

    def forward(self, x: Tensor, scale: Tensor | float = 0.1) -> Tensor:
        """Return the weights [B, T, weights] of the tokens of x [B, T, D]."""
        return scale * (F.gelu(x @ self.up) @ self.down + self.bias)


class DynamicGates(Connections):
    """The gates of some layers."""

    def __init__(self, width: int, sizes: dict[tuple[str, int], int]):
        super().__init__(width, sum(sizes.values()))
        self.sizes = sizes

    def chosen(self, x: Tensor, scale: Tensor) -> Gates:
        """Return each of the gates."""
        each = self.forward(x, scale).split([*self.sizes.values()], dim=-1)
        return dict(zip(self.sizes, each, strict=True))


class Dynamic(nn.Module):
    """All that tokens choose for themselves."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        D, L, again = config.hidden_size, config.num_hidden_layers, config.late_gates_from
        sources = 3 + bool(config.model["value_layers"]) + len(config.skip_pairs)
        self.last_layer, self.before_head = Connections(D, 14), Connections(D, sources)
        self.early_gates = DynamicGates(D, config.gates(range(again)))
        self.late_gates = DynamicGates(D, config.gates(range(again, L)))
        self.gate_scale = parameter()

    def early(self, x0: Tensor) -> Gates:
        """Return the gates that tokens choose before the first layer."""
        return self.early_gates.chosen(x0, self.gate_scale)

    def late(self, x: Tensor) -> Gates:
        """Return those of later layers."""
        return self.late_gates.chosen(x, self.gate_scale)


def mixed(weights: tuple[Tensor, ...], *sources: Tensor) -> Tensor:
    """Return the sum of the sources [B, T, D], each times its weight for each token."""
    return sum(weight * source for weight, source in zip(weights, sources, strict=True))


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

    def seen(self, window: float, places: int) -> Tensor:
        """Return which keys each query sees, [B, 1, places T, places S]."""
        documents = self.documents.repeat_interleave(places, dim=1)
        at = torch.arange(documents.shape[1], device=documents.device)
        ago = at[-places * self.T :, None] - at
        near = (ago >= 0) & (ago < window)
        return (near & (documents[:, -places * self.T :, None] == documents[:, None]))[:, None]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        """Return the attention output; it, and q, k and v, are [B, N, T, H]."""
        paired = layer in self.config.layers("paired_heads")
        places, joined, apart = (2, pair, part) if paired else (1, lambda x: x, lambda x: x)
        q, k = (apart(self.rotated(joined(x), places)) for x in (q, k))
        k, v = self.kept(1 + self.config.attentions.index(layer), k, v)
        if layer in self.config.layers("key_offset"):
            k = torch.where(self.still, self.before(k), k)
        window = self.config.window(layer, places)
        q, k, v, seen = joined(q), joined(k), joined(v), self.seen(window, places)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
        if ("taken", layer) in gates:
            seen = self.seen(min(self.config.model["composed_window"], window), places)
            y = y + self.shared(q, k, v, seen, gates["given", layer], gates["taken", layer])
        return apart(y)

    def shared(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, given: Tensor, taken: Tensor
    ) -> Tensor:
        """Return what each head adds by attending where all heads do, with weights [B, T, N].

        `given` are those from heads, which are divided by their root mean square, and `taken` those
        to heads.
        """
        scores = self.scale * q.float() @ k.float().mT
        attended = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        given = F.rms_norm(given.float(), given.shape[-1:], eps=1e-6)
        shared = torch.einsum("bnts,btn->bts", attended, given).to(v.dtype)
        return taken.mT[..., None] * (shared[:, None] @ v)


class NanoGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder-only transformer language model."""

    config_class = NanoGPTConfig
    _supports_sdpa = True
    _no_split_modules = ()

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        c, V, D = config.model, config.vocab_size, config.hidden_size
        L, N, A = config.num_hidden_layers, config.num_attention_heads, len(config.attentions)
        tables, late = c["value_embeddings"], c["attention_source"] is not None
        self.embed, self.head = parameter(V, D), parameter(D, V)
        if tables:
            self.value_embed = parameter(tables, V, D)
        if gates := len(config.gated_values):
            self.value_gate = parameter(gates, GATE_INPUTS, N)
        if c["smear"]:
            self.smear = nn.ParameterDict({"gate": parameter(GATE_INPUTS, 1), "share": parameter()})
        self.attention = nn.ParameterDict(
            {"qkv": parameter(A, 3, D, D), "out": parameter(A, D, D), "own_share": parameter(A)}
        )
        self.attention["out_share" if tables and c["value_gate"] else "mixed_share"] = parameter(A)
        if c["attention_gate"]:
            self.attention["gate"] = parameter(A, GATE_INPUTS, N)
        up, down = parameter(L, D, c["mlp_width"]), parameter(L, c["mlp_width"], D)
        self.mlp = nn.ParameterDict({"up": up, "down": down})
        fixed = L - c["dynamic"]  # layers whose shares are the same for all tokens
        self.residual_shares = parameter(fixed, 2) if late else parameter(fixed)
        if late:
            self.output_shares = parameter(fixed, 2)
        if c["bigram_buckets"]:
            self.bigram_embed = parameter(c["bigram_buckets"], c["bigram_width"] or D)
        if skips := len(config.skip_pairs):
            self.skips = parameter(skips)
        if c["backout"] is not None:
            self.backout = parameter()
        if c["dynamic"]:
            self.dynamic = Dynamic(config)
        else:
            self.embedding_shares = parameter(L)
            if c["bigram_buckets"]:
                self.bigram_shares = parameter(L)
            if c["skips"]:
                self.skip_gate = parameter(skips, GATE_INPUTS, 1)
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
        c, config, L = self.config.model, self.config, self.config.num_hidden_layers
        x = first = x0 = self.embedded(tokens, past)
        gates = self.dynamic.early(x0) if c["dynamic"] else self.fixed_gates(x0)
        late, bigrams, outputs = c["attention_source"], 0.0, []
        if c["bigram_buckets"]:
            bigrams = self.bigrams(tokens, past.tokens_before)
            x = first = x0 if late is None else x0 + gates["bigram", 0] * bigrams
        mixed_in = {
            layer: self.value_embed[table][tokens].to(x0.dtype)
            for layer, table in config.value_tables.items()
        }
        tables = [mixed_in[layer] for layer in c["value_layers"]]
        for layer in range(L):
            if c["dynamic"] and layer == config.late_gates_from:
                gates |= self.dynamic.late(x)
            for number, (source, target) in enumerate(config.skip_pairs):
                if target == layer:
                    x = x + self.skip_share(number, gates) * outputs[source]
            if layer == config.dynamic_layer:
                x, values, share = self.connected(x, first, outputs[late], mixed_in.get(layer))
                mixed_in, x0 = {layer: values}, first
            else:
                share = self.shares(layer, gates)
            if layer in config.attentions:
                stream = share.stream * x + share.embedding * x0 + share.bigrams * bigrams
                source = stream if late is None else outputs[late] if layer > late else x
                how = mixed_in.get(layer), gates, past
                added, values = self.attended(layer, norm(source), *how)
                x = stream + share.attention * added
                if not c["value_embeddings"] and not mixed_in:  # later layers add the first values
                    mixed_in = dict.fromkeys(range(L), values)
            hidden = F.relu(norm(x) @ self.mlp["up"][layer]).square()
            x = share.stream_again * x + share.mlp * (hidden @ self.mlp["down"][layer])
            outputs.append(x)
        if c["backout"] is not None:
            x = x - self.backout * outputs[c["backout"]]
        if c["dynamic"]:
            skipped = [outputs[source] for source, _ in config.skip_pairs]
            sources = x0, outputs[late], outputs[-2], *tables[:1], *skipped
            x = x + mixed(self.dynamic.before_head(x).split(1, dim=-1), *sources)
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

    def bigrams(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Return the embedding of each token with the one before it [B, T, D].

        If they have a width of their own, they have signs, from another hash of each pair, and
        zeros in the other channels.
        """
        c = self.config.model
        hashed = (tokens * 0x9E3779B1 ^ before * 0x85EBCA77) % MODULUS
        found = self.bigram_embed[(hashed ^ (hashed >> 15)) % c["bigram_buckets"]]
        found = found.to(self.head.dtype)
        if c["bigram_width"] is None:
            return found
        channels = torch.arange(c["bigram_width"], device=tokens.device)
        hashed = (hashed[..., None] + channels * 0x9E3779B9) % MODULUS
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            hashed = (hashed ^ (hashed >> shift)) * factor % MODULUS
        return F.pad(found * (1 - 2 * (hashed & 1)), (0, c["width"] - c["bigram_width"]))

    def fixed_gates(self, x0: Tensor) -> Gates:
        """Return the gates of a model whose tokens do not choose them."""
        gates = {("embedding", layer): share for layer, share in enumerate(self.embedding_shares)}
        if self.config.model["bigram_buckets"]:
            gates |= {("bigram", layer): share for layer, share in enumerate(self.bigram_shares)}
        if self.config.model["skips"]:
            opens = (2 * opened(x0, gate) for gate in self.skip_gate)
            gates |= {("skip", number): gate for number, gate in enumerate(opens)}
        return gates

    def shares(self, layer: int, gates: Gates) -> Shares:
        """Return the coefficients in a layer without dynamic connections."""
        stream = self.residual_shares[layer]
        embedding, bigrams = (gates.get((kind, layer), 0.0) for kind in ("embedding", "bigram"))
        if self.config.model["attention_source"] is None:
            return Shares(stream, embedding, bigrams)
        bigrams = bigrams if layer > 0 else 0.0  # the first layer begins with them
        (stream, again), (attention, mlp) = stream, self.output_shares[layer]
        return Shares(stream, embedding, bigrams, attention, again, mlp)

    def connected(
        self, x: Tensor, first: Tensor, late: Tensor, values: Tensor | None
    ) -> tuple[Tensor, Tensor, Shares]:
        """Return the last layer's stream, what it adds to its values, and its coefficients.

        Each half of the layer's value embedding, `values`, has a weight of its own.
        """
        weights = self.dynamic.last_layer(x).split(1, dim=-1)
        to_values, to_stream, gates, shares = weights[:3], weights[3:6], weights[6:8], weights[8:]
        added = mixed(to_values, first, late, x)
        if values is not None:
            halves = zip(gates, values.chunk(2, dim=-1), strict=True)
            added = added + torch.cat([gate * half for gate, half in halves], dim=-1)
        return x + mixed(to_stream, first, late, x), added, Shares(*shares)

    def skip_share(self, number: int, gates: Gates) -> Tensor:
        """Return the coefficient of a skip connection, per token if it is gated."""
        if self.config.model["skips"] is None:
            return self.skips[number]
        return torch.sigmoid(self.skips[number]) * gates["skip", number]

    def attended(
        self, layer: int, x: Tensor, mixed_in: Tensor | None, gates: Gates, past: Past
    ) -> tuple[Tensor, Tensor]:
        """Return what an attention adds to the stream, and its values, with `mixed_in` added.

        They, x and `mixed_in` are [B, T, D].
        """
        i, p = self.config.attentions.index(layer), self.attention
        q, k, v = (self.by_head(x @ weight) for weight in p["qkv"][i])
        v = p["own_share"][i] * v
        if mixed_in is not None:
            v = v + self.value_share(layer, x, mixed_in) * self.by_head(mixed_in)
        y = past.attention(layer, norm(q), norm(k), v, gates)
        y, v = y.transpose(1, 2), v.transpose(1, 2)
        if ("exclusion", layer) in gates:
            along, square = ((each * v).sum(dim=-1, keepdim=True) for each in (y, v))
            share = gates["exclusion", layer].tanh()[..., None]
            y = y - share * along / square.clamp(min=1e-8) * v
        if ("gate", layer) in gates:
            y = y * gates["gate", layer][..., None]
        if "gate" in p:
            y = y * opened(x, p["gate"][i])[..., None]
        out = p["out_share"][i] * p["out"][i] if "out_share" in p else p["out"][i]
        return y.flatten(2) @ out, v.flatten(2)

    def value_share(self, layer: int, x: Tensor, mixed_in: Tensor) -> Tensor | float:
        """Return the coefficient of `mixed_in` in a layer's values, [B, N, T, 1] if it is gated."""
        config = self.config
        if layer in config.gated_values:
            if config.model["value_layers"]:
                x = torch.cat([each[:, :, : GATE_INPUTS // 2] for each in (x, mixed_in)], dim=-1)
            gate = self.value_gate[config.gated_values.index(layer)]
            return 2 * opened(x, gate).transpose(1, 2)[..., None]
        if layer == config.dynamic_layer:
            return 1.0
        return self.attention["mixed_share"][config.attentions.index(layer)]

    def by_head(self, x: Tensor) -> Tensor:
        """Split into heads, [B, T, D] to [B, N, T, H]."""
        return x.unflatten(2, (self.config.num_attention_heads, -1)).transpose(1, 2)
