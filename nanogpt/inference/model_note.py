"""MODEL.md, the note in an exported model's folder, which suffices to rebuild the model elsewhere.

It lists the arrays and contains the program of numpy_program.py, which
tests/inference/test_model_note.py runs.
"""

from typing import Any

from nanogpt.config import GPTConfig
from nanogpt.data.tokenizer import TOKENIZERS
from nanogpt.inference.export import named
from nanogpt.inference.numpy_program import attentions, program
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
        "value_gate": f"gates of these tables for each head of layers {[*c.gated_values]}",
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
        "residual_shares": "coefficient of the residual stream in each layer"
        + (c.attention_source is not None) * ", before and after attention",
        "output_shares": "coefficients of what attention and MLP add in each layer",
        "embedding_shares": "coefficient of the token embedding added in each layer",
        "bigram_shares": "coefficient of the bigram embedding added in each layer",
        "skips": "coefficient of each skip connection",
        "skip_gate": "gate of each skip connection",
        "backout": f"how much of layer {c.backout}'s output is subtracted at the end",
        **_chosen("last_layer", "weights in the last layer"),
        **_chosen("before_head", "weights before the head"),
        **_chosen("early_gates", f"gates in layers before {c.late_gates_from}"),
        **_chosen("late_gates", f"gates in layers from {c.late_gates_from} on"),
        "dynamic.gate_scale": "coefficient of these gates",
        "head": "output projection to logits",
    }


def _chosen(name: str, weights: str) -> dict[str, str]:
    """Return a description of each array of a small MLP that computes weights for each token."""
    return {
        f"dynamic.{name}.up": f"up projection for each token's {weights}",
        f"dynamic.{name}.down": "down projection for them",
        f"dynamic.{name}.bias": "their bias",
    }
