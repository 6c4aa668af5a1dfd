"""Train a GPT: `python3 train_gpt.py`, with no arguments.

With an accelerator this trains the `speedrun` preset on FineWeb10B (`python3
cached_fineweb10B.py` fetches it); without one, the `laptop` preset on Python source code, which
needs no download and takes a few minutes. `--help` lists every setting.

The file reads from top to bottom: the hyperparameters, the presets, then the training loop.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from glob import glob
from importlib.util import find_spec
from math import gcd, inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from nanogpt.config import ConfigError, GPTConfig, Kernels, LossKernel, mesh_axes
from nanogpt.data.corpus import CorpusError, embedded_corpus
from nanogpt.data.shards import ShardError, check_vocabulary, find_shards, read_shard
from nanogpt.data.text.cache import prepare
from nanogpt.data.text.documents import DataError
from nanogpt.data.tokenizer import TOKENIZERS, TokenizerError, load_tokenizer
from nanogpt.devices.launchers import launched_with_others
from nanogpt.inference.sampling import Sampling
from nanogpt.inference.weights import settings_with, weights_in
from nanogpt.runs.environment import environment
from nanogpt.runs.folder import Run, RunError, SilentRun, new_folder
from nanogpt.runs.profile import Trace, steps_of
from nanogpt.runs.progress import BadNumbers, Progress
from nanogpt.runs.trackers import check_trackers, open_trackers
from nanogpt.schedule import Rates, Schedule, Stage
from nanogpt.training.interruption import Interruption
from nanogpt.training.resume import check_same_data, resumed_settings, run_to_resume, saved_settings

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh
    from optax import GradientTransformationExtraArgs

    from nanogpt.training.step import Params


def windows(short: int, long: int) -> tuple[int, ...]:
    """The windows of 12 layers: long ones in the middle and at the end."""
    return (short,) * 4 + (long,) + (short,) * 6 + (long,)


SPEEDRUN_MODEL = GPTConfig(
    mlp_only=(0, 7),
    key_offset=(4, 11),
    paired_heads=(2, 5, 9),
    backout=8,
    bigram_buckets=5 * 50304,
    softcap=11.5,
    logit_scale=11.5 / 15,
    logit_shift=5.0,
)

# Batch and rates of these stages are those of modded-nanogpt's record of 2025-11-29, the targets
# those of 2025-12-22. The last stage, when the rates are lowest, reads as far back as rows allow.
SPEEDRUN_STAGES = (
    Stage(0.33, 1 / 3, 0.5, 1.00, windows(128, 384), (1.0, 0.5, 0.25)),
    Stage(0.33, 2 / 3, 1.0, 1.52, windows(384, 896), (1.0, 0.5)),
    Stage(0.32, 1.0, 1.0, 1.73, windows(640, 1408)),
    Stage(0.02, 1.0, 1.0, 1.73, windows(768, 2048)),
)


# JAX, and what imports it, is imported by the functions below that need it, after the arguments
# were read: `--help` and mistakes answer at once.


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run. The defaults are the `speedrun` preset."""

    preset: Literal[
        "auto", "speedrun", "baseline", "laptop", "gpt2-medium", "gpt2-large", "gpt2-xl"
    ] = "auto"
    """Where the other settings start: auto is speedrun with an accelerator, else laptop; with
    init_from it is the settings of that run."""
    config: str | None = None
    """Start them instead from the config.json of an earlier run, to repeat it."""

    # Data
    train_files: str | None = "fineweb10B/fineweb_train_*.bin"
    """Glob of the training shards; None for the embedded corpus of Python code."""
    val_files: str | None = "fineweb10B/fineweb_val_*.bin"
    """Glob of the validation shards; None for the embedded corpus."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """What made the shards, or makes them from `data`; decodes samples."""
    data: tuple[str, ...] = ()
    """Text of your own to train on, in place of shards: files, folders and globs of text, JSON
    lines and Parquet; see docs/own-text.md. It starts from shuffled rows with all of every
    document, and from the tokenizer's vocabulary."""
    data_field: str = "text"
    """Where JSON lines and Parquet in `data` have their text: the member or column."""
    shuffle: bool = False
    """Visit the rows in random order from the first epoch on; later epochs always do."""

    max_document_length: int | None = 2048
    """Begin each row with a document and take at most so many tokens of each, the rest is left
    out; None for rows that leave nothing out."""

    # Batch: Ng = total_batch_size / (batch_size * sequence_length * number of devices along data)
    batch_size: int | None = None
    """Rows per device in one forward and backward pass; None for as many as its memory holds."""
    sequence_length: int = 2048
    """Tokens per row, T."""
    total_batch_size: int = 393_216
    """Tokens per optimizer step, over all devices and accumulation steps."""

    # Optimization
    num_steps: int = 2160
    """Optimizer steps."""
    stages: tyro.conf.Suppress[tuple[Stage, ...]] = SPEEDRUN_STAGES
    """The stretches of the run, in order; see nanogpt/schedule.py."""
    learning_rate: float = 0.023
    """Rate of Muon, for the matrices of the layers."""
    embedding_learning_rate: float = 0.6
    """Rate of Adam for the embedding tables."""
    head_learning_rate: float = 0.008
    """Rate of Adam for the head."""
    scalar_learning_rate: float = 0.04
    """Rate of Adam for mixing coefficients and gates."""
    cooldown_fraction: float = 0.55
    """Share of the steps, the last ones, in which all rates fall linearly."""
    final_learning_rate_factor: float = 0.1
    """What the rates are multiplied with at the end of the cooldown."""
    momentum: float = 0.95
    """Muon's momentum, after its warm-up from 0.85."""
    momentum_warmup_steps: int = 300
    """First steps, in which Muon's momentum rises."""
    neuron_decay: float | None = 0.95
    """Decay of the mean squares by which Muon evens out its neurons; None for plain Muon."""
    adam_betas: tuple[float, float] = (0.65, 0.95)
    """Decay of Adam's means of the gradient and of its square."""
    weight_decay: float = 1.2
    """Of the matrices of the layers: a step takes the rate squared times this off those weights
    which it brings nearer to zero."""

    # Validation
    val_loss_every: int = 125
    """Steps between validations; the last step always validates. 0 for that one only."""
    val_tokens: int = 10_485_760
    """Tokens to validate on, the first ones of the validation shards."""

    # Run
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """What to train on; auto is the best that JAX finds, any other must be there."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the forward and backward passes compute in; weights are kept in float32."""
    loss_kernel: LossKernel = "xla"
    """What computes the loss: XLA, or on NVIDIA GPUs one Pallas kernel for it and its gradient."""
    fp8_head: bool = False
    """Multiply with the head in 8-bit floating point: for NVIDIA Hopper or newer."""
    coordinator_address: str | None = None
    """Where the first of several processes can be reached, host:port, if no launcher tells: Slurm,
    Open MPI, Kubernetes and TPU pods do. See docs/many-machines.md."""
    num_processes: int | None = None
    """How many processes there are, likewise."""
    process_id: int | None = None
    """Which of them this one is, from 0 on, likewise."""
    mesh: str | None = None
    """Devices by axis, such as data=4,model=2: those along data train on other rows, those along
    model share the heads and MLPs of the same; None for all along data."""
    shard_params: bool = False
    """Divide parameters, gradients and the optimizer's state over the devices along data, too, for
    models that are too large for each to hold whole."""
    rematerialize: bool | None = None
    """Keep of each layer only its input for the backward pass and compute the rest again: less
    memory, a third more work; None where a single row would not fit otherwise."""
    seed: int = 0
    """Of the initial weights, of the order of the data and of the sample."""
    skip_spikes: float = 0.0
    """Skip a step whose loss lies so many standard deviations above the latest; 0 skips none."""
    verify_data: bool = False
    """Check every token of the shards at the start, not only a sample."""
    run_name: str = ""
    """Folder under runs/, which must be new; by default preset, date and time."""
    resume: str | None = None
    """Go on with a run from its newest checkpoint: runs/<name>, or auto for the latest run."""
    init_from: str | None = None
    """Begin a run with the newest weights of another, runs/<name>, or of a folder that export.py
    made, and with a new optimizer and schedule: fine-tuning. Model, tokenizer and sequence_length
    are those of the weights. The other settings start from that run's, or from a preset if one is
    named or the folder is an exported one; in either case with a single stage."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always makes one. 0 for that one only."""
    keep_checkpoints: int = 2
    """How many of them are kept, the newest."""
    tensorboard: bool = False
    """Show the curves in TensorBoard, too: tensorboard --logdir runs."""
    wandb: bool = False
    """Show them in Weights & Biases, too, in the project that WANDB_PROJECT names, by default
    nanogpt-jax; WANDB_MODE=offline keeps them on this disk."""
    profile: str | None = None
    """Trace these optimizer steps, such as 10:13, both included, into the run's folder, and say
    what cost most in them; see docs/profiling.md."""
    sample_tokens: int = 256
    """Tokens to write at the end, as a sample; 0 for none."""
    sample_prompt: str = "The"
    """What the sample continues."""

    model: GPTConfig = SPEEDRUN_MODEL
    """The shape of the network."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for settings that make no sense."""
        for name in (
            "batch_size",
            "sequence_length",
            "total_batch_size",
            "num_steps",
            "val_tokens",
            "keep_checkpoints",
            "max_document_length",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("val_loss_every", "sample_tokens", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}.")
        for name in (
            "learning_rate",
            "embedding_learning_rate",
            "head_learning_rate",
            "scalar_learning_rate",
            "weight_decay",
            "skip_spikes",
        ):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(f"{name} must be 0 or a positive number: {getattr(self, name)}.")
        for decay in (*self.adam_betas, self.neuron_decay or 0.0):
            if not 0 <= decay < 1:
                raise ConfigError(
                    f"adam_betas and neuron_decay must be 0 or more, below 1: {decay}."
                )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be 0 or more, below 2**32, not {self.seed}.")
        if (self.train_files is None) != (self.val_files is None):
            raise ConfigError("train_files and val_files must both be globs, or both None.")
        if self.train_files is None and not self.data and self.tokenizer != "bytes":
            raise ConfigError(
                f"The embedded corpus is made of bytes, not of {self.tokenizer} tokens: set "
                "tokenizer to bytes, or data to text of your own."
            )
        if self.model.vocab_size < TOKENIZERS[self.tokenizer].vocab_size:
            raise ConfigError(
                f"model.vocab_size {self.model.vocab_size:,} is less than the "
                f"{TOKENIZERS[self.tokenizer].vocab_size:,} ids of tokenizer {self.tokenizer}."
            )
        self.model.check()
        mesh_axes(self.mesh)
        self.schedule.check()
        steps_of(self.profile, 1, self.num_steps)
        if self.model.windows and self.stages[0].windows is not None:
            raise ConfigError(
                f"model.windows cannot be {self.model.windows}: the stages of the {self.preset} "
                "preset have windows of their own."
            )
        for stage in range(len(self.stages)):
            self.schedule.model(self.model, stage).check()

    @property
    def schedule(self) -> Schedule:
        """What holds at each step."""
        return Schedule(**{each.name: getattr(self, each.name) for each in fields(Schedule)})

    def rows_per_step(self, stage: int, num_devices: int) -> int:
        """Rows per device and optimizer step; ConfigError if they are not a whole Ng passes.

        Devices are those along data: those along model have the same rows.
        """
        tokens, T = self.schedule.tokens_per_step(stage), self.schedule.row_length(stage)
        per_pass = (self.batch_size or 1) * self.sequence_length * num_devices
        if tokens % per_pass:
            share = self.stages[stage].batch
            below = tokens // per_pass * per_pass
            nearest = [f"{round(n / share):,}" for n in (below, below + per_pass) if n]
            in_stage = f" in stage {stage + 1}, {tokens:,}," if share != 1 else ""
            raise ConfigError(
                f"total_batch_size {self.total_batch_size:,}{in_stage} is not a multiple of "
                f"batch_size * sequence_length * num_devices = {self.batch_size or 1} * "
                f"{self.sequence_length} * {num_devices} = {per_pass:,}; nearest valid: "
                f"{' and '.join(nearest)}."
            )
        return tokens // (T * num_devices)


PRESETS = {
    # GPT-2 small's size with the recipe that modded-nanogpt had grown by the end of 2025.
    "speedrun": Hyperparameters(preset="speedrun"),
    # The same without most of it: modded-nanogpt's plain recipe of 2024-11-10.
    "baseline": Hyperparameters(
        preset="baseline",
        max_document_length=None,
        sequence_length=1024,
        total_batch_size=524_288,
        num_steps=3000,
        stages=(Stage(),),
        learning_rate=0.04,
        cooldown_fraction=0.3,
        final_learning_rate_factor=0.0,
        momentum_warmup_steps=500,
        neuron_decay=None,
        adam_betas=(0.9, 0.95),
        weight_decay=0.0,
        model=GPTConfig(
            value_embeddings=0,
            smear=False,
            attention_gate=False,
            attention_scale=128**-0.5,
            rope_base=10_000.0,
            rope_fraction=1.0,
            softcap=30.0,
        ),
    ),
    # A small model of Python code for two CPU cores, sized in benchmarks/README.md.
    "laptop": Hyperparameters(
        preset="laptop",
        train_files=None,
        val_files=None,
        tokenizer="bytes",
        shuffle=True,
        batch_size=4,
        sequence_length=128,
        total_batch_size=2048,
        num_steps=900,
        max_document_length=None,
        stages=(Stage(),),
        learning_rate=0.03,
        embedding_learning_rate=0.15,
        cooldown_fraction=0.5,
        final_learning_rate_factor=0.0,
        momentum=0.9,
        momentum_warmup_steps=50,
        adam_betas=(0.7, 0.95),
        weight_decay=0.0,
        val_loss_every=150,
        val_tokens=262_144,
        dtype="float32",
        sample_tokens=600,
        sample_prompt="import jax\n\n\ndef ",
        model=GPTConfig(
            vocab_size=256,
            num_layers=4,
            num_heads=2,
            width=128,
            mlp_width=512,
            value_embeddings=2,
            bigram_buckets=16384,
            key_offset=(-1,),
            paired_heads=(-1,),
        ),
    ),
}


def at_width(base: Hyperparameters, num_layers: int, num_heads: int, width: int) -> Hyperparameters:
    """The settings for a model of another size, with learning rates that suit its width.

    What a step does to the activations is to stay the same (Yang, Simon and Bernstein,
    arXiv:2310.17813), for which only the rate of the head changes:

        Muon            constant: its updates have a spectral norm of sqrt(max(1, O / I)) at any
                        width (Bernstein and Newhouse, arXiv:2410.21265)
        Adam, head      by 1 / width: each logit adds up as many changes as the stream is wide
                        (Yang et al., arXiv:2203.03466, table 3, output weights)
        Adam, others    constant: a token looks up one row, and scalars are no sums over the width
                        (the same table, input weights and biases)

    These rules are about width. None of them tells how the rates change with depth, with the size
    of a batch, or with how many tokens a run takes.
    """
    model = base.model
    return replace(
        base,
        head_learning_rate=base.head_learning_rate * model.width / width,
        model=replace(
            model,
            num_layers=num_layers,
            num_heads=num_heads,
            width=width,
            mlp_width=4 * width,
            attention_scale=(width // num_heads) ** -0.5,
        ),
    )


# The larger sizes of GPT-2, as `baseline` trains the smallest, for once through FineWeb10B: 10
# billion tokens, as many as llm.c trains its GPT-2s on.
PRESETS |= {
    name: replace(at_width(PRESETS["baseline"], *shape), preset=name, num_steps=19_000)
    for name, shape in {
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }.items()
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, train, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    override = partial(tyro.cli, Hyperparameters, args=arguments)
    given = override()  # a misspelt argument ends here
    try:
        with Interruption() as interruption:
            join_others(given)
            hp = settings(given, lambda start: override(default=start))
            hp.check()
            status = train(with_own_text(hp), interruption)
            from nanogpt.devices.processes import wait_for_others

            wait_for_others()
            return status
    except (ConfigError, ShardError, CorpusError, DataError, TokenizerError, RunError) as error:
        print(error, file=sys.stderr)
        return 2
    except BadNumbers as error:
        print(error, file=sys.stderr)
        return 3


def join_others(given: Hyperparameters) -> None:
    """Join the other processes of the run, if there are any: before JAX is used."""
    where = given.coordinator_address, given.num_processes, given.process_id
    if where == (None,) * 3 and not launched_with_others():
        return  # known without loading JAX
    from nanogpt.devices.processes import join_processes

    if given.device == "cpu":
        use_device("cpu")
    join_processes(*where)


def settings(
    given: Hyperparameters, override: Callable[[Hyperparameters], Hyperparameters]
) -> Hyperparameters:
    """The settings that the arguments ask for: `given`, and what `override` makes of others."""
    sources = [name for name in ("resume", "init_from", "config") if getattr(given, name)]
    if len(sources) > 1:
        raise ConfigError(
            f"{' and '.join(sources)} each say where the settings start: give only one of them."
        )
    if given.resume is not None:
        return resumed_settings(Hyperparameters, run_to_resume(given.resume), override)
    if given.config is not None:
        if given.preset != "auto":
            raise ConfigError("preset and config both say where the settings start: leave one out.")
        start = saved_settings(Hyperparameters, Path(given.config))
        return replace(override(replace(start, run_name="", resume=None)), preset=start.preset)
    weights = None
    if given.init_from is not None:
        weights = weights_in(Hyperparameters, Path(given.init_from))
    if given.preset != "auto":
        start = PRESETS[given.preset]
    elif weights and weights.settings:
        start = weights.settings
    else:
        start = PRESETS[preset_for_hardware(given.device)]
    start = suited_to_own_text(start, override(start))
    hp = settings_with(weights, start, override) if weights else override(start)
    return replace(hp, preset=start.preset)


def suited_to_own_text(start: Hyperparameters, asked: Hyperparameters) -> Hyperparameters:
    """Where the settings start if `asked` names text of one's own, of any order and length."""
    if not asked.data:
        return start
    return replace(
        start,
        shuffle=True,
        max_document_length=None,
        sample_prompt=Hyperparameters.sample_prompt,
        model=replace(start.model, vocab_size=TOKENIZERS[asked.tokenizer].vocab_size),
    )


def with_own_text(hp: Hyperparameters) -> Hyperparameters:
    """The settings with the shards of `data`, which are made now unless they are there."""
    if not hp.data or (hp.resume and glob(hp.train_files)):
        return hp
    text = prepare(hp.data, hp.tokenizer, hp.data_field)
    return replace(
        hp,
        train_files=text.train_files,
        val_files=text.val_files,
        val_tokens=min(hp.val_tokens, max(1, text.val_tokens - 1)),
    )


def preset_for_hardware(device: str) -> str:
    """`speedrun` where JAX finds an accelerator that may be used, else `laptop`."""
    if device == "cpu" or not (find_spec("jax_plugins") or find_spec("libtpu")):
        return "laptop"  # known without loading JAX: it was installed for CPUs only
    import jax

    return "laptop" if jax.default_backend() == "cpu" else "speedrun"


def train(hp: Hyperparameters, interruption: Interruption) -> int:
    """Train a model as `hp` says, in a new folder under runs/ or a resumed one; the exit status."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # JAX's own default is 0.75
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from nanogpt.data.batches import RowOrder, ValidationRows, train_batch
    from nanogpt.data.prefetch import prefetch
    from nanogpt.devices.compilation import (
        compile_all,
        first_that_fits,
        memory_of,
        use_compilation_cache,
    )
    from nanogpt.devices.hardware import (
        activation_bytes,
        device_memory,
        flops_per_token,
        largest_batch,
        peak_memory,
        row_fits,
        utilization,
    )
    from nanogpt.devices.mesh import BATCH, REPLICATED, ROWS, make_mesh, put, shapes_on
    from nanogpt.devices.processes import check_same, processes_line, told_by_first
    from nanogpt.devices.sharding import check_shared
    from nanogpt.inference.weights import load_model
    from nanogpt.model.attention import choose_attention
    from nanogpt.training.checkpoint import Checkpoints, load_state, newest_checkpoint
    from nanogpt.training.step import graph_of, make_eval_step, make_init, make_train_step

    # Devices and data.
    check_trackers(hp.tensorboard, hp.wandb)
    use_device(hp.device)
    use_compilation_cache()
    alone = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    check_same("settings", repr(replace(hp, **alone)))
    mesh = make_mesh(**mesh_axes(hp.mesh))
    if mesh.size < jax.device_count():
        raise ConfigError(
            f"mesh {hp.mesh} leaves {jax.device_count() - mesh.size} of {jax.device_count()} "
            "devices idle: name one that has all of them, or show JAX fewer."
        )
    sharers, readers = mesh.shape["model"], mesh.shape["data"]  # of a row, and of different ones
    device = jax.local_devices()[0]
    schedule, stages, V = hp.schedule, range(len(hp.stages)), hp.model.vocab_size
    rows_per_step = [hp.rows_per_step(stage, readers) for stage in stages]  # of each device
    data = find_data(hp)
    check_same("data", data.sha256)
    order = RowOrder(partial(rows_of, hp, data), schedule, hp.shuffle)
    order(hp.num_steps)  # raises ShardError where the shards hold no row of some stage
    val_rows = [
        ValidationRows(data.val_files, schedule.row_length(stage), hp.val_tokens, V)
        for stage in stages
    ]

    # The model as each stage trains it, and its optimizer.
    configs = [schedule.model(hp.model, stage) for stage in stages]
    check_shared(hp.model, [schedule.row_length(stage) for stage in stages], sharers)
    attention, attention_line = choose_attention(configs, hp.sequence_length, hp.dtype)
    optimizer = optimizer_of(hp, mesh)
    init = make_init(hp.model, optimizer, mesh, hp.shard_params)
    key = jax.random.key(hp.seed)

    # Rows per device and pass: as asked for, or what should fit.
    memory, T = device_memory(device), hp.sequence_length
    bytes_of = partial(activation_bytes, hp.model, T, hp.dtype, flash=attention != "xla")
    rematerialize = hp.rematerialize
    if rematerialize is None:
        rematerialize = not row_fits(T * bytes_of(), memory)
    row_bytes = T * bytes_of(rematerialize=rematerialize)
    kernels = Kernels(attention, hp.loss_kernel, hp.fp8_head, rematerialize, sharers > 1)
    fewest = gcd(*(schedule.tokens_per_step(s) // hp.sequence_length for s in stages)) // readers
    batch_size = hp.batch_size or largest_batch(fewest, row_bytes, memory)

    def new_name() -> str:
        return new_folder(Path("runs"), hp.run_name, hp.preset).name

    folder = Path(hp.resume) if hp.resume else Path("runs") / told_by_first(new_name)
    with (
        (Run if jax.process_index() == 0 else SilentRun)(folder) as run,
        Checkpoints(folder, hp.keep_checkpoints, run.say) as checkpoints,
        Trace(folder / "profile", steps_of(hp.profile, 1, hp.num_steps), run.say) as trace,
    ):
        # Where it begins: after the step of the newest good checkpoint, or with step 1.
        checkpoint = newest_checkpoint(folder, run.say) if hp.resume else None
        first, facts = (checkpoint.step + 1, checkpoint.facts) if checkpoint else (1, {})
        unvalidated = facts.get("unvalidated")  # a record, if the run ended while it validated
        if first > hp.num_steps and not unvalidated:
            run.say(f"{folder} has made all its {hp.num_steps:,} steps: --num-steps adds more.")
            return 0
        steps_of(hp.profile, first, hp.num_steps)  # raises ConfigError where they were made before
        if checkpoint:
            check_same_data(folder, facts["data"], data.sizes)
            told = facts["tokens"], schedule.tokens(checkpoint.step)
            if told[0] != told[1]:
                raise ConfigError(
                    f"num_steps cannot change to {hp.num_steps} while {folder} is resumed: its "
                    f"stages would have had {told[1]:,} tokens by now instead of {told[0]:,}."
                )
            run.rewind(checkpoint.step - 1 if unvalidated else checkpoint.step)
            run.say(f"resuming {folder} after step {checkpoint.step}")
        elif hp.init_from:
            run.say(f"beginning with the weights in {hp.init_from}")
        config = asdict(replace(hp, resume=None, config=None, profile=None, **alone))
        run.configure(config, environment() | {"data": {"name": data.name, "sha256": data.sha256}})
        run.trackers = open_trackers(
            folder,
            config,
            first - 1 if unvalidated else first,
            run.say,
            tensorboard=hp.tensorboard,
            wandb=hp.wandb,
        )
        per_step = dict.fromkeys(map(schedule.tokens_per_step, stages))
        per_pass = batch_size * hp.sequence_length * readers
        devices = f"{mesh.size} x {device.device_kind}"
        if jax.process_count() > 1:
            devices += f" of {jax.process_count()} processes"
        if sharers > 1:
            devices += f" as data={readers},model={sharers}"
        if hp.shard_params:
            devices += ", parameters divided"
        accumulation = (
            f"Ng = {', '.join(f'{tokens:,}' for tokens in per_step)} / "
            f"({batch_size} * {hp.sequence_length} * {readers}) = "
            f"{', '.join(f'{tokens // per_pass}' for tokens in per_step)}"
        )
        run.say(f"{hp.preset} preset | {data.name} | {devices} | {accumulation}")
        if jax.process_count() > 1:
            run.say(f"{processes_line()}; if one is lost all end: go on with --resume {folder}")
        run.say(attention_line)
        if hp.batch_size is None:
            size = f"{memory / 1e9:.1f} GB" if memory else "an unknown amount"
            run.say(
                f"micro-batches of {batch_size} rows: about {batch_size * row_bytes / 1e9:.1f} GB "
                f"of activations in {size} of memory"
            )
        if rematerialize:
            run.say("layers are computed again in the backward pass, to save memory")

        def shape_of(stage: int, batch_size: int) -> tuple[int, int]:
            """Micro-batches per step, Ng, and rows of each over all devices, R."""
            rows = batch_size * hp.sequence_length // schedule.row_length(stage)
            return rows_per_step[stage] // rows, rows * readers

        def read_batch(step: int, shapes: list[tuple[int, int]]) -> jax.Array:
            """The batch [Ng, R, T + 1] of an optimizer step."""
            stage = schedule.stage(step)
            rows, number = order(step)
            read = partial(train_batch, rows, number, shapes[stage])
            return put(mesh, BATCH, (*shapes[stage], schedule.row_length(stage) + 1), read)

        def prepare(batch_size: int) -> tuple:
            """Compile every stage, and try each: what is slow or fails at first does so here."""
            shapes = [shape_of(stage, batch_size) for stage in stages]
            state = jax.eval_shape(init, key)
            rates = Rates(*[jax.ShapeDtypeStruct((), jnp.float32)] * 2)
            lowered = {}
            for stage in ahead:
                graph, (Ng, R) = graph_of(configs[stage], kernels), shapes[stage]
                rows = jax.ShapeDtypeStruct((R, schedule.row_length(stage) + 1), jnp.int32)
                batch = jax.ShapeDtypeStruct((Ng, *rows.shape), jnp.int32)
                weights = hp.stages[stage].target_weights
                train_step = make_train_step(
                    graph, optimizer, mesh, hp.dtype, hp.skip_spikes, weights, hp.shard_params
                )
                eval_step = make_eval_step(graph, mesh, hp.dtype, hp.shard_params)
                lowered["training step", stage] = train_step.lower(
                    state, shapes_on(mesh, BATCH, batch), rates
                )
                lowered["validation", stage] = eval_step.lower(
                    state.params, shapes_on(mesh, ROWS, rows)
                )
            programs, seconds = compile_all(lowered, run.console)
            for stage, step in ahead.items():
                batch, train_step = read_batch(step, shapes), programs["training step", stage]
                for _ in range(2):  # the second is as fast as those to come
                    fresh = jax.block_until_ready(init(key))
                    start = time.perf_counter()
                    jax.block_until_ready(train_step(fresh, batch, schedule.rates(step)))
                step_seconds[stage] = time.perf_counter() - start
            return shapes, programs, seconds

        def say_smaller(failed: int, smaller: int) -> None:
            run.say(
                f"out of memory with micro-batches of {failed} rows: now {smaller}, "
                f"Ng = {shape_of(0, smaller)[0]}"
            )

        # The stages that are left, each with its first step; a validation to be made up for is of
        # the step before.
        ahead = {}
        for step in range(first - 1 if unvalidated else first, hp.num_steps + 1):
            ahead.setdefault(schedule.stage(step), step)

        flops = [flops_per_token(configs[stage], schedule.row_length(stage)) for stage in stages]
        progress = Progress(
            run,
            schedule,
            utilization=lambda step, rate: utilization(
                rate, flops[schedule.stage(step)], device.device_kind, mesh.size
            ),
            training_seconds=facts.get("training_seconds", 0.0),
        )

        # Everything is compiled before the first step.
        step_seconds: dict[int, float] = {}  # by stage
        shapes, programs, seconds = first_that_fits(prepare, batch_size, say_smaller)
        state = load_state(checkpoint, jax.eval_shape(init, key)) if checkpoint else init(key)
        if hp.init_from and not checkpoint:
            weights = load_model(Path(hp.init_from), mesh)[2]
            places = jax.tree.map(lambda p: p.sharding, state.params)
            state = replace(state, params=jax.device_put(weights, places))
        each = ", ".join(f"{what} {took:.1f} s" for (what, _), took in seconds.items())
        progress.paused("compile")
        run.say(
            f"compiled ({each}) and tried in {progress.seconds['compile']:.1f} s, in no time given "
            "below"
        )
        estimate = sum(
            step_seconds[schedule.stage(step)] for step in range(first, hp.num_steps + 1)
        )
        needed = max(map(memory_of, programs.values())) / 1e9
        run.table(
            {
                "preset": hp.preset,
                "run": str(run.folder),
                "model": f"{hp.model.num_layers} layers, width {hp.model.width}, "
                f"{hp.model.num_heads} heads",
                "parameters": f"{sum(p.size for p in jax.tree.leaves(state.params)):,}",
                "data": data.name,
                "tokens": f"{schedule.tokens(hp.num_steps):,} in {hp.num_steps:,} steps",
                "devices": devices,
                "batch": accumulation,
                "attention": attention_line,
                "dtype": hp.dtype,
                "memory": f"about {needed:.1f} GB"
                + (f" of {memory / 1e9:.1f} GB" if memory else "")
                + " per device",
                "time": f"about {timedelta(seconds=round(estimate))} to train",
            }
        )

        def validate() -> float | None:
            """The loss on the validation tokens; None if broken off."""
            stage, sums = schedule.stage(step), []
            (_, R), T, rows = shapes[stage], schedule.row_length(stage), val_rows[stage]
            for row in range(0, len(rows), R):
                if interruption.hurries:
                    return None
                batch = put(mesh, ROWS, (R, T + 1), partial(rows, row, R))
                sums.append(programs["validation", stage](state.params, batch))
                # With many programs under way, devices of a CPU no longer meet in any of them.
                jax.block_until_ready(sums[-2:][0])
            return sum(map(float, sums)) / hp.val_tokens

        def save() -> None:
            """Begin a checkpoint, of what has been reported and found good."""
            progress.report()
            run.sync()
            checkpoints.save(
                state,
                {
                    "tokens": schedule.tokens(step),
                    "training_seconds": progress.training_seconds,
                    "unvalidated": progress.unvalidated,
                    "data": data.sizes,
                },
            )
            progress.paused("checkpoint")

        # The loop.
        interruption.patient = True
        step, stop = first - 1, False
        if unvalidated:
            progress.validate(unvalidated, validate)
            if interruption.hurries:
                run.trackers.close(interruption.exit_status)
                return interruption.exit_status
        progress.paused("compile")
        batches = prefetch(partial(read_batch, shapes=shapes), range(first, hp.num_steps + 1))
        try:
            for step, batch in enumerate(batches, start=first):
                train_step = programs["training step", schedule.stage(step)]
                trace.begin(step, train_step, state, progress)
                state, metrics = train_step(state, batch, schedule.rates(step))
                progress.started(step, metrics)
                trace.end(step, state, progress)
                last = step == hp.num_steps
                if last or (hp.val_loss_every and step % hp.val_loss_every == 0):
                    progress.report(validate)
                stop = interruption.requested(step)
                if last or stop or (hp.checkpoint_every and step % hp.checkpoint_every == 0):
                    save()
                if stop:
                    break
        except BadNumbers as error:
            try:
                checkpoints.wait()
                good = f"The last good checkpoint is {newest_checkpoint(folder, run.say).folder}."
            except ConfigError as failure:
                good = str(failure)
            raise BadNumbers(f"{error} {good}") from error
        checkpoints.wait()
        progress.paused("checkpoint")
        interruption.patient = False
        run.progress_ended()
        peak = peak_memory(device)
        run.table(
            progress.summary()
            | {"peak memory": f"{peak / 1e9:.1f} GB per device" if peak else "n/a"}
        )
        run.say(f"weights and metrics of {step:,} steps are in {folder}")
        if stop or interruption.hurries:
            run.say(f"interrupted: go on with --resume {folder}")
            run.trackers.close(interruption.exit_status)
            return interruption.exit_status

        if find_spec("matplotlib") and jax.process_index() == 0:
            from nanogpt.report.curves import loss_png

            try:
                run.say(f"a picture of the loss is in {loss_png(folder)}")
            except (OSError, RunError) as error:
                run.say(f"no picture of the loss: {error}")
        if hp.sample_tokens:
            whole = jax.jit(lambda params: params, out_shardings=NamedSharding(mesh, REPLICATED))
            graph = graph_of(configs[schedule.stage(step)])
            run.say(sample(hp, graph, whole(state.params)))
        return 0


def optimizer_of(hp: Hyperparameters, mesh: "Mesh") -> "GradientTransformationExtraArgs":
    """The optimizer of the run; Muon computes in bfloat16 where there are matrix units for it."""
    import jax.numpy as jnp

    from nanogpt.optim.groups import make_optimizer

    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return make_optimizer(
        learning_rate=hp.learning_rate,
        embedding_learning_rate=hp.embedding_learning_rate,
        head_learning_rate=hp.head_learning_rate,
        scalar_learning_rate=hp.scalar_learning_rate,
        neuron_decay=hp.neuron_decay,
        adam_betas=hp.adam_betas,
        weight_decay=hp.weight_decay,
        newton_schulz_dtype=jnp.float32 if on_cpu else jnp.bfloat16,
        mesh=mesh,
        shard_params=hp.shard_params,
    )


def use_device(device: str) -> None:
    """Have JAX use this kind of device; ConfigError if it finds none."""
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if device not in ("auto", jax.default_backend()):
        raise ConfigError(
            f"JAX finds no {device}, only {jax.default_backend()}: check the driver, and that JAX "
            f'is installed for it (pip install "jax[{"tpu" if device == "tpu" else "cuda12"}]"), '
            "or leave out --device."
        )


class Data(NamedTuple):
    """What a run trains and validates on."""

    train_files: list[Path]
    val_files: list[Path]
    name: str
    sizes: list[tuple[str, int]]  # name and tokens of each training shard
    sha256: str  # of the names and sizes of all shards, and of the first and last tokens in each


def find_data(hp: Hyperparameters) -> Data:
    """The shards of the run, every one of them checked."""
    if hp.train_files is None:
        corpus = embedded_corpus()
        train_glob, val_glob = corpus.train_files, corpus.val_files
        name = f"embedded corpus {corpus.fingerprint}"
    else:
        train_glob, val_glob = hp.train_files, hp.val_files
        name = ", ".join(hp.data) or hp.train_files
    train_files, val_files = find_shards(train_glob), find_shards(val_glob)
    sizes, digest = [], hashlib.sha256()
    for file in train_files + val_files:
        tokens = read_shard(file)
        digest.update(f"{file.name} {len(tokens)} ".encode())
        digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes())
        sample = None if hp.verify_data else 1_000_000
        check_vocabulary(file, tokens, hp.model.vocab_size, sample)
        if file in train_files:
            sizes.append((file.name, len(tokens)))
    total = sum(count for _, count in sizes)
    return Data(train_files, val_files, f"{name}, {total:,} tokens", sizes, digest.hexdigest())


def rows_of(hp: Hyperparameters, data: Data, T: int, start: int) -> "Rows":
    """The training rows of T + 1 tokens, from an offset of the data on."""
    from nanogpt.data.batches import Rows

    return Rows(
        data.train_files,
        T,
        hp.seed,
        hp.shuffle,
        hp.model.vocab_size,
        separator=TOKENIZERS[hp.tokenizer].separator,
        max_document=hp.max_document_length,
        start=start,
    )


def sample(hp: Hyperparameters, graph: "nnx.GraphDef", params: "Params") -> str:
    """A continuation of `sample_prompt`, or why there is none."""
    from nanogpt.inference.text import write

    try:
        tokenizer = load_tokenizer(hp.tokenizer)
    except TokenizerError as error:
        return f"no sample: {error}"
    tokens = write(
        graph,
        params,
        tokenizer,
        [hp.sample_prompt],
        num_tokens=hp.sample_tokens,
        context=hp.sequence_length,
        sampling=Sampling(seed=hp.seed),
        dtype=hp.dtype,
    )
    return f"sample:\n{hp.sample_prompt}{''.join(token.text for _, token in tokens)}"


if __name__ == "__main__":
    sys.exit(main())
