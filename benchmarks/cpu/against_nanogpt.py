"""Time to nanoGPT's loss on a CPU: this trainer and nanoGPT on the same text and machine.

    python3 -m benchmarks.cpu.against_nanogpt
    python3 -m benchmarks.cpu.against_nanogpt --nanogpt CHECKOUT --torch-python PYTHON

nanoGPT's documented CPU configuration has 4 layers, 4 heads, width 128, context 64, batch 12, and
2,000 steps of AdamW. The first command trains it in plain JAX (nanogpt_in_jax.py); the second runs
a checkout of nanoGPT, unchanged, in a Python that has PyTorch.

The target is that run's final loss, measured over the first 262,144 tokens of the embedded corpus's
validation split. Then `train_gpt.py` trains with `our_arguments`, from scratch, without a
compilation cache, and validates on the same tokens at the end. Both run in separate processes, one
after the other, and the table gives two times for each:

    whole process    the time a user waits: imports, data, initialization, compilation, validation
    training         from when libraries and data are loaded to the end of the last step, with
                     initialization and compilation but without validation
"""

import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import processes
from benchmarks.command import ROOT, Mistake, check_positive, run
from benchmarks.processes import logged, train
from benchmarks.results import save
from nanogpt.adam import AdamGroups
from nanogpt.data.corpus import Corpus, embedded_corpus
from nanogpt.data.shards import find_shards, read_shard

CONTEXT, BATCH = 64, 12  # as in nanoGPT's configuration


@dataclass(frozen=True)
class Size:
    """The number of training steps of each side, of validation tokens, and our other arguments."""

    their_layers: int
    their_steps: int
    our_steps: int
    val_tokens: int  # a multiple of 256 rows of CONTEXT
    ours: str = ""


FULL = Size(their_layers=4, their_steps=2000, our_steps=220, val_tokens=262_144)
TINY = Size(
    *(1, 2, 2, 256 * CONTEXT),
    ours="--model.num-layers 1 --model.width 32 --model.mlp-width 64 --model.value-embeddings 0 "
    "--model.bigram-buckets 0",
)


@dataclass(frozen=True)
class Options:
    """Compare the time to nanoGPT's loss on this machine's CPU."""

    nanogpt: Path | None = None
    """A checkout of karpathy/nanoGPT; without one, its configuration is trained in plain JAX."""
    torch_python: Path = Path(sys.executable)
    """The Python for nanoGPT; it must have PyTorch."""
    repeats: int = 3
    """Number of runs of this project; the table gives each, and the ratio for their median."""
    tiny: bool = False
    """Run a few steps, once: a test of this script, not of the speed."""


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    whole_process_s: float
    training_s: float
    val_loss: float  # nats per byte, full pass over the validation tokens
    tokens: int  # trained on


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Run both sides, print a table, and save the figures."""
    check_positive(options, "repeats")
    if options.nanogpt and not (options.nanogpt / "train.py").is_file():
        raise Mistake(f"{options.nanogpt} is not a checkout of nanoGPT: it has no train.py.")
    size, repeats = (TINY, 1) if options.tiny else (FULL, options.repeats)
    arguments, corpus = our_arguments(size), embedded_corpus()
    with tempfile.TemporaryDirectory() as scratch:
        if options.nanogpt:
            name = "nanoGPT (PyTorch)"
            python = str(options.torch_python)
            theirs = run_nanogpt(options.nanogpt, python, corpus, Path(scratch), size)
        else:
            name = "nanoGPT's configuration in JAX"
            theirs = run_in_jax(size)
        ours = [run_ours(arguments, Path(scratch) / f"ours-{i}") for i in range(repeats)]
    ours.sort(key=lambda result: result.training_s)
    figures = {
        "baseline": name,
        "theirs": asdict(theirs),
        "ours_arguments": arguments,
        "ours": [asdict(result) for result in ours],
        "training_ratio": print_table(name, theirs, ours),
        "corpus": corpus.fingerprint,
    }
    save("cpu_vs_nanogpt" if options.nanogpt else "cpu_vs_nanogpt_in_jax", figures, options.tiny)


def print_table(name: str, theirs: Result, ours: list[Result]) -> float:
    """Print both sides, ours sorted by time; return the ratio of theirs to our median time."""
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
    return ratio


def our_arguments(size: Size) -> str:
    """Return our arguments: the laptop preset with nanoGPT's width and context, and two layers."""
    groups = AdamGroups.alike(tables=0.15, head=0.008, others=0.04, betas=(0.5, 0.95))
    adam = " ".join(
        f"--adam.{name}.learning-rate {group.learning_rate} --adam.{name}.betas 0.5 0.95"
        for name, group in vars(groups).items()
    )
    return (
        "--preset laptop --batch-size 12 --sequence-length 64 --total-batch-size 768 "
        f"--num-steps {size.our_steps} --learning-rate 0.05 {adam} "
        "--model.num-layers 2 --model.width 128 --model.mlp-width 512 "
        "--model.attention-scale 0.2 --model.bigram-buckets 4096 --model.no-smear "
        "--model.no-attention-gate --model.key-offset --model.paired-heads "
        f"--neuron-decay None --val-loss-every 0 --val-tokens {size.val_tokens} --sample-tokens 0 "
        f"{size.ours}"
    ).rstrip()


def run_ours(arguments: str, folder: Path) -> Result:
    """Run train_gpt.py as a user would, with only the corpus cached."""
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    started = time.perf_counter()
    run = train(arguments, folder, environment)
    process = time.perf_counter() - started
    last = logged(run)[-1]
    compiled = float(re.search(r"warmed up in ([\d.]+) s", (run / "log.txt").read_text())[1])
    return Result(process, compiled + last["time_s"], last["val_loss"], last["tokens"])


def run_in_jax(size: Size) -> Result:
    """Train nanoGPT's configuration in plain JAX."""
    code = (
        "from benchmarks.cpu.nanogpt_in_jax import train; "
        f"train({size.their_layers}, {size.their_steps}, {size.val_tokens})"
    )
    started = time.perf_counter()
    output = processes.output_of([sys.executable, "-c", code], ROOT, shown=False)
    process = time.perf_counter() - started
    training, val_loss = map(float, last_pair(output))
    return Result(process, training, val_loss, size.their_steps * BATCH * CONTEXT)


def last_pair(output: str) -> tuple[str, str]:
    """Return the two numbers of the last line that consists of two numbers."""
    return re.findall(r"^([\d.]+) ([\d.]+|nan)$", output, re.M)[-1]


EVALUATE = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
tokens = np.fromfile("data/corpus/val.bin", np.uint16)[:{val_tokens} + 1].astype(np.int64)
inputs, targets = (torch.from_numpy(t).view(-1, {context}) for t in (tokens[:-1], tokens[1:]))
with torch.no_grad():
    losses = [model(x, y)[1].item() for x, y in zip(inputs.split(256), targets.split(256))]
print(saved["iter_num"], sum(losses) / len(losses))
"""


def run_nanogpt(checkout: Path, python: str, corpus: Corpus, scratch: Path, size: Size) -> Result:
    """Run nanoGPT's train.py with its documented CPU arguments, in a copy with our text."""
    copy = scratch / "nanoGPT"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "data", "out-*"))
    data = copy / "data" / "corpus"
    data.mkdir(parents=True)
    for split, pattern in (("train", corpus.train_files), ("val", corpus.val_files)):
        read_shard(find_shards(pattern)[0]).tofile(data / f"{split}.bin")
    vocabulary = (
        "import pickle; pickle.dump({'vocab_size': 256}, open('data/corpus/meta.pkl', 'wb'))"
    )
    processes.output_of([python, "-c", vocabulary], copy, shown=False)

    steps = size.their_steps
    arguments = (
        "train.py config/train_shakespeare_char.py --dataset=corpus --device=cpu --compile=False "
        f"--eval_iters=20 --log_interval=1 --block_size={CONTEXT} --batch_size={BATCH} "
        f"--n_layer={size.their_layers} --n_head=4 --n_embd=128 "
        f"--max_iters={steps} --lr_decay_iters={steps} "
        "--dropout=0.0 --always_save_checkpoint=True --out_dir=out"
    ).split()
    started = time.perf_counter()
    output = processes.output_of([python, *arguments], copy, shown=False)
    process = time.perf_counter() - started
    times = [float(ms) for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", output, re.M)]
    # Every 250th iteration also evaluates and saves: cap its time.
    training = float(np.minimum(times, 3 * np.median(times)).sum()) / 1e3

    evaluate = EVALUATE.format(val_tokens=size.val_tokens, context=CONTEXT)
    output = processes.output_of([python, "-c", evaluate], copy, shown=False)
    iteration, val_loss = last_pair(output)
    assert int(iteration) == steps, "the checkpoint is not the last"
    return Result(process, training, float(val_loss), steps * BATCH * CONTEXT)


if __name__ == "__main__":
    sys.exit(main())
