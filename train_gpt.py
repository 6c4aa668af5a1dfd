"""Train a GPT: `python3 train_gpt.py`, with no arguments.

With an accelerator this trains the `speedrun` preset on FineWeb10B (`python3
cached_fineweb10B.py` fetches it); without one, the `laptop` preset on Python source code, which
needs no download and takes a few minutes. `--help` lists every setting.

The file reads from top to bottom: the hyperparameters, the presets, then the training loop.
"""

import nanogpt  # noqa: F401  (explains what to do if packages are missing)

# isort: split
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from nanogpt.adam import AdamGroups
from nanogpt.checks import (
    AboveZero,
    ConfigError,
    Count,
    Decay,
    NotNegative,
    Positive,
    Seed,
    Share,
    UserError,
    can_be_utf8,
    checked,
)
from nanogpt.command_line import parse
from nanogpt.config import ComputeType, GPTConfig, LossKernel, TokenizerName, mesh_axes
from nanogpt.data.tokenizer import TOKENIZERS
from nanogpt.runs.profile import Trace, steps_of
from nanogpt.runs.progress import BadNumbers
from nanogpt.runs.settings import join_others, leave, settings, settings_here
from nanogpt.runs.trackers import check_trackers
from nanogpt.schedule import Schedule, Stage, Stages
from nanogpt.sizes import at_width
from nanogpt.training.interruption import Interruption

Preset = Literal["auto", "speedrun", "baseline", "laptop", "gpt2-medium", "gpt2-large", "gpt2-xl"]


def windows(short: int, long: int) -> tuple[int, ...]:
    """Return the windows of 11 layers: long in layers 3 and 10, short in all others."""
    return (short,) * 3 + (long,) + (short,) * 6 + (long,)


# The model, stages and rates of modded-nanogpt's record of 2026-05-27; see docs/recipe.md.
SPEEDRUN_MODEL = GPTConfig(
    num_layers=11,
    mlp_only=(6,),
    key_offset=(3, 10),
    paired_heads=(0, 2, 5, 9),
    exclusive=(1, 3, 4, 7),
    gated=(3, 10),
    composed=(10,),
    attention_source=7,
    dynamic=True,
    skips=((3, 6),),
    value_embeddings=5,
    value_layers=(1, 2, 8, 9, 10),
    bigram_buckets=15 * 50304 // 2,
    bigram_width=768,
    attention_gate=False,
    document_separator=50256,
    tied_head=True,
    attention_init=0.5,
    attention_out_init=0.5,
    residual_init=1.1,
    attention_scale=0.1,
    softcap=11.5,
    logit_scale=11.5 / 15,
    logit_shift=5.0,
)
SPEEDRUN_STAGES = (
    Stage(425, 1 / 3, 1.0, 1.00, windows(128, 384), None, (1.0, 0.5, 0.25), 896),
    Stage(425, 2 / 3, 1.0, 1.52, windows(384, 896), None, (1.0, 0.5)),
    Stage(425, 1.0, 1.0, 1.73, windows(640, 1408), split_head=True),
    Stage(15, 1.0, 1.0, 1.73, windows(768, 1664), windows(768, 2560)),
)


# JAX, and modules that use it, are imported inside the functions below that need them, after the
# arguments are parsed, so that `--help` and errors in the arguments appear at once.


@dataclass(frozen=True)
class Hyperparameters:  # the defaults are those of the speedrun preset
    """All settings of a run, with their defaults."""

    preset: Preset = "auto"
    """Defaults for all other settings. auto: with an accelerator speedrun, or baseline if that does
    not fit, otherwise laptop; with init_from, the settings of that run."""
    config: str | None = None
    """config.json of an earlier run, to use its settings as defaults instead of a preset's."""
    depth: Annotated[int, Meta(ge=1, le=128)] | None = None
    """Number of layers; width, tokens, batch, rates and schedule follow; see docs/sizes.md."""
    minutes: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Choose depth, unless given, and tokens so that the run takes this many minutes here."""

    # Data
    train_files: str | None = "fineweb10B/fineweb_train_*.bin"
    """Glob of the training shards; None trains on the embedded corpus of Python code."""
    val_files: str | None = "fineweb10B/fineweb_val_*.bin"
    """Glob of the validation shards; None uses the embedded corpus."""
    tokenizer: TokenizerName = "gpt2"
    """Tokenizer of the shards, or for text given with `data`; also decodes samples."""
    data: tuple[str, ...] = ()
    """Your own text instead of shards: files, folders or globs of plain text, JSON, CSV or
    Parquet; see docs/own-text.md. Rows are then shuffled, documents are used whole, and the
    vocabulary is the tokenizer's, unless set otherwise."""
    data_field: str = "text"
    """Field (JSON) or column (Parquet, CSV) of `data` that holds the text."""
    shuffle: bool = False
    """Shuffle rows in the first epoch too; later epochs are always shuffled."""

    max_document_length: Positive | None = 2048
    """Start each row at the beginning of a document and use at most this many tokens of each
    document; None uses all tokens, and rows start anywhere."""

    # Batch: Ng = total_batch_size / (batch_size * sequence_length * number of devices along data)
    batch_size: Positive | None = None
    """Rows per device and forward-backward pass; None: as many as fit into memory."""
    sequence_length: Positive = 16_384
    """Tokens per row (T)."""
    total_batch_size: Positive = 393_216
    """Tokens per optimizer step, over all devices and accumulation steps."""

    # Optimization
    num_steps: Positive = 1290
    """Optimizer steps."""
    stages: tyro.conf.Suppress[Stages] = SPEEDRUN_STAGES
    """Training stages, in order; see nanogpt/schedule.py."""
    learning_rate: NotNegative = 0.023
    """Muon's learning rate, for the layers' matrices."""
    learning_rate_factor: NotNegative = 1.0
    """Factor on all learning rates, e.g. 0.3 to fine-tune on little text; see docs/own-text.md."""
    mlp_out_factor: NotNegative = 4.0
    """Factor on learning_rate for the MLPs' output matrices."""
    weight_decay: NotNegative = 1.2
    """Cautious weight decay of the layers' matrices: each step shrinks weights by rate^2 times
    this, only where the update already moves them toward zero."""
    momentum: Decay = 0.95
    """Muon's momentum after its warm-up from 0.85."""
    momentum_warmup_steps: Count = 300
    """Number of steps over which Muon's momentum warms up."""
    momentum_cooldown_steps: Count = 50
    """Number of final steps over which Muon's momentum falls back to 0.85."""
    neuron_decay: Decay | None = 0.9
    """NorMuon's decay rate for the second moment of each neuron; None for plain Muon."""
    heads_together: Positive | None = 2
    """Number of heads whose queries (or keys) Muon orthogonalizes as one matrix; None: all."""
    adam_every: Positive = 2
    """Steps between updates of Adam (all other parameters), which uses the mean gradient."""
    adam: AdamGroups = AdamGroups()
    """Adam's settings for each parameter group."""
    hold_fraction: Annotated[float, Meta(ge=0, lt=1)] = 15 / 1290
    """Fraction of the steps, at the end, for which learning rates stay at their minimum."""
    cooldown_fraction: Share = 0.6
    """Fraction of the steps before the hold over which learning rates decay linearly."""
    final_learning_rate_factor: Share = 0.15
    """Factor on all learning rates at the end of the cooldown."""

    # Validation
    val_loss_every: Count = 125
    """Steps between validations; 0: only after the last step, which always validates."""
    val_tokens: Positive = 10_485_760
    """Number of validation tokens, from the start of the validation shards."""
    canonical_masking: bool = False
    """Validate without the ids that the tokenizer cannot produce next; see docs/evaluation.md."""

    # Run
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Hardware to train on; auto picks the best device JAX finds, any other must be present."""
    dtype: ComputeType = "bfloat16"
    """Data type of the forward and backward passes; master weights are float32."""
    loss_kernel: LossKernel = "xla"
    """xla, or on NVIDIA GPUs pallas: one fused kernel for the loss and its gradient."""
    fp8_head: bool = False
    """Compute the head's matmuls in FP8; needs NVIDIA Hopper or newer."""
    coordinator_address: str | None = None
    """host:port of the first of several processes, if no launcher provides it (Slurm, Open MPI,
    Kubernetes and TPU pods do). See docs/many-machines.md."""
    num_processes: Positive | None = None
    """Number of processes, if no launcher provides it."""
    process_id: Count | None = None
    """Index of this process, starting at 0, if no launcher provides it."""
    mesh: str | None = None
    """Device mesh, e.g. data=4,model=2: data parallelism over rows, tensor parallelism over heads
    and MLPs; None puts all devices on the data axis."""
    shard_params: bool = False
    """Shard all parameters, not just embeddings and head (ZeRO-3), even if a row fits without."""
    rematerialize: bool | None = None
    """Recompute layers in the backward pass to save memory; None: only if not even one row fits."""
    seed: Seed = 0
    """Random seed for the initial weights, the data order and the sample."""
    skip_spikes: NotNegative = 0.0
    """Skip steps with a loss over this many standard deviations above the recent mean; 0: never."""
    verify_data: bool = False
    """Check every token of the shards before training, not only a sample."""
    run_name: str = ""
    """Name of the new folder under runs/; by default preset, date and time."""
    resume: str | None = None
    """Resume runs/<name> from its newest checkpoint; auto resumes the latest run."""
    init_from: str | None = None
    """Fine-tune: start from the newest weights of runs/<name>, or of a folder written by
    export.py or hf://user/name, with a new optimizer and schedule. Model, tokenizer and
    sequence_length come with the weights; other settings default to that run's, or to a preset's
    if one is given or the weights are exported ones, with a single stage."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; 0: only after the last step, which always saves one."""
    checkpoint_minutes: AboveZero | None = None
    """Also save whenever this many minutes have passed since the last checkpoint."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = False
    """Save at every validation and also keep the checkpoint with the lowest validation loss."""
    tensorboard: bool = False
    """Also log to TensorBoard: tensorboard --logdir runs."""
    wandb: bool = False
    """Also log to Weights & Biases: project WANDB_PROJECT, by default nanogpt-jax;
    WANDB_MODE=offline logs to disk only."""
    profile: str | None = None
    """Profile these steps, e.g. 10:13 (inclusive), write the trace to the run's folder and print
    the costliest operations; see docs/profiling.md."""
    dry_run: bool = False
    """Print the plan (devices, model, stages, memory, checkpoints) and exit."""
    sample_tokens: Count = 256
    """Number of tokens to generate as a sample at the end; 0 for none."""
    sample_prompt: str = "The"
    """Prompt for the sample."""

    model: GPTConfig = SPEEDRUN_MODEL
    """Model architecture."""

    def check(self) -> None:
        """Raise ConfigError, with a sentence for the user, if the settings are invalid."""
        checked(asdict(self), Hyperparameters)
        if not can_be_utf8(self.sample_prompt):
            raise ConfigError(f"sample_prompt must be UTF-8, not {self.sample_prompt!a}.")
        if (self.train_files is None) != (self.val_files is None):
            raise ConfigError("Give both train_files and val_files, or neither (None).")
        if self.train_files is None and not self.data and self.tokenizer != "bytes":
            raise ConfigError(
                f"The embedded corpus consists of bytes, not {self.tokenizer} tokens: set "
                "--tokenizer bytes, or give your own text with --data."
            )
        if self.model.vocab_size < TOKENIZERS[self.tokenizer].vocab_size:
            raise ConfigError(
                f"model.vocab_size {self.model.vocab_size:,} is less than the "
                f"{TOKENIZERS[self.tokenizer].vocab_size:,} ids of tokenizer {self.tokenizer}."
            )
        separator = TOKENIZERS[self.tokenizer].separator
        if self.model.document_separator not in (None, separator):
            raise ConfigError(
                f"model.document_separator must be {separator}, the separator of tokenizer "
                f"{self.tokenizer}, or None, not {self.model.document_separator}."
            )
        self.model.check()
        mesh_axes(self.mesh)
        self.schedule.check()
        steps_of(self.profile, 1, self.num_steps)
        if self.model.windows and self.stages[0].windows is not None:
            raise ConfigError(
                f"model.windows cannot be {self.model.windows}: the stages of the {self.preset} "
                "preset set the windows."
            )
        if self.model.num_heads % (self.heads_together or 1):
            raise ConfigError(
                f"heads_together, {self.heads_together}, must divide num_heads, "
                f"{self.model.num_heads}."
            )
        if self.model.tied_head and self.adam.embedding != self.adam.head:
            raise ConfigError(
                f"adam.embedding must equal adam.head, {self.adam.head}, when model.tied_head is "
                "True."
            )
        for stage in range(len(self.stages)):
            self.schedule.model(self.model, stage).check()
            self.schedule.used(self.model, stage).check()

    @property
    def head_groups(self) -> int:
        """Number of groups of heads in a layer: see heads_together."""
        return self.model.num_heads // (self.heads_together or self.model.num_heads)

    @property
    def schedule(self) -> Schedule:
        """The run's stages and rates."""
        return Schedule(**{each.name: getattr(self, each.name) for each in fields(Schedule)})


PRESETS = {
    # GPT-2 small's size with the recipe of modded-nanogpt's record of 2026-05-27.
    "speedrun": Hyperparameters(preset="speedrun"),
    # The same size with few of those tricks: modded-nanogpt's plain recipe of 2024-11-10.
    "baseline": Hyperparameters(
        preset="baseline",
        max_document_length=None,
        sequence_length=1024,
        total_batch_size=524_288,
        num_steps=3000,
        stages=(Stage(),),
        learning_rate=0.04,
        mlp_out_factor=1.0,
        weight_decay=0.0,
        momentum_warmup_steps=500,
        momentum_cooldown_steps=0,
        neuron_decay=None,
        heads_together=None,
        adam_every=1,
        adam=AdamGroups.alike(tables=0.6, head=0.008, others=0.04, betas=(0.9, 0.95)),
        hold_fraction=0.0,
        cooldown_fraction=0.3,
        final_learning_rate_factor=0.0,
        model=GPTConfig(
            value_embeddings=0,
            smear=False,
            attention_gate=False,
            attention_init=0.5,
            attention_scale=128**-0.5,
            rope_base=10_000.0,
            rope_fraction=1.0,
            softcap=30.0,
        ),
    ),
    # A small model of Python code for two CPU cores; docs/sizes.md explains its size.
    "laptop": Hyperparameters(
        preset="laptop",
        train_files=None,
        val_files=None,
        tokenizer="bytes",
        shuffle=True,
        batch_size=4,
        sequence_length=128,
        total_batch_size=4096,
        num_steps=1000,
        max_document_length=None,
        stages=(Stage(),),
        learning_rate=0.035,
        mlp_out_factor=1.0,
        weight_decay=0.0,
        momentum=0.9,
        momentum_warmup_steps=50,
        momentum_cooldown_steps=0,
        neuron_decay=0.95,
        heads_together=None,
        adam_every=1,
        adam=AdamGroups.alike(tables=0.17, head=0.012, others=0.046, betas=(0.7, 0.95)),
        hold_fraction=0.0,
        cooldown_fraction=0.5,
        final_learning_rate_factor=0.0,
        val_loss_every=200,
        val_tokens=262_144,
        dtype="float32",
        sample_tokens=600,
        sample_prompt="import jax\n\n\ndef ",
        model=GPTConfig(
            vocab_size=256,
            num_layers=3,
            num_heads=2,
            width=96,
            mlp_width=384,
            value_embeddings=2,
            bigram_buckets=16384,
            key_offset=(-1,),
            paired_heads=(-1,),
            attention_scale=0.14,
        ),
    ),
}


# The larger sizes of GPT-2 with `baseline`'s recipe, for one epoch of FineWeb10B: 10 billion
# tokens, as many as llm.c trains its GPT-2s on.
GPT2_SIZES: dict[Preset, tuple[int, int, int]] = {
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
PRESETS |= {
    name: replace(at_width(PRESETS["baseline"], *shape), preset=name, num_steps=19_000)
    for name, shape in GPT2_SIZES.items()
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, train, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    override = partial(parse, Hyperparameters, arguments)
    help_only = {"-h", "--help"} & set(arguments)
    given = parse(Hyperparameters, [x for x in arguments if x not in help_only])
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # JAX's own default is 0.75
    try:
        if help_only:  # with the defaults of the preset that would run
            override(default=settings(given, PRESETS, lambda start: start))
        with Interruption() as interruption:
            join_others(given)
            hp = settings_here(given, PRESETS, lambda start: override(default=start))
            status = train(hp, interruption)
            from nanogpt.devices.processes import wait_for_others

            wait_for_others()
            return status
    except (UserError, BadNumbers) as error:
        print(error, file=sys.stderr)
        return leave(3 if isinstance(error, BadNumbers) else 2)


def train(hp: Hyperparameters, interruption: Interruption) -> int:
    """Train a model in a new folder under runs/, or resume one; return the exit status."""
    from nanogpt.data.prefetch import prefetch
    from nanogpt.devices.accelerator import use_device
    from nanogpt.devices.compilation import use_compilation_cache
    from nanogpt.devices.mesh import make_mesh
    from nanogpt.inference.weights import with_weights
    from nanogpt.report.ending import show_result
    from nanogpt.runs import session
    from nanogpt.training.inputs import Inputs
    from nanogpt.training.plan import plan_here
    from nanogpt.training.programs import prepare_programs
    from nanogpt.training.saving import Checkpoints
    from nanogpt.training.start import where_to_begin

    # Plan: devices, data, stages, kernels, micro-batches.
    check_trackers(hp.tensorboard, hp.wandb)
    use_device(hp.device)
    use_compilation_cache()
    plan = plan_here(hp)
    mesh = make_mesh(plan.readers, plan.sharers)
    inputs = Inputs(plan, mesh)
    if hp.dry_run:
        return session.only_plan(plan)

    with (
        session.open_run(plan) as run,
        Checkpoints(run.folder, hp.keep_checkpoints, run.say, hp.keep_best) as checkpoints,
        Trace(run.folder / "profile", steps_of(hp.profile, 1, hp.num_steps), run.say) as trace,
    ):
        # Open the run, at its first step or after its newest intact checkpoint.
        start = where_to_begin(plan, run.folder, run.say)
        if start.first_record > hp.num_steps:
            return session.nothing_left(run, plan, start)
        progress = session.begin(run, plan, start)

        # Compile and try every program before the clock starts.
        programs = prepare_programs(plan, mesh, inputs, start, run.console, run.say)
        plan, state = programs.plan, programs.first_state(start)
        if hp.init_from and not start.checkpoint:
            state = with_weights(state, hp.init_from, mesh)
        session.compiled(run, progress, programs, start)

        # Train.
        interruption.be_patient()
        step, stop = start.first_step - 1, False
        loss, hurries = programs.validation_loss, interruption.hurries
        try:
            if start.unvalidated:
                progress.validate(partial(loss, state.params, step, hurries))
                if hurries():
                    return session.interrupted(run, interruption)
            progress.paused("compile")
            steps = range(start.first_step, hp.num_steps + 1)
            for step, batch in zip(steps, prefetch(programs.batch, steps), strict=True):
                train_step, rates = programs.train_step(step), hp.schedule.rates(step)
                trace.begin(step, train_step, state, progress)
                state, metrics = train_step(state, batch, rates)
                progress.started(step, metrics)
                trace.end(step, state, progress)
                if plan.saves(step, checkpoints.minutes):
                    session.save(run, progress, checkpoints, plan, step, state)
                if plan.validates(step):
                    progress.validate(partial(loss, state.params, step, hurries))
                if stop := interruption.requested():
                    session.save(run, progress, checkpoints, plan, step, state)
                    break
        except BadNumbers as error:
            raise BadNumbers(f"{error} {checkpoints.last_good(bad=step)}") from error

        # Finish.
        checkpoints.wait()
        progress.paused("checkpoint")
        interruption.patient = False
        session.end(run, progress, step)
        if stop or interruption.hurries():
            run.say(f"Interrupted. Resume with: python3 train_gpt.py --resume {run.folder}")
            return session.interrupted(run, interruption)
        show_result(run, plan, state.params, mesh)
        return 0


if __name__ == "__main__":
    sys.exit(main())
