"""HellaSwag (Zellers et al., arXiv:1905.07830): which of four endings continues a text?

A model chooses an ending by the loss of its tokens after the context. This follows llm.c and uses
its file, whose items are in GPT-2's tokens: the context, and four endings, each with a leading
space. One thing differs: a separator precedes the context, as it precedes every document that a
model of this project is trained on.

    header    256 int32: 20240522, version 1, number of items, bytes of the longest one, zeros
    an item   uint16: 65535, size in bytes, number, index of the right ending, 4, then the context
              and the endings, each as a token count followed by the tokens

All numbers are little-endian.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt16

from nanogpt.config import ConfigError
from nanogpt.data.tokenizer import Tokenizer, load_tokenizer
from nanogpt.devices.mesh import REPLICATED, ROWS, put
from nanogpt.model.parameters import compute_copy
from nanogpt.training.step import Params

# The 10,042 items of the validation split, as llm.c's author keeps them.
REPOSITORY = "karpathy/llmc-starter-pack"  # a dataset of the Hugging Face hub
REVISION = "3f334304c1d7897581792d5e982ed7f86b69f468"
FILE = "hellaswag_val.bin"
SHA256 = "59509ba401e820f2cd8b579141354e8ebc14a20f8e2cc181f1836f1d0e59eb99"

HEADER_WORDS, ITEM_WORDS = 512, 5  # uint16 before the first item, and before an item's context
LENGTH_STEP = 64  # rows are padded to a multiple of it, so that few programs are compiled

Tokens = UInt16[np.ndarray, "tokens"]


class Item(NamedTuple):
    """A context and its possible endings."""

    context: Tokens
    endings: list[Tokens]
    label: int  # index of the right ending


class Row(NamedTuple):
    """The model's input for one ending; only the ending's targets count toward the loss."""

    tokens: Int[np.ndarray, "T"]
    targets: Int[np.ndarray, "T"]  # -1 before the ending


def read_items(path: Path) -> list[Item]:
    """Read the items of llm.c's file; raises ConfigError if its SHA-256 differs."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ConfigError(
            f"{path} is not llm.c's {FILE}: its SHA-256 is {found}, not {SHA256}; delete it, check "
            "that HF_ENDPOINT, if set, names a hub, and run this again."
        )
    words, items = np.frombuffer(content, "<u2")[HEADER_WORDS:], []
    while words.size:
        _, size, _, label, _ = words[:ITEM_WORDS].tolist()
        rest, parts = words[ITEM_WORDS : size // 2], []
        while rest.size:
            end = 1 + int(rest[0])
            parts.append(rest[1:end])
            rest = rest[end:]
        items.append(Item(parts[0], parts[1:], label))
        words = words[size // 2 :]
    return items


def retokenized(items: Sequence[Item], tokenizer: Tokenizer) -> list[Item]:
    """Convert items from GPT-2's tokens to those of a tokenizer."""
    if tokenizer.name == "gpt2":
        return list(items)
    gpt2 = load_tokenizer("gpt2")

    def convert(tokens: Tokens) -> Tokens:
        return tokenizer.encode(gpt2.decode(tokens))

    return [
        Item(convert(context), [*map(convert, endings)], label) for context, endings, label in items
    ]


def row_of(context: Tokens, ending: Tokens, separator: int, T: int) -> Row:
    """Return the row of an ending: separator, context, ending.

    A row longer than T keeps its last T tokens. An ending longer than T is not cut, however: the
    row is then as long as the ending, longer than the model's training context.
    """
    tokens = np.concatenate([[separator], context, ending]).astype(np.int32)
    tokens = tokens[-(max(T, len(ending)) + 1) :]
    targets = tokens[1:].copy()
    targets[: -len(ending)] = -1
    return Row(tokens[:-1], targets)


def make_row_losses(
    graph: nnx.GraphDef, mesh: Mesh, dtype: str
) -> Callable[[Params, Int[Array, "R T"], Int[Array, "R T"]], Float[Array, "R"]]:
    """Build `row_losses(params, tokens, targets)`, jitted: the summed loss of each row, in nats.

    Negative targets do not count. Rows are sharded over the devices.
    """

    def row_losses(
        params: Params, tokens: Int[Array, "R T"], targets: Int[Array, "R T"]
    ) -> Float[Array, "R"]:
        _, losses = nnx.merge(graph, compute_copy(params, dtype)).loss(tokens, targets)
        return losses.sum(axis=1)

    over_devices = jax.shard_map(
        row_losses,
        mesh=mesh,
        in_specs=(REPLICATED, ROWS, ROWS),
        out_specs=ROWS,
        check_vma=False,
    )
    return jax.jit(over_devices)


def losses_of(
    rows: Sequence[Row],
    row_losses: Callable[..., Float[Array, "R"]],
    params: Params,
    mesh: Mesh,
    *,
    tokens_per_device: int,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Float[np.ndarray, "rows"]:
    """Return the summed loss of each row, in nats.

    Args:
        row_losses: built by `make_row_losses`.
        tokens_per_device: most tokens per device in a pass, unless a single row has more.
        progress: iterates over the passes, and may show progress.
    """
    by_length = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[-(-len(row.tokens) // LENGTH_STEP) * LENGTH_STEP].append(number)
    passes = []
    for T, numbers in sorted(by_length.items()):
        most = max(1, tokens_per_device // T)
        R = min(most, -(-len(numbers) // mesh.size)) * mesh.size
        passes += [(T, R, numbers[first : first + R]) for first in range(0, len(numbers), R)]

    losses = np.zeros(len(rows))
    for T, R, numbers in progress(passes):
        # Padding comes last in rows and batches, and does not count.
        tokens, targets = np.zeros((R, T), np.int32), np.full((R, T), -1, np.int32)
        for place, number in enumerate(numbers):
            row = rows[number]
            tokens[place, : len(row.tokens)], targets[place, : len(row.targets)] = row
        batch = [put(mesh, ROWS, (R, T), array.__getitem__) for array in (tokens, targets)]
        losses[numbers] = np.asarray(row_losses(params, *batch))[: len(numbers)]
    return losses


def scores(losses: Float[np.ndarray, "items 4"], items: Sequence[Item]) -> dict[str, float | int]:
    """Return the scores of a model with these summed losses of the endings, for JSON.

    accuracy_norm   by the ending with the lowest mean loss per token, as in llm.c
    accuracy        by the ending with the lowest summed loss, the most likely one
    standard_error  of accuracy_norm, sqrt(p (1 - p) / items)
    """
    lengths = np.array([[len(ending) for ending in item.endings] for item in items])
    labels = np.array([item.label for item in items])
    norm = float(np.mean(np.argmin(losses / lengths, axis=1) == labels))
    return {
        "accuracy_norm": norm,
        "accuracy": float(np.mean(np.argmin(losses, axis=1) == labels)),
        "standard_error": sqrt(norm * (1 - norm) / len(items)),
        "items": len(items),
    }
