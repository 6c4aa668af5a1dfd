"""Encoding speed of prepare_data.py, compared with tiktoken alone.

    python3 -m benchmarks.cpu.tokenize_text

On one side, text goes from a file of JSON lines into shards on disk; on the other, from memory
through `tiktoken.Encoding.encode_ordinary_batch` into lists. They alternate, on one core and then
on all; the results are megabytes of text per second and core, each the best of its turns. The text
is the embedded corpus, repeated. The start of the workers is included.
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

from benchmarks.command import check_positive, run
from benchmarks.results import save
from benchmarks.timing import best_in_turn
from nanogpt.data.corpus import embedded_corpus
from nanogpt.data.shards import read_shard
from nanogpt.data.text.documents import find_files
from nanogpt.data.text.prepare import Recipe, make_shards
from nanogpt.data.tokenizer import ByteTokenizer, gpt2_encoding

SLICE = 1000  # documents per core given to tiktoken at a time, as its lists take much memory


@dataclass(frozen=True)
class Options:
    """Measure how fast text is encoded into GPT-2 tokens."""

    megabytes: float = 100.0
    """Megabytes of text for each core."""
    rounds: int = 3
    """Number of turns of each side."""
    tiny: bool = False
    """One turn and little text: a test of this script, not of the speed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Time both sides, print a table, and save the figures."""
    check_positive(options, "megabytes", "rounds")
    gpt2_encoding()  # raises TokenizerError at once if it is not available
    size, rounds = (0.01, 1) if options.tiny else (options.megabytes, options.rounds)
    figures = {}
    for cores in sorted({1, os.cpu_count() or 1}):
        texts = list(documents(int(size * 1e6) * cores))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        rates = {side: megabytes / s / cores for side, s in times(texts, cores, rounds).items()}
        rates["ratio"] = rates["prepare_data"] / rates["tiktoken"]
        figures[f"{cores} cores"] = {"megabytes": megabytes, **rates}
        print(
            f"{cores:3} cores, {megabytes:.0f} MB | MB/s per core: prepare_data "
            f"{rates['prepare_data']:.2f}, tiktoken {rates['tiktoken']:.2f}, "
            f"ratio {rates['ratio']:.2f}"
        )
    save("tokenize_text", {"mb_per_s_and_core": figures}, options.tiny)


def times(texts: list[str], cores: int, rounds: int) -> dict[str, float]:
    """Return the seconds of each side; AssertionError if their numbers of tokens differ."""
    encoding = gpt2_encoding()
    made = tokens = None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "text.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        files = find_files([str(path)])

        def prepare_data() -> float:
            nonlocal made
            start, folder = time.perf_counter(), Path(tempfile.mkdtemp(dir=scratch)) / "shards"
            made = make_shards(files, folder, Recipe("gpt2"), cores)
            return time.perf_counter() - start

        def tiktoken() -> float:
            nonlocal tokens
            start, tokens = time.perf_counter(), len(texts)  # start with the number of separators
            for first in range(0, len(texts), SLICE * cores):
                part = texts[first : first + SLICE * cores]
                lists = encoding.encode_ordinary_batch(part, num_threads=cores)
                tokens += sum(map(len, lists))
            return time.perf_counter() - start

        best = best_in_turn({"prepare_data": prepare_data, "tiktoken": tiktoken}, rounds)
    if made.train_tokens + made.val_tokens != tokens:
        raise AssertionError(f"{made.summary()} tiktoken has {tokens:,} tokens.")
    return best


def documents(num_bytes: int) -> Iterator[str]:
    """Yield the documents of the embedded corpus, repeated up to about `num_bytes` of text."""
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
