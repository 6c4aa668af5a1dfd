"""The source of this Python and its packages, in GPT-2 tokens."""

import sysconfig
from pathlib import Path

import numpy as np

from nanogpt.data.corpus import drop_copies, read_documents, split_by_name
from nanogpt.data.shards import write_shard
from nanogpt.data.tokenizer import load_tokenizer
from nanogpt.files import cache_folder, lock_file


def python_sources(tiny: bool = False) -> tuple[str, str]:
    """Return the training and the validation shard, which are created if missing.

    A second process waits for the first. With `tiny` they hold one package of Python's own.
    """
    folder = cache_folder() / ("ablation_tiny" if tiny else "ablation")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / "lock", timeout=-1):
        if not (folder / "val.bin").exists():
            tokenizer = load_tokenizer("gpt2")
            places = ("stdlib",) if tiny else ("stdlib", "purelib", "platlib")
            roots = {Path(sysconfig.get_path(name)) / ("email" * tiny) for name in places}
            documents = [each for root in sorted(roots) for each in read_documents(root, root)]
            splits = split_by_name(drop_copies(documents))
            for name, texts in zip(("train", "val"), splits, strict=True):
                encoded = (tokenizer.encode(text.decode()) for _, text in texts)
                tokens = [[tokenizer.separator, *each] for each in encoded]
                write_shard(folder / f"{name}.bin", np.concatenate(tokens))
    return str(folder / "train.bin"), str(folder / "val.bin")
