"""Time to nanoGPT's loss on a CPU: this trainer against nanoGPT, same text, same machine, one run.

    .venv/bin/python -m benchmarks.cpu_vs_nanogpt
    .venv/bin/python -m benchmarks.cpu_vs_nanogpt --nanogpt CHECKOUT --torch-python PYTHON

nanoGPT's documented CPU configuration has 4 layers, 4 heads, width 128, context 64, batch 12, and
takes 2,000 steps of AdamW. The first form trains that in plain JAX (`baseline_in_jax` below); the
second runs a checkout of nanoGPT, unchanged, in a Python that has PyTorch.

The loss to reach is what that run ends with, by a full pass over the first 262,144 tokens of the
validation split of the embedded corpus. Then `train_gpt.py` trains with `OURS`, from nothing, with
nothing cached, and validates on the same tokens at its end. Both run as processes of their own, one
after the other, and the table gives two times for each:

    whole process    what a user waits: imports, data, initialisation, compilation, all validation
    training         from the moment libraries and data are loaded to the end of the last step,
                     initialisation and compilation included, validation not
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.results import save
from nanogpt.data.corpus import Corpus, embedded_corpus
from nanogpt.data.shards import find_shards, read_shard

ROOT = Path(__file__).resolve().parent.parent
VAL_TOKENS = 262_144
CONTEXT, BATCH, STEPS = 64, 12, 2000  # nanoGPT's
OURS = (  # the laptop preset with half the layers and context, for a shorter run
    "--preset laptop --batch-size 12 --sequence-length 64 --total-batch-size 768 --num-steps 220 "
    "--learning-rate 0.05 --adam-betas 0.5 0.95 --model.num-layers 2 --model.attention-scale 0.2 "
    "--model.bigram-buckets 4096 --model.no-smear --model.no-attention-gate --model.key-offset "
    "--model.paired-heads --neuron-decay None "
    f"--val-loss-every 0 --val-tokens {VAL_TOKENS} --sample-tokens 0"
).split()


@dataclass(frozen=True)
class Options:
    """Compare the time to nanoGPT's loss on this machine's CPU."""

    nanogpt: Path | None = None
    """A checkout of karpathy/nanoGPT; without one, its configuration is trained in plain JAX."""
    torch_python: Path = Path(sys.executable)
    """The Python to run nanoGPT in; it must have PyTorch."""
    repeats: int = 3
    """Runs of this project's side; the table gives the median and the range."""


@dataclass(frozen=True)
class Result:
    """One run."""

    whole_process_s: float
    training_s: float
    val_loss: float  # nats per byte, full pass over VAL_TOKENS tokens
    tokens: int  # trained on


def main() -> None:
    """Run both sides, print a table, and save the figures."""
    options = tyro.cli(Options)
    corpus = embedded_corpus()
    with tempfile.TemporaryDirectory() as scratch:
        if options.nanogpt:
            name = "nanoGPT (PyTorch)"
            theirs = run_nanogpt(options.nanogpt, options.torch_python, corpus, Path(scratch))
        else:
            name = "nanoGPT's configuration in JAX"
            theirs = run_baseline_in_jax()
        ours = [run_ours(Path(scratch) / f"ours-{i}") for i in range(options.repeats)]
    ours.sort(key=lambda result: result.training_s)
    median = ours[len(ours) // 2]

    print(f"\n{'':32}{'training':>10}{'process':>10}{'tokens':>11}{'val loss':>10}")
    for label, result in [(name, theirs)] + [("this project", result) for result in ours]:
        print(
            f"{label:32}{result.training_s:8.1f} s{result.whole_process_s:8.1f} s"
            f"{result.tokens:11,}{result.val_loss:10.4f}"
        )
    ratio = theirs.training_s / median.training_s
    print(
        f"training time ratio (median of {len(ours)}): {ratio:.2f}; whole process: "
        f"{theirs.whole_process_s / median.whole_process_s:.2f}"
    )
    if max(result.val_loss for result in ours) > theirs.val_loss:
        print("NOT REACHED: a run of this project ended above the other's loss")
    figures = {
        "baseline": name,
        "theirs": asdict(theirs),
        "ours_arguments": " ".join(OURS),
        "ours": [asdict(result) for result in ours],
        "training_ratio": ratio,
        "corpus": corpus.fingerprint,
    }
    save("cpu_vs_nanogpt" if options.nanogpt else "cpu_vs_nanogpt_in_jax", figures)


def run_ours(folder: Path) -> Result:
    """train_gpt.py with OURS, as a user runs it, nothing cached but the corpus."""
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "train_gpt.py"), *OURS, "--run-name", "ours"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    process = time.perf_counter() - started
    run = folder / "runs" / "ours"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    compiled = float(re.search(r"tried in ([\d.]+) s", (run / "log.txt").read_text())[1])
    return Result(process, compiled + last["time_s"], last["val_loss"], last["tokens"])


def run_nanogpt(checkout: Path, python: Path, corpus: Corpus, scratch: Path) -> Result:
    """nanoGPT's train.py with its documented CPU arguments, in a copy that holds our text."""
    copy = scratch / "nanoGPT"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "data", "out-*"))
    data = copy / "data" / "corpus"
    data.mkdir(parents=True)
    for split, pattern in (("train", corpus.train_files), ("val", corpus.val_files)):
        read_shard(find_shards(pattern)[0]).tofile(data / f"{split}.bin")
    vocabulary = (
        "import pickle; pickle.dump({'vocab_size': 256}, open('data/corpus/meta.pkl', 'wb'))"
    )
    subprocess.run([python, "-c", vocabulary], cwd=copy, check=True)

    arguments = (
        "train.py config/train_shakespeare_char.py --dataset=corpus --device=cpu --compile=False "
        f"--eval_iters=20 --log_interval=1 --block_size={CONTEXT} --batch_size={BATCH} "
        f"--n_layer=4 --n_head=4 --n_embd=128 --max_iters={STEPS} --lr_decay_iters={STEPS} "
        "--dropout=0.0 --always_save_checkpoint=True --out_dir=out"
    ).split()
    started = time.perf_counter()
    done = subprocess.run(
        [python, *arguments], cwd=copy, check=True, text=True, capture_output=True
    )
    process = time.perf_counter() - started
    steps = [float(ms) for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", done.stdout, re.M)]
    # Every 250th iteration also evaluates and saves; count it as its usual neighbours.
    steps = np.minimum(steps, 3 * np.median(steps))

    evaluate = f"""
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
tokens = np.fromfile("data/corpus/val.bin", np.uint16)[:{VAL_TOKENS} + 1].astype(np.int64)
inputs, targets = (torch.from_numpy(t).view(-1, {CONTEXT}) for t in (tokens[:-1], tokens[1:]))
with torch.no_grad():
    losses = [model(x, y)[1].item() for x, y in zip(inputs.split(256), targets.split(256))]
print(saved["iter_num"], sum(losses) / len(losses))
"""
    done = subprocess.run(
        [python, "-c", evaluate], cwd=copy, check=True, text=True, capture_output=True
    )
    iteration, val_loss = done.stdout.split()[-2:]
    assert int(iteration) == STEPS, "the checkpoint is not the last"
    return Result(process, float(steps.sum()) / 1e3, float(val_loss), STEPS * BATCH * CONTEXT)


def run_baseline_in_jax() -> Result:
    """`baseline_in_jax` in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.cpu_vs_nanogpt import *; baseline_in_jax()"],
        cwd=ROOT,
        check=True,
        text=True,
        capture_output=True,
    )
    process = time.perf_counter() - started
    training, val_loss = map(float, done.stdout.split()[-2:])
    return Result(process, training, val_loss, STEPS * BATCH * CONTEXT)


def baseline_in_jax() -> None:
    """Train nanoGPT's CPU configuration in plain JAX; print seconds of training and final loss.

    GPT-2's architecture as nanoGPT has it without biases and dropout (Radford et al., 2019):
    learned positions, LayerNorm, GELU, tied head; AdamW with weight decay 0.1 on matrices, betas
    0.9 and 0.99, gradients clipped to norm 1, 100 steps of warm-up, cosine decay to a tenth.
    """
    import jax
    import jax.numpy as jnp
    import optax

    L, N, D, V, T = 4, 4, 128, 256, CONTEXT
    corpus = embedded_corpus()
    train, val = (read_shard(find_shards(p)[0]) for p in (corpus.train_files, corpus.val_files))

    def init(key):
        keys = iter(jax.random.split(key, 2 + 4 * L))

        def normal(*shape, std=0.02):
            return std * jax.random.normal(next(keys), shape)

        def block():
            small = 0.02 / (2 * L) ** 0.5
            return {
                "norm1": jnp.ones(D),
                "qkv": normal(D, 3 * D),
                "out": normal(D, D, std=small),
                "norm2": jnp.ones(D),
                "up": normal(D, 4 * D),
                "down": normal(4 * D, D, std=small),
            }

        blocks = [block() for _ in range(L)]
        return {
            "tokens": normal(V, D),
            "places": normal(T, D),
            "blocks": blocks,
            "norm": jnp.ones(D),
        }

    def norm(x, gain):
        return jax.nn.standardize(x, epsilon=1e-5) * gain

    def loss_of(params, rows):
        inputs, targets = rows[:, :-1], rows[:, 1:]
        B = len(rows)
        x = (params["tokens"][inputs] + params["places"]).reshape(B * T, D)
        for p in params["blocks"]:
            qkv = (norm(x, p["norm1"]) @ p["qkv"]).reshape(B, T, 3, N, D // N)
            q, k, v = qkv.transpose(2, 0, 3, 1, 4)
            scores = jnp.einsum("bnqh,bnkh->bnqk", q, k) / (D // N) ** 0.5
            scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
            y = jnp.einsum("bnqk,bnkh->bqnh", jax.nn.softmax(scores), v).reshape(B * T, D)
            x = x + y @ p["out"]
            x = x + jax.nn.gelu(norm(x, p["norm2"]) @ p["up"], approximate=False) @ p["down"]
        logits = norm(x, params["norm"]) @ params["tokens"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets.reshape(-1)).mean()

    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, STEPS, 1e-4)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rate, 0.9, 0.99, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)
        ),
    )

    @jax.jit
    def step(params, state, rows):
        loss, gradients = jax.value_and_grad(loss_of)(params, rows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def rows_at(tokens, starts):
        return np.stack([tokens[s : s + T + 1] for s in starts]).astype(np.int32)

    rng = np.random.default_rng(0)
    started = time.perf_counter()
    params = jax.jit(init)(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    for _ in range(STEPS):
        rows = rows_at(train, rng.integers(len(train) - T, size=BATCH))
        params, state, _ = step(params, state, rows)
    jax.block_until_ready(params)
    training = time.perf_counter() - started

    starts = np.arange(0, VAL_TOKENS, T).reshape(-1, 256)
    losses = [float(jax.jit(loss_of)(params, rows_at(val, part))) for part in starts]
    print(training, sum(losses) / len(losses))


if __name__ == "__main__":
    main()
