"""How fast prepare_data.py encodes, beside tiktoken alone.

    .venv/bin/python -m benchmarks.tokenize_text

On one side text goes from a file of JSON lines into shards on the disk; on the other, already in
memory, through `tiktoken.Encoding.encode_ordinary_batch` into lists. Both take turns, on one core
and then on all; the figures are megabytes of text per second and core, each the best of its turns.
The text is the embedded corpus, repeated. Workers are counted from a cold start.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from itertools import cycle
from pathlib import Path

import numpy as np
import tyro

from benchmarks.results import save
from nanogpt.data.corpus import embedded_corpus
from nanogpt.data.shards import read_shard
from nanogpt.data.text.documents import find_files
from nanogpt.data.text.prepare import Recipe, make_shards
from nanogpt.data.tokenizer import ByteTokenizer, TokenizerError, gpt2_encoding

SLICE = 1000  # documents per core that tiktoken gets at a time: its lists take much memory


@dataclass(frozen=True)
class Options:
    """Measure how fast text becomes GPT-2 tokens."""

    megabytes: float = 100.0
    """Of text for each core."""
    rounds: int = 3
    """How many turns each side gets."""


def main(arguments: list[str] | None = None) -> int:
    """Time both sides, print a table, and save the figures; return the exit status."""
    options = tyro.cli(Options, args=arguments)
    try:
        encoding = gpt2_encoding()
    except TokenizerError as error:
        print(error, file=sys.stderr)
        return 2
    figures = {}
    for cores in sorted({1, os.cpu_count() or 1}):
        texts = list(documents(int(options.megabytes * 1e6) * cores))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        best = {"prepare_data": np.inf, "tiktoken": np.inf}
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "text.jsonl"
            with path.open("w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            files = find_files([str(path)])
            for turn in range(options.rounds):
                start = time.perf_counter()
                made = make_shards(files, Path(scratch) / f"{turn}", Recipe("gpt2"), cores)
                middle = time.perf_counter()
                tokens = len(texts)  # the separators, and then tiktoken's
                for first in range(0, len(texts), SLICE * cores):
                    part = texts[first : first + SLICE * cores]
                    lists = encoding.encode_ordinary_batch(part, num_threads=cores)
                    tokens += sum(map(len, lists))
                seconds = middle - start, time.perf_counter() - middle
                best = {k: min(s, b) for (k, b), s in zip(best.items(), seconds, strict=True)}
                if made.train_tokens + made.val_tokens != tokens:
                    raise AssertionError(f"{made.summary()} tiktoken has {tokens:,} tokens.")
        rates = {side: megabytes / seconds / cores for side, seconds in best.items()}
        rates["ratio"] = rates["prepare_data"] / rates["tiktoken"]
        figures[f"{cores} cores"] = {"megabytes": megabytes, **rates}
        print(
            f"{cores:3} cores, {megabytes:.0f} MB | MB/s per core: prepare_data "
            f"{rates['prepare_data']:.2f}, tiktoken {rates['tiktoken']:.2f}, "
            f"ratio {rates['ratio']:.2f}"
        )
    save("tokenize_text", {"mb_per_s_and_core": figures})
    return 0


def documents(num_bytes: int) -> Iterator[str]:
    """The documents of the embedded corpus, again and again, until there is so much text."""
    corpus = embedded_corpus()
    shards = sorted(glob(corpus.train_files) + glob(corpus.val_files))
    text = b"".join(read_shard(shard).astype(np.uint8).tobytes() for shard in shards)
    parts = [part.decode() for part in text.split(bytes([ByteTokenizer.separator])) if part.strip()]
    for part in cycle(parts):
        if num_bytes <= 0:
            return
        yield part
        num_bytes -= len(part.encode())


if __name__ == "__main__":
    sys.exit(main())
