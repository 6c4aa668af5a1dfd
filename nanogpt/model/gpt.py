"""GPT as the NanoGPT speedrun shaped it, in Flax NNX: modded-nanogpt's model.

    tokens -> embed -> norm -> x0 -> L layers -> norm -> head -> softcap -> logits

A layer is attention, then an MLP; each reads the residual stream through a norm and adds to it.
The tricks of the speedrun are added to that, each a small function or a few lines below:

    norm                  RMSNorm without gains            (Zhang and Sennrich, arXiv:1910.07467)
    query-key norm        bounds the attention scores      (Henry et al., arXiv:2010.04245)
    rotary                positions by rotation            (Su et al., arXiv:2104.09864), of half of
                          each head only                   (modded-nanogpt, 2024-12-17)
    relu²                 the MLP's activation function    (So et al., arXiv:2109.08668)
    zero projections      output matrices start at zero    (Yang et al., arXiv:2203.03466)
    tied head             embedding and head share weights (Press and Wolf, arXiv:1608.05859; until
                          late in the run: modded-nanogpt, 2025-12-19)
    embedding shortcut    x <- a x + b x0 before attention (modded-nanogpt, 2024-11-06)
    skips                 early outputs added to late layers   (modded-nanogpt, 2024-11-10; one,
                          gated: 2025-11-18 and 12-29)
    value residual        first layer's values added to later ones   (Zhou et al., arXiv:2410.17897)
    value embeddings      token tables added instead       (modded-nanogpt, 2024-12-04 and 12-17;
                          gated: 2025-12-29; a table for each layer: 2026-01-26)
    attention gate        each head's output is scaled     (Qiu et al., arXiv:2505.06708)
    YaRN                  rotations adapt to wider windows (Peng et al., arXiv:2309.00071)
    smear                 x_t <- x_t + gate x_(t-1)        (modded-nanogpt, 2025-09)
    MLP-only layers       no attention                     (modded-nanogpt, 2024-12-17, 2025-09-21)
    backout               x <- x - a x_l before the head   (modded-nanogpt, 2025-10-04)
    key offset            part of a key comes from the previous token, so that one layer can find
                          what followed a token            (modded-nanogpt, 2025-12-14)
    paired heads          two heads attend to the keys of both   (modded-nanogpt, 2026-01-07)
    bigram embedding      hashed token pairs, in each attention layer   (modded-nanogpt, 2026-01-19)
    attention source      late attentions all read one earlier output   (modded-nanogpt, 2026-03-06)
    dynamic connections   each token weighs outputs and sets gates   (Xiao et al., arXiv:2502.12170)
    exclusive attention   output without the token's own value   (Zhai, arXiv:2603.09078)
    composed heads        heads attend where others do, too      (Xiao et al., arXiv:2405.08553)
    softcap               bounds the logits                (Gemma 2, arXiv:2408.00118)
    several targets       later tokens are predicted, too  (Gloeckle et al., arXiv:2404.19737; from
                          the same logits: modded-nanogpt, 2025-12)

Shapes, here and everywhere: B batch, T sequence, D model width, N heads, H head size, F MLP width,
V vocabulary (padded), L layers. A model computes in the dtype of its matrices; its layers are
stacked or separate: see parameters.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from nanogpt.config import GATE_INPUTS, AttentionKernel, GPTConfig, Kernels
from nanogpt.devices.sharding import from_parts, share_of_row, to_parts
from nanogpt.model.attention import heads
from nanogpt.model.bigrams import bigram_embeddings
from nanogpt.model.connections import Dynamic, Gates, fixed_gates, layer_weights, mixed
from nanogpt.model.context import Next, Rows
from nanogpt.model.gates import Smear, opened, value_share
from nanogpt.model.kernels.relu_squared import relu_squared
from nanogpt.model.loss import linear_cross_entropy
from nanogpt.model.parameters import matrix, project, stack, unstack
from nanogpt.model.rotary import rotary, rotation
from nanogpt.model.softcap import Softcap, softcap

Attend = Callable[[Array, Array, Array], Array]  # (q, k, v) -> attention output
XLA = Kernels()  # runs on any device


def norm(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Divide x by its root mean square, computed in float32."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + np.finfo(np.float32).eps)).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention over normalized, rotated queries and keys."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        D, N, key = config.width, config.num_heads, rngs.params()
        self.head_size = config.head_size
        self.qkv = nnx.Param(matrix(key, (3, D, D), config.attention_init))
        out = jax.random.fold_in(key, 1)
        self.out = nnx.Param(matrix(out, (D, D), config.attention_out_init))
        self.own_share = nnx.Param(jnp.array(0.5))
        if config.value_embeddings and config.value_gate:
            self.out_share = nnx.Param(jnp.array(1.0))
        else:
            self.mixed_share = nnx.Param(jnp.array(0.5))
        if config.attention_gate:
            self.gate = nnx.Param(jnp.zeros((GATE_INPUTS, N)))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mixed_in: Float[Array, "B T NH"] | None,
        mixed_share: float | Float[Array, "B T N 1"] | None,
        attend: Attend,
        kernel: AttentionKernel,
        exclusion: Float[Array, "B T N"] | None = None,
        gate: Float[Array, "B T N"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T NH"]]:
        """Return what to add to the stream, and the values after adding a share of `mixed_in`."""
        B, T, _ = x.shape
        matrices = self.matrices() if self.qkv.ndim == 3 else [self.qkv[...]]
        q, k, v = heads(x, matrices, self.head_size, kernel)
        if mixed_in is not None:
            share = self.mixed_share[...] if mixed_share is None else mixed_share
            v = v + share * mixed_in.reshape(v.shape)
        y = attend(q, k, v)
        if exclusion is not None:
            along, square = (jnp.sum(a * v, axis=-1, keepdims=True) for a in (y, v))
            y = y - jnp.tanh(exclusion)[..., None] * along / jnp.maximum(square, 1e-8) * v
        if gate is not None:
            y = y * gate[..., None]
        if hasattr(self, "gate"):
            y = y * opened(x, self.gate[...])
        out = self.out_share[...] * self.out[...] if hasattr(self, "out_share") else self.out[...]
        return project(y.reshape(B, T, -1), out), v.reshape(B, T, -1)

    def matrices(self) -> list[Float[Array, "D NH"]]:
        """Return the matrices of queries, keys and values; the last one scales the values."""
        q, k, v = self.qkv[...]
        return [q, k, self.own_share[...] * v]


class MLP(nnx.Module):
    """An MLP with one hidden layer and relu²."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.up = nnx.Param(matrix(rngs.params(), (config.width, config.mlp_width)))
        self.down = nnx.Param(jnp.zeros((config.mlp_width, config.width)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return project(relu_squared(project(x, self.up[...])), self.down[...])


class GPT(nnx.Module):
    """A decoder-only transformer language model.

    `kernels` selects the implementations of attention and loss; parameters do not depend on it.
    """

    def __init__(self, config: GPTConfig, kernels: Kernels = XLA, *, rngs: nnx.Rngs):
        c, V, D, L = config, config.padded_vocab_size, config.width, config.num_layers
        self.config, self.kernels = config, kernels
        embed = jax.random.normal(key := rngs.params(), (V, D))
        self.embed = nnx.Param(0.005 * embed if c.tied_head else embed)
        self.head = nnx.Param(self.embed.T if c.tied_head else jnp.zeros((D, V)))
        if tables := c.value_embeddings:
            values = jax.random.normal(jax.random.fold_in(key, 1), (tables, V, D))
            self.value_embed = nnx.Param((0.01 if c.value_layers else 0.0) * values)
            if gates := len(c.gated_values):
                self.value_gate = nnx.Param(jnp.zeros((gates, GATE_INPUTS, c.num_heads)))
        if c.smear:
            self.smear = Smear()
        self.attention = stack(Attention, c.num_attentions, c, rngs.params())
        self.mlp = stack(MLP, L, c, rngs.params())
        # Weights of what is added up in each layer: see LayerWeights.
        fixed, stream = L - c.dynamic, c.residual_init
        if c.attention_source is None:
            self.residual_shares = nnx.Param(jnp.full(fixed, stream))
        else:
            self.residual_shares = nnx.Param(jnp.full((fixed, 2), stream**0.5))
            self.output_shares = nnx.Param(jnp.ones((fixed, 2)))
        if c.bigram_buckets:
            self.bigram_embed = nnx.Param(jnp.zeros((c.bigram_buckets, c.bigram_width or D)))
        if skips := len(c.skip_pairs):
            self.skips = nnx.Param(jnp.full(skips, 1.0 if c.skips is None else -1.5))
        if c.backout is not None:
            self.backout = nnx.Param(jnp.array(0.5))
        if c.dynamic:
            self.dynamic = Dynamic(c, rngs=rngs)
        else:
            self.embedding_shares = nnx.Param(jnp.zeros(L))
            if c.bigram_buckets:
                self.bigram_shares = nnx.Param(jnp.full(L, 0.05 if c.bigram_width else 0.1))
            if c.skips:
                self.skip_gate = nnx.Param(jnp.zeros((skips, GATE_INPUTS, 1)))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Return the soft-capped logits of the token after each token, float32."""
        return self.logits(self.features(tokens))

    def loss(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Sequence[float | Float[Array, ""]] = (1.0,),
        impossible: UInt8[Array, "B T V8"] | None = None,
    ) -> tuple[Float[Array, "B part"], Float[Array, "B part"]]:
        """Return the objective and the cross-entropy of each target in nats, both float32.

        The objective of a token is the sum of its next targets' cross-entropies with `weights`.
        Negative targets, and those beyond the end of a row, count as zero. With tensor
        parallelism, each device returns the losses of its part of each row.
        """
        after = [
            jnp.pad(targets[:, k:], ((0, 0), (0, k)), constant_values=-1)
            for k in range(len(weights))
        ]
        features, after = self.features(tokens), jnp.stack(after, axis=-1)
        if self.kernels.tensor_parallel:
            features = to_parts(features)
            features, after, impossible = jax.tree.map(share_of_row, (features, after, impossible))
        return linear_cross_entropy(
            features,
            self.head[...],
            after,
            self.softcap,
            weights=weights,
            kernel=self.kernels.loss,
            fp8=self.kernels.fp8_head,
            impossible=impossible,
        )

    def logits(self, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return soft-capped logits, float32, for all or some of the results of `features`."""
        return softcap(project(features, self.head[...]), self.softcap)

    @property
    def softcap(self) -> Softcap:
        """The soft cap of the logits."""
        c = self.config
        return Softcap(c.softcap, c.softcap / c.logit_scale, c.logit_shift)

    def features(
        self, tokens: Int[Array, "B T"], past: Rows | Next | None = None
    ) -> Float[Array, "B T D"]:
        """Return the head's input: the normalized residual stream after the last layer.

        `past` gives access to the tokens before these; None if `tokens` are whole rows.
        """
        c, L, late = self.config, self.config.num_layers, self.config.attention_source
        last = L - 1 if c.dynamic else None  # the layer with dynamic connections
        past = past or Rows(c, tokens, self.kernels.attention)
        x = first = x0 = self.embedded(tokens, past)
        gates = self.dynamic.early(x0) if c.dynamic else fixed_gates(self, x0)
        mixed_in, value_gates = self.value_embeddings(tokens)
        bigrams, first_table = 0.0, [mixed_in[layer] for layer in c.value_layers[:1]]
        if c.bigram_buckets:
            table, before = self.bigram_embed[...], past.before("token", tokens)
            how = c.width, c.bigram_width is not None, x0.dtype
            bigrams = bigram_embeddings(table, tokens, before, *how)
            x = first = x0 if late is None else x0 + gates["bigram", 0] * bigrams

        # `read` and `add` enclose what devices share (tensor parallelism); `again` recomputes in
        # the backward pass instead of storing activations (rematerialization).
        read, add = (to_parts, from_parts) if self.kernels.tensor_parallel else (lambda x: x,) * 2
        again = jax.checkpoint if self.kernels.rematerialize else lambda function: function

        def attended(attention, layer, weight, source):
            x, share = read(norm(source)), 1.0 if layer == last else None
            if layer in value_gates:
                share = value_share(x, mixed_in[layer], value_gates[layer], bool(c.value_layers))
            how = partial(self.attend, past, layer, gates), self.kernels.attention
            of_heads = (gates.get((kind, layer)) for kind in ("exclusion", "gate"))
            added, values = attention(x, mixed_in.get(layer), share, *how, *of_heads)
            return weight * add(added), values

        def transformed(mlp, weight, x):
            return weight * add(mlp(read(norm(x))))

        attentions, mlps = unstack(self.attention, c.num_attentions), unstack(self.mlp, L)
        outputs = []
        for layer, mlp in enumerate(mlps):
            if c.dynamic and layer == c.late_gates_from:
                gates |= self.dynamic.late(x)
            for number, (source, target) in enumerate(c.skip_pairs):
                if target == layer:
                    share = self.skips[number]
                    if c.skips:
                        share = jax.nn.sigmoid(share) * gates["skip", number]
                    x = x + share * outputs[source]
            if late is not None and layer == last:
                how = first, outputs[late], mixed_in.get(layer)
                w, values, x = self.dynamic.last_layer.weigh(x, *how)
                mixed_in, x0 = {layer: values}, first
            else:
                w = layer_weights(self, layer, gates)
            if layer not in c.layers(c.mlp_only):
                stream = w.stream * x + w.embedding * x0 + w.bigram * bigrams
                source = stream if late is None else outputs[late] if layer > late else x
                attend = partial(attended, next(attentions), layer, w.attention)
                added, values = again(attend)(source)
                x = stream + added
                if not c.value_embeddings and not mixed_in:
                    mixed_in = dict.fromkeys(range(L), values)
            x = w.stream_again * x + again(partial(transformed, mlp, w.mlp))(x)
            outputs.append(x)
        if c.backout is not None:
            x = x - self.backout[...] * outputs[c.backout]
        if late is not None and c.dynamic:
            skipped = [outputs[source] for source, _ in c.skip_pairs]
            sources = x0, outputs[late], outputs[-2], *first_table, *skipped
            x = x + mixed(self.dynamic.before_head(x), *sources)
        return norm(x)

    def embedded(self, tokens: Int[Array, "B T"], past: Rows | Next) -> Float[Array, "B T D"]:
        """Return x0: the normalized embeddings of the tokens, each with a smear of the previous."""
        x = self.embed[tokens]
        if self.config.smear:
            x = self.smear(x, past.before("embedding", x))
        return norm(x).astype(self.head.dtype)

    def attend(
        self, past: Rows | Next, layer: int, gates: Gates, q: Array, k: Array, v: Array
    ) -> Array:
        """Return the attention output of a layer for q, k and v [B, T, N, H]."""
        speed, scale = rotation(self.config)
        q, k = norm(q), norm(k)
        if layer in self.config.layers(self.config.key_offset):
            k = jnp.where(np.tile(speed == 0, 2), past.before(f"key {layer}", k), k)
        angle, on_tpu = past.angles(layer, speed), self.kernels.attention == "splash"
        q, k = rotary(q, angle, on_tpu), rotary(k, angle, on_tpu)
        y = past.attention(layer, q, k, v, scale)
        if ("taken", layer) not in gates:
            return y
        return y + past.shared(layer, q, k, v, scale, gates["given", layer], gates["taken", layer])

    def value_embeddings(
        self, tokens: Int[Array, "B T"]
    ) -> tuple[dict[int, Float[Array, "B T D"]], dict[int, Float[Array, "inputs N"]]]:
        """Return, by layer, what is mixed into the attention values, and its gates."""
        c = self.config
        tables = jnp.split(self.value_embed[...], c.value_embeddings) if c.value_embeddings else []
        looked_up = [table[0][tokens].astype(self.head.dtype) for table in tables]
        mixed_in = {layer: looked_up[table] for layer, table in c.value_tables.items()}
        return mixed_in, {layer: self.value_gate[n] for n, layer in enumerate(c.gated_values)}
