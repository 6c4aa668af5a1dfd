"""A NumPy program of a model, with its settings and without the tricks it does not use.

Its code is made of pieces, in order; those that the model does not use are falsy.
"""

from textwrap import fill
from typing import Any

from nanogpt.config import GATE_INPUTS, GPTConfig
from nanogpt.model.connections import SCALE, initial_gates
from nanogpt.model.rotary import rotation


def attentions(c: GPTConfig) -> list[int]:
    """Return the layers with attention."""
    return [layer for layer in range(c.num_layers) if layer not in c.layers(c.mlp_only)]


def program(c: GPTConfig) -> str:
    """Return the program."""
    pieces = [*_helpers(c), *_attend(c), *_embedding(c), *_layers(c), *_head(c)]
    return "".join(piece for piece in pieces if piece)


# Conditions on what a query sees, by the argument that each needs, and its value for paired heads.
SEEN = {"window": "ago < window", "document": "document[:, None] == document"}
SEEN_BY_PAIRS = {"window": "window", "document": "np.repeat(document, 2)"}


def _masks(c: GPTConfig) -> list[str]:
    """Return which masks of SEEN this model has."""
    windows = bool(c.windows or c.composed)
    return ["window"] * windows + ["document"] * (c.document_separator is not None)


def _helpers(c: GPTConfig) -> list[Any]:
    """Return the code for the arrays, and for functions that several layers use."""
    return [
        c.dynamic and "from math import erf\n\n",
        f"""\
import numpy as np
from safetensors.numpy import load_file

p = load_file("model.safetensors")
L, N, H = {c.num_layers}, {c.num_heads}, {c.head_size}
ATTENTION = {attentions(c)}  # layers with attention


def norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 2**-23)


""",
        (c.smear or c.attention_gate or c.skips or _value_gate(c))
        and """\
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


""",
        c.dynamic
        and f"""\
# Gates that tokens choose, and how many numbers each of them is.
EARLY = {_columns(c, range(c.late_gates_from))}
LATE = {_columns(c, range(c.late_gates_from, c.num_layers))}


def token_weights(x, name):  # which each token chooses, [T, weights]
    hidden = x @ p[f"dynamic.{{name}}.up"]
    hidden = hidden * (1 + np.vectorize(erf)(hidden / 2**0.5)) / 2  # GELU
    return hidden @ p[f"dynamic.{{name}}.down"] + p[f"dynamic.{{name}}.bias"]


def connections(x, name):  # one weight after the other, [T, 1] each
    return np.hsplit({SCALE} * token_weights(x, name), len(p[f"dynamic.{{name}}.bias"]))


def chosen_gates(x, name, sizes):
    gates = p["dynamic.gate_scale"] * token_weights(x, name)
    return dict(zip(sizes, np.hsplit(gates, np.cumsum([*sizes.values()])[:-1])))


""",
        _looks_back(c)
        and c.document_separator is None
        and """\
def before(x):  # the value at the previous token; zero at the first
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


""",
        _looks_back(c)
        and c.document_separator is not None
        and """\
def before(x, begins):  # the value at the previous token; zero at the start of a document
    shifted = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    shifted[begins] = 0
    return shifted


""",
    ]


def _attend(c: GPTConfig) -> list[Any]:
    """Return the code for softmax attention."""
    speed, scale = rotation(c)
    seen = ["ago >= 0", *(SEEN[mask] for mask in _masks(c))]
    return [
        f"""\
# Rotation of a head's pairs (i, i + H/2) per token, in radians, and the scale of q·k.
SPEED = np.array({speed[speed > 0].tolist()} + {sum(speed == 0)} * [0.0])
SCALE = {scale}


def turn(x):  # [T, heads, H]
    angle = np.arange(len(x))[:, None, None] * SPEED
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def attend({", ".join(["q", "k", "v", *_masks(c)])}):  # [T, heads, H]
    ago = np.arange(len(q))[:, None] - np.arange(len(q))
    seen = {" & ".join(f"({condition})" for condition in seen)}
    scores = SCALE * np.einsum("tnh,snh->nts", turn(q), turn(k))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v)


""",
        c.paired_heads
        and """\
def pair(x):  # interleave two heads into one of twice the length
    return x.reshape(-1, N // 2, 2, H).swapaxes(1, 2).reshape(-1, N // 2, H)


def part(x):  # undo pair
    return x.reshape(-1, 2, N // 2, H).swapaxes(1, 2).reshape(-1, N, H)


""",
    ]


def _columns(c: GPTConfig, layers: range) -> str:
    """Return the code for the numbers of columns of these layers' gates."""
    sizes = initial_gates(c, layers).items()
    named = " ".join(f"{kind}_{number}={size}," for (kind, number), (size, _) in sizes)
    return f"dict(\n{fill(named, 100, initial_indent='    ', subsequent_indent='    ')}\n)"


def _value_gate(c: GPTConfig) -> bool:
    """Return whether gates decide how much of the value embeddings is added."""
    return c.value_gate and c.value_embeddings > 0


def _looks_back(c: GPTConfig) -> bool:
    """Return whether the model uses features of the previous token."""
    return bool(c.smear or c.bigram_buckets or c.key_offset)


def _before(c: GPTConfig, name: str) -> str:
    """Return the code for a feature of the previous token."""
    return f"before({name})" if c.document_separator is None else f"before({name}, begins)"


def _embedding(c: GPTConfig) -> list[Any]:
    """Return the code for the stream before the first layer."""
    return [
        """\
def logits(tokens):  # from ids [T] to next-token logits [T, V]
    tokens = np.asarray(tokens)
    x = p["embed"][tokens]
""",
        c.document_separator is not None
        and f"""\
    begins = tokens == {c.document_separator}
    document = np.cumsum(begins)
""",
        c.smear
        and f"""\
    gate = sigmoid(x[:, :{GATE_INPUTS}] @ p["smear.gate"])
    x = x + p["smear.share"] * gate * {_before(c, "x")}
""",
        c.bigram_buckets
        and f"""\
    token = tokens.astype(np.uint32)  # products are modulo 2^32
    mixed = token * np.uint32({0x9E3779B1:#x}) ^ {_before(c, "token")} * np.uint32({0x85EBCA77:#x})
    bigrams = p["bigram_embed"][(mixed ^ (mixed >> 15)) % {c.bigram_buckets}]
""",
        c.bigram_buckets
        and c.bigram_width
        and f"""\
    # Their signs are from another hash of each pair.
    signs = mixed[:, None] + np.arange({c.bigram_width}, dtype="u4") * np.uint32({0x9E3779B9:#x})
    for shift, factor in (16, {0x85EBCA6B:#x}), (13, {0xC2B2AE35:#x}), (16, 1):
        signs = (signs ^ (signs >> shift)) * np.uint32(factor)
    bigrams = (1 - 2.0 * (signs & 1)) * bigrams
""",
        c.bigram_buckets
        and c.bigram_width
        and c.bigram_width < c.width
        and f"""\
    bigrams = np.pad(bigrams, ((0, 0), (0, {c.width - c.bigram_width})))  # in the first channels
""",
        "    x = x0 = norm(x)\n",
        c.dynamic and '    gates = chosen_gates(x0, "early_gates", EARLY)\n',
        c.bigram_buckets
        and c.attention_source is not None
        and f"    x = {'first = ' if c.dynamic else ''}x0 + {_share(c, 'bigram', '0')} * bigrams\n",
        "    outputs = []\n",
    ]


def _share(c: GPTConfig, kind: str, layer: str = "layer") -> str:
    """Return the code for the share of embeddings or bigrams in a layer's stream."""
    if not c.dynamic:
        return f'p["{kind}_shares"][{layer}]'
    if layer == "0":
        return f'gates["{kind}_0"]'
    name = f'f"{kind}_{{layer}}"'
    return f"gates.get({name}, 0)" if c.mlp_only else f"gates[{name}]"


def _layers(c: GPTConfig) -> list[Any]:
    """Return the code for all layers."""
    return [
        "    for layer in range(L):\n",
        c.dynamic
        and f"""\
        if layer == {c.late_gates_from}:
            gates |= chosen_gates(x, "late_gates", LATE)
""",
        c.skip_pairs
        and f"""\
        for skip, (source, target) in enumerate({[*c.skip_pairs]}):
            if target == layer:
                share = p["skips"][skip]
""",
        c.skips
        and c.dynamic
        and """\
                share = sigmoid(share) * gates[f"skip_{skip}"]
""",
        c.skips
        and not c.dynamic
        and f"""\
                share = 2 * sigmoid(share) * sigmoid(x0[:, :{GATE_INPUTS}] @ p["skip_gate"][skip])
""",
        c.skip_pairs and "                x = x + share * outputs[source]\n",
        *_shares(c),
        "        if layer in ATTENTION:\n            i = ATTENTION.index(layer)\n",
        *_stream(c),
        *_attention(c),
        f"            x = x + {'' if c.attention_source is None else 'attention_share * '}y\n",
        """\
        hidden = np.maximum(norm(x) @ p["mlp.up"][layer], 0) ** 2
        y = hidden @ p["mlp.down"][layer]
""",
        f"        x = {'x + y' if c.attention_source is None else 'x_again * x + mlp_share * y'}\n",
        "        outputs.append(x)\n",
    ]


def _attention(c: GPTConfig) -> list[Any]:
    """Return the code for y, what an attention that reads h adds to the stream."""
    more = "".join(f", {mask}" for mask in _masks(c))
    twice = "".join(f", {SEEN_BY_PAIRS[mask]}" for mask in _masks(c))
    windows = ", ".join(str(c.window(layer) or "np.inf") for layer in range(c.num_layers))
    return [
        """\
            q, k, v = ((h @ w).reshape(-1, N, H) for w in p["attention.qkv"][i])
            v = p["attention.own_share"][i] * v
""",
        *_values(c),
        "            q, k = norm(q), norm(k)\n",
        c.key_offset
        and f"""\
            if layer in {sorted(c.layers(c.key_offset))}:  # unrotated channels: previous key
                k = np.where(np.tile(SPEED == 0, 2), {_before(c, "k")}, k)
""",
        "window" in _masks(c)
        and f"""\
            # Number of keys that each query sees, its own included, by layer.
            window = [{windows}][layer]
""",
        not c.paired_heads and f"            y = attend(q, k, v{more})\n",
        c.paired_heads
        and f"""\
            if layer in {sorted(c.layers(c.paired_heads))}:
                y = part(attend(pair(q), pair(k), pair(v){twice}))
            else:
                y = attend(q, k, v{more})
""",
        c.composed
        and f"""\
            if layer in {sorted(c.layers(c.composed))}:  # each head also attends where all do
                given = gates[f"given_{{layer}}"][:, :, None]
                given = given / np.sqrt(np.mean(given**2, axis=1, keepdims=True) + 1e-6)
                all_v = np.repeat(v.reshape(-1, 1, N * H), N, axis=1)  # for each head
                window = min(window, {c.composed_window})
                shared = np.sum(given * attend(q, k, all_v{more}), axis=1)
                y = y + gates[f"taken_{{layer}}"][:, :, None] * shared.reshape(-1, N, H)
""",
        c.exclusive
        and f"""\
            if layer in {sorted(c.layers(c.exclusive))}:
                along, square = (np.sum(a * v, axis=-1, keepdims=True) for a in (y, v))
                share = np.tanh(gates[f"exclusion_{{layer}}"])[:, :, None]
                y = y - share * along / np.maximum(square, 1e-8) * v
""",
        c.gated
        and f"""\
            if layer in {sorted(c.layers(c.gated))}:
                y = y * gates[f"gate_{{layer}}"][:, :, None]
""",
        c.attention_gate
        and f"""\
            y = y * sigmoid(h[:, :{GATE_INPUTS}] @ p["attention.gate"][i])[:, :, None]
""",
        _value_gate(c) and '            y = p["attention.out_share"][i] * y\n',
        '            y = y.reshape(-1, N * H) @ p["attention.out"][i]\n',
    ]


def _shares(c: GPTConfig) -> list[Any]:
    """Return the code for the coefficients of what a layer adds up, if they are not one each."""
    if c.attention_source is None:
        return []
    deeper = 4 * " " if c.dynamic else ""
    return [
        c.dynamic and "        if layer < L - 1:\n",
        f"""\
{deeper}        x_share, x_again = p["residual_shares"][layer]
{deeper}        x0_share = {_share(c, "embedding")}
{deeper}        attention_share, mlp_share = p["output_shares"][layer]
""",
        c.bigram_buckets
        and f"""\
{deeper}        bigram_share = {_share(c, "bigram")} * (layer > 0)  # x begins with them
""",
        *(_last_layer(c) if c.dynamic else ()),
    ]


def _last_layer(c: GPTConfig) -> list[Any]:
    """Return the code for what each token chooses in the last layer."""
    last, late = c.num_layers - 1, c.attention_source
    values = ""
    if last in c.value_tables:
        values = f'p["value_embed"][{c.value_tables[last]}][tokens]'
    elif not c.value_embeddings:
        values = "first_v.reshape(-1, N * H)"
    return [
        """\
        else:
            w = connections(x, "last_layer")
""",
        c.bigram_buckets and "            x0 = first\n",
        f"""\
            mixed_in = w[0] * x0 + w[1] * outputs[{late}] + w[2] * x
""",
        values
        and f"""\
            halves = np.repeat(np.hstack([w[6], w[7]]), N * H // 2, axis=1)
            mixed_in = mixed_in + halves * {values}
""",
        f"""\
            x = x + w[3] * x0 + w[4] * outputs[{late}] + w[5] * x
            x_share, x0_share, bigram_share, attention_share, x_again, mlp_share = w[8:]
""",
    ]


def _stream(c: GPTConfig) -> list[Any]:
    """Return the code for what an attention reads, h, and what its output is added to, x."""
    late = c.attention_source
    if late is not None:
        return [
            f"            h = norm(outputs[{late}] if layer > {late} else x)\n",
            "            x = x_share * x + x0_share * x0\n",
            c.bigram_buckets and "            x = x + bigram_share * bigrams\n",
        ]
    return [
        """\
            x = p["residual_shares"][layer] * x + p["embedding_shares"][layer] * x0
""",
        c.bigram_buckets and '            x = x + p["bigram_shares"][layer] * bigrams\n',
        "            h = norm(x)\n",
    ]


def _values(c: GPTConfig) -> list[Any]:
    """Return the code for what is added to the values of an attention."""
    last = c.num_layers - 1 if c.dynamic else None
    tables = {layer: table for layer, table in c.value_tables.items() if layer != last}
    half, share = GATE_INPUTS // 2, 'p["attention.mixed_share"][i]'
    read = f"h[:, :{GATE_INPUTS}]"
    if c.value_layers:
        read = f"np.hstack([h[:, :{half}], mixed_in[:, :{half}]])"
    return [
        tables
        and f"""\
            tables = {tables}  # by layer
            if layer in tables:
                mixed_in = p["value_embed"][tables[layer]][tokens]
""",
        tables
        and not c.value_gate
        and f"                v = v + {share} * mixed_in.reshape(-1, N, H)\n",
        tables
        and c.value_gate
        and f"""\
                gate = p["value_gate"][list(tables).index(layer)]
                share = 2 * sigmoid({read} @ gate)[:, :, None]
                v = v + share * mixed_in.reshape(-1, N, H)
""",
        not c.value_embeddings
        and f"""\
            if i == 0:
                first_v = v
            {"elif layer < L - 1" if c.dynamic else "else"}:
                v = v + {share} * first_v
""",
        c.dynamic
        and """\
            if layer == L - 1:
                v = v + mixed_in.reshape(-1, N, H)
""",
    ]


def _head(c: GPTConfig) -> list[Any]:
    """Return the code for the logits."""
    z = f"(z + {c.logit_shift})" if c.logit_shift else "z"
    return [
        c.backout is not None and f'    x = x - p["backout"] * outputs[{c.backout}]\n',
        c.dynamic and _before_head(c),
        f"""\
    z = norm(x) @ p["head"]
    return {c.softcap} * np.tanh({z} * {c.logit_scale / c.softcap})
""",
    ]


def _before_head(c: GPTConfig) -> str:
    """Return the code for what each token adds to its stream before the head."""
    table = ['p["value_embed"][0][tokens]'] if c.value_layers else []
    outputs = [c.attention_source, -2, *(source for source, _ in c.skip_pairs)]
    late, previous, *skipped = (f"outputs[{layer}]" for layer in outputs)
    return f"""\
    sources = {", ".join(["x0", late, previous, *table, *skipped])}
    w = connections(x, "before_head")
    x = x + sum(share * source for share, source in zip(w, sources))
"""
