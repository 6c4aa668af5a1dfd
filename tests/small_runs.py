"""Small runs of the main job that several tests use, each trained once, by the first to need it.

The processes of pytest-xdist share them: a test that changes a run works on a copy.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from nanogpt.adam import AdamGroups
from nanogpt.data.shards import write_shard
from tests.programs import Process, as_a_user_starts_it, run_to_end
from train_gpt import PRESETS

T, TOKENS_PER_STEP, STEPS = 32, 256, 6
VAL_TOKENS = 268  # 8 rows, which make one pass, and a short ninth
# At first the loss does not depend on the scale of the residual stream, so the gradients of its
# coefficients are pure rounding error, and Adam turns them into full-size steps: their rates are
# tiny here, where losses are compared.
SMALL = (
    f"--batch-size 8 --sequence-length {T} --total-batch-size {TOKENS_PER_STEP} "
    f"--num-steps {STEPS} --val-loss-every 4 --val-tokens {VAL_TOKENS} --dtype float32 "
    "--sample-tokens 0 --model.num-layers 2 --model.num-heads 2 --model.width 32 "
    "--model.mlp-width 64 --model.value-embeddings 1 --model.bigram-buckets 64 "
    "--adam.scalars.learning-rate 1e-5 --adam.shortcuts.learning-rate 1e-5 "
    "--adam.stream.learning-rate 1e-5 --adam.additions.learning-rate 1e-5"
).split()

# The speedrun at a thousandth of its size, in batches, with two thin layers, which choose nothing
# themselves, and a vocabulary of bytes. Its stages are the first, of 27 steps, and one of a single
# step with what the last two change.
STAGED_STEPS, STAGED_VAL_TOKENS = 28, 300
STAGED = (
    "--tokenizer bytes --model.vocab-size 256 "
    "--batch-size 2 --sequence-length 64 --total-batch-size 384 "
    f"--num-steps {STAGED_STEPS} --max-document-length 40 --checkpoint-every 6 "
    f"--keep-checkpoints 10 --val-loss-every 3 --val-tokens {STAGED_VAL_TOKENS} "
    "--model.num-layers 2 --model.width 16 --model.mlp-width 32 --model.mlp-only "
    "--model.skips 0 1 --model.paired-heads 0 --model.key-offset 1 --model.no-dynamic "
    "--model.exclusive --model.gated --model.composed "
    "--model.attention-source 0 --model.value-embeddings 2 --model.value-layers 0 1 "
    "--model.bigram-width 4 --model.document-separator 255 --heads-together 1 "
    "--learning-rate 0.1 --model.attention-scale 2 --model.rope-base 16"
).split()
FIRST, *_, LAST = PRESETS["speedrun"].stages
STAGED_STAGES = [replace(FIRST, share=27), replace(LAST, share=1, split_head=True)]
STAGED_DOCUMENTS = 20  # most tokens of a document in the first stage
STAGE_ENDS = [27, 28]

# A run that is killed, resumed and otherwise tested, on its own shards, of a plain model, which is
# compiled sooner. As in runs of earlier versions, all scalars have the same settings.
LONGER, EVERY = 13, 5
DATA = ["--train-files", "train_*.bin", "--val-files", "val.bin"]
RUN = [
    *("--preset", "laptop", *SMALL, *DATA, "--num-steps", f"{LONGER}"),
    *("--checkpoint-every", f"{EVERY}", "--keep-checkpoints", "9"),
    *("--model.value-embeddings", "0", "--model.bigram-buckets", "0", "--model.key-offset"),
    "--model.paired-heads",
    *(f"--adam.{name.replace('_', '-')}.learning-rate=1e-5" for name in AdamGroups.LATER),
]


@dataclass(frozen=True)
class Trained:
    folder: Path
    console: list[str]
    log: list[str]
    metrics: list[dict]

    def column(self, key):
        return [record[key] for record in self.metrics]


def shared_folder(tmp_path_factory):
    """Return a folder shared by the processes of one pytest run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def shared_cache(tmp_path_factory):
    """Return their common cache folder, with the embedded corpus."""
    return shared_folder(tmp_path_factory) / "cache"


def once(tmp_path_factory, name, make):
    """Return the folder `name`, filled by `make` in the first process that needs it."""
    folder = shared_folder(tmp_path_factory) / name
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            folder.mkdir()
            make(folder)
            (folder / "whole").touch()
    return folder


def trained(tmp_path_factory, name, *arguments, start=run_to_end, **settings):
    """Return the run `name` on the embedded corpus, trained by the first process that needs it."""

    def train(place):
        cache = shared_cache(tmp_path_factory)
        done = start([*SMALL, "--run-name", name, *arguments], place, cache, **settings)
        assert (done.returncode, done.stderr) == (0, "")
        (place / "console").write_text(done.stdout)

    place = once(tmp_path_factory, f"trained_{name}", train)
    folder = place / "runs" / name
    return Trained(
        folder,
        (place / "console").read_text().splitlines(),
        (folder / "log.txt").read_text().splitlines(),
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    )


def base_run(tmp_path_factory):
    """A run of the default preset, started as a user starts it."""
    sample = "--sample-tokens", "8", "--sample-prompt", "def "
    return trained(tmp_path_factory, "base", *sample, start=as_a_user_starts_it)


def staged_run(tmp_path_factory):
    """A run of the speedrun in stages."""

    def write(folder):
        for seed, (name, count) in enumerate(
            {"train_0": 6000, "train_1": 6000, "val": 60_000}.items()
        ):
            write_shard(folder / f"{name}.bin", some_documents(count, seed))
        first, *last = STAGED_STAGES
        stages = replace(first, max_document_length=STAGED_DOCUMENTS), *last
        hp = replace(PRESETS["speedrun"], stages=stages)
        (folder / "config.json").write_text(json.dumps(asdict(hp)))

    data = once(tmp_path_factory, "documents", write)
    files = "--train-files", data / "train_*.bin", "--val-files", data / "val.bin"
    start = "--config", data / "config.json"
    return trained(tmp_path_factory, "staged", *STAGED, *map(str, [*start, *files]))


def some_documents(count, seed):
    """Return this many byte tokens: documents of 5 to 59, each after its separator."""
    random, tokens = np.random.default_rng(seed), []
    while len(tokens) < count:
        document = random.integers(97) + 7 * np.arange(random.integers(5, 60))
        tokens += [255, *(document % 97)]
    return tokens[:count]


def straight_run(tmp_path_factory):
    """The uninterrupted run, with which others are compared."""

    def train(folder):
        write_data(folder)
        done = run_to_end([*RUN, "--run-name", "a"], folder, shared_cache(tmp_path_factory))
        assert (done.returncode, done.stderr) == (0, "")

    return once(tmp_path_factory, "straight", train) / "runs" / "a"


def write_data(folder):
    """Write two training shards without repeated rows, and one to validate on for seconds."""
    random = np.random.default_rng(0)
    tokens = (7 * np.arange(20_000) % 97 + random.integers(0, 9, 20_000)).astype(np.uint16)
    write_shard(folder / "train_0.bin", tokens[:9_000])
    write_shard(folder / "train_1.bin", tokens[9_000:18_000])
    write_shard(folder / "val.bin", np.tile(tokens[18_000:], 301))


def change_a_token(shard, position):
    """Change a token of a shard."""
    with shard.open("r+b") as file:
        file.seek(1024 + 2 * position)
        token = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([token[0] ^ 1]))


def started(place, cache, *arguments, **settings):
    """Start a run named "a"."""
    return Process([*RUN, "--run-name", "a", *arguments], place, cache, **settings)


def resume(run, cache, *arguments, devices=1):
    """Resume a run to its end; return the process, its exit status and its errors."""
    place = run.parent.parent
    with Process(["--resume", run.relative_to(place), *arguments], place, cache, devices) as it:
        return it, it.end(), it.stderr
