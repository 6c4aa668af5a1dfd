"""Hand a trained model on: `python3 export.py runs/<name> --out gpt` writes it in open formats.

nanogpt/inference/export.py tells what is in the folder. Most of this file is MODEL.md, a note by
which the model can be built elsewhere: what its arrays are, and a NumPy program that has this
model's settings and none of the tricks that it does without; tests/test_export.py runs it.
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nanogpt.checks import ConfigError, UserError
from nanogpt.config import GATE_INPUTS, GPTConfig
from nanogpt.data.tokenizer import TOKENIZERS

if TYPE_CHECKING:
    from nanogpt.training.step import Params


@dataclass(frozen=True)
class Options:
    """Write the newest weights of a run as safetensors, with all that is needed to use them."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, runs/<name>."""
    out: Path
    """Folder to write, which must not exist or be empty."""


def main(arguments: list[str] | None = None) -> int:
    """Export the run; return the exit status."""
    options = tyro.cli(Options, args=arguments)
    try:
        print(export(options.run, options.out))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        return 130
    return 0


def export(run: Path, out: Path) -> str:
    """Write the newest weights of a run to the folder `out`; what was done.

    Raises ConfigError when there are none, or when `out` cannot be written.
    """
    # So that this takes no more of a GPU that trains at the same time than it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from flax import nnx

    from nanogpt.devices.mesh import make_mesh
    from nanogpt.inference.export import save_model
    from nanogpt.inference.weights import load_run

    hp, graph, params, checkpoint = load_run(run, make_mesh(1))
    model = nnx.merge(graph, params).config
    settings = {name: getattr(hp, name) for name in ("tokenizer", "sequence_length", "dtype")}
    settings["from"] = {
        "run": run.resolve().name,
        "step": checkpoint.step,
        "tokens": checkpoint.facts["tokens"],
        **known(run, checkpoint.step),
    }
    save_model(out, model, params, settings, note(model, settings, params))
    return f"the weights of {run} after step {checkpoint.step:,} are in {out}"


def known(run: Path, step: int) -> dict[str, Any]:
    """The commit that trained a run and its validation loss at a step, as far as it tells."""
    from nanogpt.files import parsed, read_json
    from nanogpt.runs.folder import Circumstances, Metrics

    facts = {}
    with suppress(ConfigError, KeyError):
        facts["commit"] = read_json(run / "run.json", Circumstances, "")["commit"]
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with suppress(ConfigError, KeyError):
                record = parsed(line, Metrics, "", "")
                if record["step"] == step:
                    facts["val_loss"] = record["val_loss"]
    return facts


# MODEL.md


def note(model: GPTConfig, settings: dict[str, Any], params: "Params") -> str:
    """The text of MODEL.md."""
    from nanogpt.inference.export import named

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
        "bytes": "One token per byte of UTF-8, its value the id.",
        "gpt2": 'GPT-2\'s byte-pair encoding, `tiktoken.get_encoding("gpt2").encode_ordinary`.',
    }[tokenizer.name]
    T, V = settings["sequence_length"], c.padded_vocab_size
    return f"""# A GPT of {sum(a.size for a in arrays.values()):,} parameters

From {"; ".join(told)}.

## To use it

With jax-flax-nanogpt, where this folder may stand for that of a run:

    python3 sample.py <this folder> --prompt "..."
    python3 train_gpt.py --init-from <this folder> --train-files ... --val-files ...

or in Python, on all devices, with `load_model` of nanogpt.inference.weights:

    settings, graph, params = load_model(Path("<this folder>"), make_mesh())
    logits = nnx.merge(graph, params)(tokens)    # [B, T] to [B, T, V]

Without it: `model.safetensors` holds all arrays, and the program below is the model.

## Tokens

{tokens} Id {tokenizer.separator} begins each document, and so a prompt.
Ids run from 0 to {c.vocab_size - 1:,}; V = {V:,} is their number, rounded up to a multiple of 128.

Training rows had T = {T:,} tokens: further back the model has never looked.
It was trained in {settings["dtype"]}.

## Arrays

All are float32, and matrices are multiplied from the right, `x @ w`.
The residual stream has width D = {c.width:,}. There are L = {c.num_layers} layers, with
N = {c.num_heads} heads of width H = D / N = {c.head_size}, and MLPs of F = {c.mlp_width:,} neurons.

| array | shape | |
|---|---|---|
{chr(10).join(rows)}

## From tokens to logits

```python
{program(c)}```

The softmax of `logits(tokens)[-1, :{c.vocab_size}]` has the probabilities of the next token.
"""


def meanings(c: GPTConfig) -> dict[str, str]:
    """What each array is, by name."""
    each = f"of each layer with attention: {attentions(c)}"
    return {
        "embed": "a vector per token",
        "value_embed": "tables of vectors per token, mixed into the values of some layers",
        "bigram_embed": "a vector per bucket of pairs of tokens",
        "smear.gate": "how much of the token before is added to each, from its own vector",
        "smear.share": "what that is multiplied with",
        "attention.qkv": f"queries, keys and values, {each}",
        "attention.out": "what the heads found, back to the stream",
        "attention.value_mix": "of a layer's own values, and of what is mixed into them",
        "attention.gate": "how far each head is open",
        "mlp.up": "of each layer, to its hidden neurons",
        "mlp.down": "and back",
        "shortcuts": "before each layer: of the stream, and of the embedding",
        "skips": "before each layer of the second half: of the output of its mirror image",
        "backout": f"how much of the output of layer {c.backout} is taken back at the end",
        "head": "from the stream to logits",
    }


def attentions(c: GPTConfig) -> list[int]:
    """The layers that have attention."""
    return [layer for layer in range(c.num_layers) if layer not in c.layers(c.mlp_only)]


def program(c: GPTConfig) -> str:
    """The model in NumPy: only what this one has."""
    from nanogpt.model.rotary import rotation

    (speed, scale), L, count = rotation(c), c.num_layers, c.value_embeddings
    separator, windows = c.document_separator is not None, bool(c.windows)
    seen = ["ago >= 0", *["ago < window"] * windows]
    seen += ["document[:, None] == document"] * separator
    more = ", window" * windows + ", document" * separator
    twice = ", 2 * window" * windows + ", np.repeat(document, 2)" * separator
    tables = [*range(count), *[None] * (L - 2 * count), *range(max(0, 2 * count - L), count)]
    of_layer = {layer: table for layer, table in enumerate(tables[:L]) if table is not None}
    z = f"(z + {c.logit_shift})" if c.logit_shift else "z"
    pieces = [
        f"""\
import numpy as np
from safetensors.numpy import load_file

p = load_file("model.safetensors")
L, N, H = {L}, {c.num_heads}, {c.head_size}
ATTENTION = {attentions(c)}  # the layers that have it


def norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


""",
        (c.smear or c.attention_gate)
        and """\
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


""",
        (c.smear or c.bigram_buckets or c.key_offset)
        and """\
def before(x):  # what stood one token before, and zero before the first
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


""",
        f"""\
# How far the pairs (i, i + H/2) of a head turn per token, in radians, and the scale of q·k.
SPEED = np.array({speed[speed > 0].tolist()} + {sum(speed == 0)} * [0.0])
SCALE = {scale}


def turn(x):  # [T, heads, H]
    angle = np.arange(len(x))[:, None, None] * SPEED
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def attend(q, k, v{more}):  # [T, heads, H]
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
def pair(x):  # two heads as one, twice as long: a token of one, then of the other
    return x.reshape(-1, N // 2, 2, H).swapaxes(1, 2).reshape(-1, N // 2, H)


def part(x):  # the opposite
    return x.reshape(-1, 2, N // 2, H).swapaxes(1, 2).reshape(-1, N, H)


""",
        """\
def logits(tokens):  # ids [T] to the logits [T, V] of what comes after each
    tokens = np.asarray(tokens)
    x = p["embed"][tokens]
""",
        c.bigram_buckets
        and f"""\
    token = tokens.astype(np.uint32)  # products are modulo 2^32
    mixed = token * np.uint32({0x9E3779B1:#x}) ^ before(token) * np.uint32({0x85EBCA77:#x})
    x = x + p["bigram_embed"][(mixed ^ (mixed >> 15)) % {c.bigram_buckets}]
""",
        c.smear
        and f"""\
    gate = sigmoid(x[:, :{GATE_INPUTS}] @ p["smear.gate"])
    x = x + p["smear.share"] * gate * before(x)
""",
        "    x = x0 = norm(x)\n    outputs = []\n",
        separator and f"    document = np.cumsum(tokens == {c.document_separator})\n",
        """\
    for layer in range(L):
        if layer >= L - L // 2:
            x = x + p["skips"][layer - (L - L // 2)] * outputs[L - 1 - layer]
        x = p["shortcuts"][layer, 0] * x + p["shortcuts"][layer, 1] * x0
        if layer in ATTENTION:
            i = ATTENTION.index(layer)
            h, mix = norm(x), p["attention.value_mix"][i]
            q, k, v = ((h @ w).reshape(-1, N, H) for w in p["attention.qkv"][i])
            v = mix[0] * v
""",
        count
        and f"""\
            table = {of_layer}.get(layer)
            if table is not None:
                v = v + mix[1] * p["value_embed"][table][tokens].reshape(-1, N, H)
""",
        not count
        and """\
            if i == 0:
                first_v = v
            else:
                v = v + mix[1] * first_v
""",
        "            q, k = norm(q), norm(k)\n",
        c.key_offset
        and f"""\
            if layer in {sorted(c.layers(c.key_offset))}:  # where nothing turns, keys are one late
                k = np.where(np.tile(SPEED == 0, 2), before(k), k)
""",
        windows
        and f"""\
            # So many keys, and its own among them, does a query see in each layer.
            window = [{", ".join(str(c.window(layer) or "np.inf") for layer in range(L))}][layer]
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
        """\
            x = x + y.reshape(-1, N * H) @ p["attention.out"][i]
        hidden = np.maximum(norm(x) @ p["mlp.up"][layer], 0) ** 2
        x = x + hidden @ p["mlp.down"][layer]
        outputs.append(x)
""",
        c.backout is not None and f'    x = x - p["backout"] * outputs[{c.backout}]\n',
        f"""\
    z = norm(x) @ p["head"]
    return {c.softcap} * np.tanh({z} * {c.logit_scale / c.softcap})
""",
    ]
    return "".join(piece for piece in pieces if piece)


if __name__ == "__main__":
    sys.exit(main())
