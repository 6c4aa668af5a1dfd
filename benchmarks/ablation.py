"""What each piece of the recipe is worth: a small speedrun, with one piece left out at a time.

    .venv/bin/python -m benchmarks.ablation          # on CPUs, one run per core at a time
    .venv/bin/python -m benchmarks.ablation --gpu    # on Python's packages, as GPT-2's tokens

Every run trains on as many tokens as the one with all pieces, on the same data, and all are made
with the same seeds. The table gives the loss that each piece saves: the mean over the seeds of the
difference of validation losses, run without it minus run with it, and its standard deviation. A
proxy cannot tell what a large run gains, but it shows which pieces do what they are meant to.
"""

import json
import multiprocessing
import os
import sysconfig
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro
from rich.progress import track

import nanogpt.optim.muon
from benchmarks.results import save
from nanogpt.config import GPTConfig
from nanogpt.data.corpus import drop_copies, read_documents, split_by_name
from nanogpt.data.shards import write_shard
from nanogpt.data.tokenizer import load_tokenizer
from nanogpt.files import cache_folder
from nanogpt.schedule import Schedule, Stage
from nanogpt.training.interruption import Interruption
from train_gpt import PRESETS, Hyperparameters, train

# The speedrun on bytes, at a size of which a CPU core trains one in a minute or two.
CPU = replace(
    PRESETS["speedrun"],
    train_files=None,
    val_files=None,
    tokenizer="bytes",
    shuffle=True,
    max_document_length=None,  # most of its documents are longer than its rows
    batch_size=4,
    sequence_length=128,
    total_batch_size=3072,
    num_steps=300,
    stages=(
        Stage(0.33, 1 / 3, 0.5, 1.00, (16, 16, 16, 48), (1.0, 0.5, 0.25)),
        Stage(0.33, 2 / 3, 1.0, 1.52, (32, 32, 32, 96), (1.0, 0.5)),
        Stage(0.34, 1.0, 1.0, 1.73, (32, 32, 32, 128)),
    ),
    embedding_learning_rate=0.15,
    momentum_warmup_steps=50,
    val_loss_every=0,
    val_tokens=262_144,
    device="cpu",
    dtype="float32",
    sample_tokens=0,
    checkpoint_every=0,
    model=replace(
        PRESETS["speedrun"].model,
        vocab_size=256,
        num_layers=4,
        num_heads=2,
        width=128,
        mlp_width=512,
        mlp_only=(0,),
        key_offset=(3,),
        paired_heads=(2,),
        backout=2,
        value_embeddings=2,
        bigram_buckets=16384,
    ),
)

# The same with GPT-2's vocabulary, for a GPU: the speedrun's depth, a ninth of its matrices.
GPU = replace(
    PRESETS["speedrun"],
    num_steps=500,
    total_batch_size=98_304,
    val_loss_every=0,
    val_tokens=1_048_576,
    sample_tokens=0,
    checkpoint_every=0,
    model=replace(
        PRESETS["speedrun"].model,
        num_heads=2,
        width=256,
        mlp_width=1024,
        bigram_buckets=50304,
    ),
)

JORDAN = (3.4445, -4.7750, 2.0315)  # the fixed Newton-Schulz step that Muon had at first


def each_stage(hp: Hyperparameters, **changes: Any) -> Hyperparameters:
    """The settings with the same change in each stage."""
    return replace(hp, stages=tuple(replace(stage, **changes) for stage in hp.stages))


def model(**changes: Any) -> Callable[[Hyperparameters], Hyperparameters]:
    """A piece that is a setting of the model, left out by these values."""
    return lambda hp: replace(hp, model=replace(hp.model, **changes))


def without_yarn() -> None:
    """Rotations stay as they are when windows grow."""

    def windows_only(self: Schedule, config: GPTConfig, stage: int) -> GPTConfig:
        return replace(config, windows=self.stages[stage].windows)

    Schedule.model = windows_only


def without_polar_express() -> None:
    """Five of Jordan's steps."""
    nanogpt.optim.muon.POLAR_EXPRESS = (JORDAN,) * 5


PIECES: dict[str, Callable[[Hyperparameters], Hyperparameters]] = {
    "value embeddings (but value residual)": model(value_embeddings=0),
    "bigram embedding": model(bigram_buckets=0),
    "half of each head rotated": model(rope_fraction=1.0),
    "attention scale of 0.12": lambda hp: model(attention_scale=hp.model.head_size**-0.5)(hp),
    "attention gate": model(attention_gate=False),
    "smear": model(smear=False),
    "backout": model(backout=None),
    "MLP-only layers": model(mlp_only=()),
    "key offset": model(key_offset=()),
    "paired heads": model(paired_heads=()),
    "logit rescale": model(softcap=15.0, logit_scale=1.0, logit_shift=0.0),
    "several targets": lambda hp: each_stage(hp, target_weights=(1.0,)),
    "aligned rows": lambda hp: replace(hp, max_document_length=None),
    "window schedule": lambda hp: each_stage(hp, windows=hp.stages[-1].windows),
    "windows": lambda hp: each_stage(hp, windows=None),
    "shorter rows at first": lambda hp: each_stage(hp, length=1.0),
    "batch schedule": lambda hp: each_stage(hp, batch=2 / 3, rate=1.52),  # the middle one's
    "NorMuon": lambda hp: replace(hp, neuron_decay=None),
    "cautious weight decay": lambda hp: replace(hp, weight_decay=0.0),
    "learning-rate floor": lambda hp: replace(hp, final_learning_rate_factor=0.0),
}

# Pieces that are no settings: what takes them out of the process that calls it.
BUILT_IN: dict[str, Callable[[], None]] = {
    "YaRN": without_yarn,
    "Polar Express": without_polar_express,
}


@dataclass(frozen=True)
class Options:
    """Train a small speedrun with one piece of its recipe left out at a time."""

    gpu: bool = False
    """The larger proxy, on the accelerator, rather than the small one on the CPU."""
    seeds: int = 3
    """Runs of each kind."""
    pieces: tuple[str, ...] = ()
    """Only the pieces whose names contain one of these."""
    num_steps: int | None = None
    """Steps of each run, in place of those of the proxy."""


def python_sources() -> tuple[str, str]:
    """Globs of the shards: GPT-2 tokens of the source of this Python and of its packages."""
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


def final_loss(hp: Hyperparameters, piece: str | None, cores: Queue | None) -> float:
    """Train, in a process made for it and on a core of its own; the validation loss at the end."""
    if cores is not None:
        core = cores.get()
        os.sched_setaffinity(0, {core})
    if piece in BUILT_IN:
        BUILT_IN[piece]()
    hp.check()
    with TemporaryDirectory() as folder, chdir(folder), Path("console").open("w") as console:
        with redirect_stdout(console):
            status = train(hp, Interruption())
        if status:
            raise RuntimeError(f"without {piece}: the run ended with status {status}")
        [metrics] = Path("runs").glob("*/metrics.jsonl")
        loss = json.loads(metrics.read_text().splitlines()[-1])["val_loss"]
    if cores is not None:
        cores.put(core)
    return loss


def final_losses(
    runs: dict[tuple, tuple[Hyperparameters, str | None]], own_core: bool
) -> dict[tuple, float]:
    """Train each, without its piece: on every CPU core one at a time, or one after the other."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        cores = manager.Queue() if own_core else None
        for core in os.sched_getaffinity(0) if own_core else ():
            cores.put(core)
        workers = cores.qsize() if own_core else 1
        with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
            started = {name: pool.submit(final_loss, *run, cores) for name, run in runs.items()}
            for run in track(as_completed(started.values()), "training", len(started)):
                run.result()
    return {name: run.result() for name, run in started.items()}


def main() -> None:
    """Train with each piece left out, with every seed; print the table, and save it."""
    options = tyro.cli(Options)
    proxy = GPU if options.gpu else CPU
    if options.num_steps is not None:
        proxy = replace(proxy, num_steps=options.num_steps)
    if options.gpu:
        train_files, val_files = python_sources()
        proxy = replace(proxy, train_files=train_files, val_files=val_files)
    variants = {None: proxy} | {piece: leave_out(proxy) for piece, leave_out in PIECES.items()}
    variants |= dict.fromkeys(BUILT_IN, proxy)
    pieces = [
        piece
        for piece, hp in variants.items()
        if piece is not None
        and (hp != proxy or piece in BUILT_IN)  # else the proxy has no such piece
        and (not options.pieces or any(part in piece for part in options.pieces))
    ]
    runs = {
        (piece, seed): (replace(variants[piece], seed=seed), piece)
        for seed in range(options.seeds)
        for piece in (None, *pieces)
    }
    found = final_losses(runs, own_core=not options.gpu)
    losses = {
        piece: [found[piece, seed] for seed in range(options.seeds)] for piece in (None, *pieces)
    }

    print(f"with everything: {' '.join(f'{loss:.4f}' for loss in losses[None])}")
    print("| without | costs | sd |\n|---|---|---|")
    gains = {
        piece: [without - whole for without, whole in zip(losses[piece], losses[None], strict=True)]
        for piece in pieces
    }
    for piece, gain in sorted(gains.items(), key=lambda item: -mean(item[1])):
        spread = f"{stdev(gain):.4f}" if len(gain) > 1 else "-"
        print(f"| {piece} | {mean(gain):+.4f} | {spread} |")
    save(
        f"ablation_{'gpu' if options.gpu else 'cpu'}",
        {
            "tokens": proxy.schedule.tokens(proxy.num_steps),
            "with_everything": losses.pop(None),
            "without": losses,
        },
    )


if __name__ == "__main__":
    main()
