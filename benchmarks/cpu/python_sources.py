"""The source of this Python and its packages, in GPT-2 tokens."""

import sysconfig
from pathlib import Path

import numpy as np

from nanogpt.data.corpus import drop_copies, read_documents, split_by_name
from nanogpt.data.shards import write_shard
from nanogpt.data.tokenizer import load_tokenizer
from nanogpt.files import cache_folder


def python_sources() -> tuple[str, str]:
    """Return globs of the training and the validation shard, which are created if missing."""
    folder = cache_folder() / "ablation"
    if not (folder / "val.bin").exists():
        roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
        documents = [each for root in sorted(roots) for each in read_documents(root, root)]
        tokenizer = load_tokenizer("gpt2")
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in zip(
            ("train", "val"), split_by_name(drop_copies(documents)), strict=True
        ):
            tokens = [[tokenizer.separator, *tokenizer.encode(text.decode())] for _, text in texts]
            write_shard(folder / f"{name}.bin", np.concatenate(tokens))
    return str(folder / "train.bin"), str(folder / "val.bin")
