"""Train a GPT: `python3 train_gpt.py`, with no arguments.

With an accelerator this trains the `speedrun` preset on FineWeb10B (`python3
cached_fineweb10B.py` fetches it); without one, the `laptop` preset on Python source code, which
needs no download and takes a few minutes. `--help` lists every setting.

The file reads from top to bottom: the hyperparameters, the presets, then the training loop.
"""

import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from msgspec import Meta

from nanogpt.checks import (
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
from nanogpt.config import AdamGroups, ComputeType, GPTConfig, LossKernel, TokenizerName, mesh_axes
from nanogpt.data.tokenizer import TOKENIZERS
from nanogpt.runs.folder import Run, RunError
from nanogpt.runs.profile import Trace, steps_of
from nanogpt.runs.progress import BadNumbers
from nanogpt.runs.settings import join_others, leave, settings, with_own_text
from nanogpt.runs.trackers import check_trackers
from nanogpt.schedule import Schedule, Stage, Stages
from nanogpt.sizes import at_width
from nanogpt.training.interruption import Interruption

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from nanogpt.training.plan import Plan
    from nanogpt.training.step import Params


Preset = Literal["auto", "speedrun", "baseline", "laptop", "gpt2-medium", "gpt2-large", "gpt2-xl"]


def windows(short: int, long: int) -> tuple[int, ...]:
    """The windows of 11 layers: long ones in the middle and at the end."""
    return (short,) * 3 + (long,) + (short,) * 6 + (long,)


# Model, stages and rates of this preset are those of modded-nanogpt's record of 2026-01-19; see
# docs/recipe.md.
SPEEDRUN_MODEL = GPTConfig(
    num_layers=11,
    mlp_only=(6,),
    key_offset=(3, 10),
    paired_heads=(0, 2, 5, 9),
    skips=((3, 6),),
    backout=7,
    bigram_buckets=5 * 50304,
    document_separator=50256,
    tied_head=True,
    residual_init=1.1,
    attention_scale=0.1,
    softcap=11.5,
    logit_scale=11.5 / 15,
    logit_shift=5.0,
)
SPEEDRUN_STAGES = (
    Stage(0.325, 1 / 3, 1.0, 1.00, windows(128, 384), target_weights=(1.0, 0.5, 0.25)),
    Stage(0.325, 2 / 3, 1.0, 1.52, windows(384, 896), target_weights=(1.0, 0.5)),
    Stage(0.325, 1.0, 1.0, 1.73, windows(640, 1408), split_head=True),
    Stage(0.025, 1.0, 1.0, 1.73, windows(768, 1664), windows(768, 2560)),
)


# JAX, and what imports it, is imported by the functions below that need it, after the arguments
# were read: `--help` and mistakes answer at once.


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run. The defaults are the `speedrun` preset."""

    preset: Preset = "auto"
    """Where the other settings start: auto is speedrun with an accelerator, else laptop; with
    init_from it is the settings of that run."""
    config: str | None = None
    """Start them instead from the config.json of an earlier run, to repeat it."""

    # Data
    train_files: str | None = "fineweb10B/fineweb_train_*.bin"
    """Glob of the training shards; None for the embedded corpus of Python code."""
    val_files: str | None = "fineweb10B/fineweb_val_*.bin"
    """Glob of the validation shards; None for the embedded corpus."""
    tokenizer: TokenizerName = "gpt2"
    """What made the shards, or makes them from `data`; decodes samples."""
    data: tuple[str, ...] = ()
    """Text of your own to train on, in place of shards: files, folders and globs of text, JSON
    lines and Parquet; see docs/own-text.md. It starts from shuffled rows with all of every
    document, and from the tokenizer's vocabulary."""
    data_field: str = "text"
    """Where JSON lines and Parquet in `data` have their text: the member or column."""
    shuffle: bool = False
    """Visit the rows in random order from the first epoch on; later epochs always do."""

    max_document_length: Positive | None = 2048
    """Begin each row with a document and take at most so many tokens of each, the rest is left
    out; None for rows that leave nothing out."""

    # Batch: Ng = total_batch_size / (batch_size * sequence_length * number of devices along data)
    batch_size: Positive | None = None
    """Rows per device in one forward and backward pass; None for as many as its memory holds."""
    sequence_length: Positive = 16_384
    """Tokens per row, T."""
    total_batch_size: Positive = 393_216
    """Tokens per optimizer step, over all devices and accumulation steps."""

    # Optimization
    num_steps: Positive = 1600
    """Optimizer steps."""
    stages: tyro.conf.Suppress[Stages] = SPEEDRUN_STAGES
    """The stretches of the run, in order; see nanogpt/schedule.py."""
    learning_rate: NotNegative = 0.023
    """Rate of Muon, for the matrices of the layers."""
    mlp_out_factor: NotNegative = 4.0
    """What this rate is multiplied with for the matrices that lead out of the MLPs."""
    weight_decay: NotNegative = 1.2
    """Of the matrices of the layers: a step takes the rate squared times this off those weights
    which it brings nearer to zero."""
    momentum: Decay = 0.95
    """Muon's momentum, after its warm-up from 0.85."""
    momentum_warmup_steps: Count = 300
    """First steps, in which Muon's momentum rises."""
    momentum_cooldown_steps: Count = 50
    """Last steps, in which it falls back to 0.85."""
    neuron_decay: Decay | None = 0.95
    """Decay of the mean squares by which Muon evens out its neurons; None for plain Muon."""
    adam_every: Positive = 2
    """Adam, for all other parameters, acts at every so many steps, on their mean gradient."""
    adam: AdamGroups = AdamGroups()
    """How Adam moves each group of them."""
    hold_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.025
    """Share of the steps, the last ones, in which all rates stay at their lowest."""
    cooldown_fraction: Share = 0.55
    """Share of the steps before these, the last ones, in which they fall linearly."""
    final_learning_rate_factor: Share = 0.1
    """What the rates are multiplied with at the end of the cooldown."""

    # Validation
    val_loss_every: Count = 125
    """Steps between validations; the last step always validates. 0 for that one only."""
    val_tokens: Positive = 10_485_760
    """Tokens to validate on, the first ones of the validation shards."""

    # Run
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """What to train on; auto is the best that JAX finds, any other must be there."""
    dtype: ComputeType = "bfloat16"
    """What the forward and backward passes compute in; weights are kept in float32."""
    loss_kernel: LossKernel = "xla"
    """What computes the loss: XLA, or on NVIDIA GPUs one Pallas kernel for it and its gradient."""
    fp8_head: bool = False
    """Multiply with the head in 8-bit floating point: for NVIDIA Hopper or newer."""
    coordinator_address: str | None = None
    """Where the first of several processes can be reached, host:port, if no launcher tells: Slurm,
    Open MPI, Kubernetes and TPU pods do. See docs/many-machines.md."""
    num_processes: Positive | None = None
    """How many processes there are, likewise."""
    process_id: Count | None = None
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
    seed: Seed = 0
    """Of the initial weights, of the order of the data and of the sample."""
    skip_spikes: NotNegative = 0.0
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
    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step always makes one. 0 for that one only."""
    keep_checkpoints: Positive = 2
    """How many of them are kept, the newest."""
    tensorboard: bool = False
    """Show the curves in TensorBoard, too: tensorboard --logdir runs."""
    wandb: bool = False
    """Show them in Weights & Biases, too, in the project that WANDB_PROJECT names, by default
    nanogpt-jax; WANDB_MODE=offline keeps them on this disk."""
    profile: str | None = None
    """Trace these optimizer steps, such as 10:13, both included, into the run's folder, and say
    what cost most in them; see docs/profiling.md."""
    dry_run: bool = False
    """Print what the run would do, and exit: devices, model, stages, memory, checkpoints."""
    sample_tokens: Count = 256
    """Tokens to write at the end, as a sample; 0 for none."""
    sample_prompt: str = "The"
    """What the sample continues."""

    model: GPTConfig = SPEEDRUN_MODEL
    """The shape of the network."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for settings that make no sense."""
        checked(asdict(self), Hyperparameters)
        if not can_be_utf8(self.sample_prompt):
            raise ConfigError(f"sample_prompt must be UTF-8, not {self.sample_prompt!a}.")
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
        separator = TOKENIZERS[self.tokenizer].separator
        if self.model.document_separator not in (None, separator):
            raise ConfigError(
                f"model.document_separator must be {separator}, with which documents of tokenizer "
                f"{self.tokenizer} begin, or None, not {self.model.document_separator}."
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
        if self.model.tied_head and self.adam.embedding != self.adam.head:
            raise ConfigError(
                f"adam.embedding must be as adam.head, {self.adam.head}, while model.tied_head is "
                "True: they learn as one."
            )
        for stage in range(len(self.stages)):
            self.schedule.model(self.model, stage).check()
            self.schedule.used(self.model, stage).check()

    @property
    def schedule(self) -> Schedule:
        """What holds at each step."""
        return Schedule(**{each.name: getattr(self, each.name) for each in fields(Schedule)})


PRESETS = {
    # GPT-2 small's size with the recipe of modded-nanogpt's record of 2026-01-19.
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
        mlp_out_factor=1.0,
        weight_decay=0.0,
        momentum_warmup_steps=500,
        momentum_cooldown_steps=0,
        neuron_decay=None,
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
        mlp_out_factor=1.0,
        weight_decay=0.0,
        momentum=0.9,
        momentum_warmup_steps=50,
        momentum_cooldown_steps=0,
        adam_every=1,
        adam=AdamGroups.alike(tables=0.15, head=0.008, others=0.04, betas=(0.7, 0.95)),
        hold_fraction=0.0,
        cooldown_fraction=0.5,
        final_learning_rate_factor=0.0,
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


# The larger sizes of GPT-2, as `baseline` trains the smallest, for once through FineWeb10B: 10
# billion tokens, as many as llm.c trains its GPT-2s on.
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
    override = partial(tyro.cli, Hyperparameters, args=arguments)
    given = override()  # a misspelt argument ends here
    try:
        with Interruption() as interruption:
            join_others(given)
            hp = settings(given, PRESETS, lambda start: override(default=start))
            hp.check()
            status = train(with_own_text(hp), interruption)
            from nanogpt.devices.processes import wait_for_others

            wait_for_others()
            return status
    except (UserError, BadNumbers) as error:
        print(error, file=sys.stderr)
        return leave(3 if isinstance(error, BadNumbers) else 2)


def train(hp: Hyperparameters, interruption: Interruption) -> int:
    """Train a model as `hp` says, in a new folder under runs/ or a resumed one; the exit status."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # JAX's own default is 0.75
    from nanogpt.data.prefetch import prefetch
    from nanogpt.devices.accelerator import use_device
    from nanogpt.devices.compilation import use_compilation_cache
    from nanogpt.devices.mesh import make_mesh
    from nanogpt.inference.weights import with_weights
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
        Checkpoints(run.folder, hp.keep_checkpoints, run.say) as checkpoints,
        Trace(run.folder / "profile", steps_of(hp.profile, 1, hp.num_steps), run.say) as trace,
    ):
        # Open the run, at its first step or after its newest good checkpoint.
        start = where_to_begin(plan, run.folder, run.say)
        if start.first_record > hp.num_steps:
            return session.nothing_left(run, plan)
        progress = session.begin(run, plan, start)

        # Compile and try everything, before the clock starts.
        programs = prepare_programs(plan, mesh, inputs, start, run.console, run.say)
        plan, state = programs.plan, programs.first_state(start)
        if hp.init_from and not start.checkpoint:
            state = with_weights(state, Path(hp.init_from), mesh)
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
                if plan.saves(step):
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
            run.say(f"interrupted: go on with --resume {run.folder}")
            return session.interrupted(run, interruption)
        show_result(run, plan, state.params, mesh)
        return 0


def show_result(run: Run, plan: "Plan", params: "Params", mesh: "Mesh") -> None:
    """Draw the loss, where Matplotlib is installed, and let the model write a sample."""
    import jax

    from nanogpt.inference.text import sample
    from nanogpt.report.picture import loss_png

    if find_spec("matplotlib") and jax.process_index() == 0:
        try:
            run.say(f"a picture of the loss is in {loss_png(run.folder)}")
        except (OSError, RunError) as error:
            run.say(f"no picture of the loss: {error}")
    if plan.hp.sample_tokens:
        run.say(sample(plan, params, mesh))


if __name__ == "__main__":
    sys.exit(main())
