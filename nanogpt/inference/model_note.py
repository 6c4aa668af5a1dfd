"""MODEL.md, the note in an exported model's folder, which suffices to rebuild the model elsewhere.

It lists the arrays and contains a NumPy program with this model's settings, without the tricks it
does not use. tests/inference/test_model_note.py runs that program.
"""

from typing import Any

from nanogpt.config import GATE_INPUTS, GPTConfig
from nanogpt.data.tokenizer import TOKENIZERS
from nanogpt.inference.export import named
from nanogpt.model.rotary import rotation
from nanogpt.training.step import Params


def note(model: GPTConfig, settings: dict[str, Any], params: Params) -> str:
    """Return the text of MODEL.md."""
    c, source = model, settings["from"]
    arrays = named(params)
    meaning = meanings(c)
    rows = [f"| `{n}` | {list(a.shape)} | {meaning[n]} |" for n, a in sorted(arrays.items())]
    told = [f"run `{source['run']}` after step {source['step']:,}, {source['tokens']:,} tokens"]
    if "val_loss" in source:
        told.append(f"validation loss {source['val_loss']:.4f} nats per token")
    if source.get("commit", "unknown") != "unknown":
        told.append(f"trained by commit {source['commit']}")
    tokenizer = TOKENIZERS[settings["tokenizer"]]
    tokens = {
        "bytes": "One token per byte of UTF-8; its id is the byte's value.",
        "gpt2": 'GPT-2\'s byte-pair encoding, `tiktoken.get_encoding("gpt2").encode_ordinary`.',
    }[tokenizer.name]
    T, V = settings["sequence_length"], c.padded_vocab_size
    return f"""# A GPT of {sum(a.size for a in arrays.values()):,} parameters

From {"; ".join(told)}.

## How to use it

With jax-flax-nanogpt, which accepts this folder in place of a run:

    python3 sample.py <this folder> --prompt "..."
    python3 train_gpt.py --init-from <this folder> --train-files ... --val-files ...

or in Python, on all devices, with `load_model` from nanogpt.inference.weights:

    settings, graph, params, origin = load_model(Path("<this folder>"), make_mesh())
    logits = nnx.merge(graph, params)(tokens)    # [B, T] to [B, T, V]

With Hugging Face's transformers, `AutoModelForCausalLM.from_pretrained("<this folder>",
trust_remote_code=True)`: see README.md.

Without either: `model.safetensors` holds all arrays, and the NumPy program below is the model.
llama.cpp does not support this architecture and cannot load the folder.

## Tokens

{tokens} Every document, and so every prompt, starts with token {tokenizer.separator}.
Ids run from 0 to {c.vocab_size - 1:,}; V = {V:,} is their number, rounded up to a multiple of 128.

Training rows had T = {T:,} tokens; the model has never seen a longer context.
It was trained with computations in {settings["dtype"]}.

## Arrays

All arrays are float32. Matrices multiply from the right: `x @ w`.
The residual stream has width D = {c.width:,}. There are L = {c.num_layers} layers, with
N = {c.num_heads} heads of width H = D / N = {c.head_size}, and MLPs of F = {c.mlp_width:,} neurons.

| array | shape | |
|---|---|---|
{chr(10).join(rows)}

## From tokens to logits

```python
{program(c)}```

The softmax of `logits(tokens)[-1, :{c.vocab_size}]` gives the next-token probabilities.
"""


def meanings(c: GPTConfig) -> dict[str, str]:
    """Return a description of each array, by name."""
    each = f"for each layer with attention: {attentions(c)}"
    return {
        "embed": "token embeddings",
        "value_embed": "embedding tables that are added to the values of some layers",
        "value_gate": f"gates of these tables for each head of layers {[*c.value_tables]}",
        "bigram_embed": "an embedding per hash bucket of token pairs",
        "smear.gate": "gate: how much of the previous token's embedding is added",
        "smear.share": "its coefficient",
        "attention.qkv": f"queries, keys and values, {each}",
        "attention.out": "output projection",
        "attention.own_share": "coefficient of a layer's own values",
        "attention.mixed_share": "coefficient of the values added to a layer's own",
        "attention.out_share": "coefficient of the attention output",
        "attention.gate": "gate of each head",
        "mlp.up": "up projection of each layer",
        "mlp.down": "down projection of each layer",
        "residual_shares": "coefficient of the residual stream before each layer",
        "embedding_shares": "coefficient of the token embedding added before each layer",
        "bigram_shares": "coefficient of the bigram embedding added before each layer",
        "skips": "coefficient of each skip connection",
        "skip_gate": "gate of each skip connection",
        "backout": f"how much of layer {c.backout}'s output is subtracted at the end",
        "head": "output projection to logits",
    }


def attentions(c: GPTConfig) -> list[int]:
    """Return the layers with attention."""
    return [layer for layer in range(c.num_layers) if layer not in c.layers(c.mlp_only)]


def program(c: GPTConfig) -> str:
    """Return the model in NumPy, without the pieces it does not use, which are falsy below."""
    pieces = [*_helpers(c), *_embedding(c), *_layers(c), *_head(c)]
    return "".join(piece for piece in pieces if piece)


# Conditions on what a query sees, by the argument that each needs, and its value for paired heads.
SEEN = {"window": "ago < window", "document": "document[:, None] == document"}
SEEN_BY_PAIRS = {"window": "window", "document": "np.repeat(document, 2)"}


def _masks(c: GPTConfig) -> list[str]:
    """Return which masks of SEEN this model has."""
    return ["window"] * bool(c.windows) + ["document"] * (c.document_separator is not None)


def _helpers(c: GPTConfig) -> list[Any]:
    speed, scale = rotation(c)
    seen = ["ago >= 0", *(SEEN[mask] for mask in _masks(c))]
    return [
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
        "    x = x0 = norm(x)\n    outputs = []\n",
    ]


def _layers(c: GPTConfig) -> list[Any]:
    more = "".join(f", {mask}" for mask in _masks(c))
    twice = "".join(f", {SEEN_BY_PAIRS[mask]}" for mask in _masks(c))
    windows = ", ".join(str(c.window(layer) or "np.inf") for layer in range(c.num_layers))
    share = 'p["attention.mixed_share"][i]'
    return [
        "    for layer in range(L):\n",
        c.skip_pairs
        and f"""\
        for skip, (source, target) in enumerate({[*c.skip_pairs]}):
            if target == layer:
                share = p["skips"][skip]
""",
        c.skips
        and f"""\
                share = 2 * sigmoid(share) * sigmoid(x0[:, :{GATE_INPUTS}] @ p["skip_gate"][skip])
""",
        c.skip_pairs and "                x = x + share * outputs[source]\n",
        """\
        x = p["residual_shares"][layer] * x + p["embedding_shares"][layer] * x0
""",
        c.bigram_buckets and '        x = x + p["bigram_shares"][layer] * bigrams\n',
        """\
        if layer in ATTENTION:
            i, h = ATTENTION.index(layer), norm(x)
            q, k, v = ((h @ w).reshape(-1, N, H) for w in p["attention.qkv"][i])
            v = p["attention.own_share"][i] * v
""",
        c.value_tables
        and f"""\
            tables = {c.value_tables}  # by layer
            if layer in tables:
                mixed_in = p["value_embed"][tables[layer]][tokens].reshape(-1, N, H)
""",
        c.value_tables and not c.value_gate and f"                v = v + {share} * mixed_in\n",
        c.value_tables
        and c.value_gate
        and f"""\
                gate = sigmoid(h[:, :{GATE_INPUTS}] @ p["value_gate"][list(tables).index(layer)])
                v = v + 2 * gate[:, :, None] * mixed_in
""",
        not c.value_embeddings
        and f"""\
            if i == 0:
                first_v = v
            else:
                v = v + {share} * first_v
""",
        "            q, k = norm(q), norm(k)\n",
        c.key_offset
        and f"""\
            if layer in {sorted(c.layers(c.key_offset))}:  # unrotated channels: previous key
                k = np.where(np.tile(SPEED == 0, 2), {_before(c, "k")}, k)
""",
        c.windows
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
        c.attention_gate
        and f"""\
            y = y * sigmoid(h[:, :{GATE_INPUTS}] @ p["attention.gate"][i])[:, :, None]
""",
        _value_gate(c) and '            y = p["attention.out_share"][i] * y\n',
        """\
            x = x + y.reshape(-1, N * H) @ p["attention.out"][i]
        hidden = np.maximum(norm(x) @ p["mlp.up"][layer], 0) ** 2
        x = x + hidden @ p["mlp.down"][layer]
        outputs.append(x)
""",
    ]


def _head(c: GPTConfig) -> list[Any]:
    z = f"(z + {c.logit_shift})" if c.logit_shift else "z"
    return [
        c.backout is not None and f'    x = x - p["backout"] * outputs[{c.backout}]\n',
        f"""\
    z = norm(x) @ p["head"]
    return {c.softcap} * np.tanh({z} * {c.logit_scale / c.softcap})
""",
    ]
