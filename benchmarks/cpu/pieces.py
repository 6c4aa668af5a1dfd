"""The pieces of the recipe, each as what takes it out, and the small runs that lose it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.cpu.proxy_runs import Change, on_bytes
from nanogpt.config import Adam, AdamGroups, GPTConfig
from nanogpt.schedule import Schedule, Stage
from train_gpt import PRESETS, Hyperparameters

# The speedrun on bytes, at a size of which a CPU core trains one in a minute or two.
CPU = on_bytes(
    "speedrun",
    {
        "num_layers": 4,
        "num_heads": 2,
        "width": 128,
        "mlp_width": 512,
        "mlp_only": (2,),
        "key_offset": (3,),
        "paired_heads": (0,),
        "skips": ((1, 2),),
        "backout": 2,
        "value_embeddings": 2,
        "bigram_buckets": 16384,
        "document_separator": 255,
    },
    max_document_length=None,  # most of its documents are longer than its rows
    total_batch_size=3072,
    num_steps=300,
    stages=(
        Stage(1, 1 / 3, 1.0, 1.00, (16, 16, 16, 48), target_weights=(1.0, 0.5, 0.25)),
        Stage(1, 2 / 3, 1.0, 1.52, (32, 32, 32, 96), target_weights=(1.0, 0.5)),
        Stage(1, 1.0, 1.0, 1.73, (32, 32, 32, 128), split_head=True),
    ),
    adam=replace(AdamGroups(), tables=Adam(0.15, (0.75, 0.95), 0.025)),
    val_tokens=262_144,
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
    device="gpu",
    model=replace(
        PRESETS["speedrun"].model,
        num_heads=2,
        width=256,
        mlp_width=1024,
        bigram_buckets=50304,
    ),
)

JORDAN = (3.4445, -4.7750, 2.0315)  # the fixed Newton-Schulz step that Muon had at first


def adam(**betas_or_decay: Any) -> Callable[[Hyperparameters], Hyperparameters]:
    """A piece of Adam, left out by these values in all of its groups."""

    def without(hp: Hyperparameters) -> Hyperparameters:
        groups = {name: replace(how, **betas_or_decay) for name, how in vars(hp.adam).items()}
        return replace(hp, adam=AdamGroups(**groups))

    return without


def untied(hp: Hyperparameters) -> Hyperparameters:
    """Embedding and head as they were before: each by itself, with a rate of its own."""
    groups = replace(hp.adam, embedding=hp.adam.tables)
    return replace(hp, adam=groups, model=replace(hp.model, tied_head=False))


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
    import nanogpt.optim.muon

    nanogpt.optim.muon.POLAR_EXPRESS = (JORDAN,) * 5


PIECES: dict[str, Callable[[Hyperparameters], Hyperparameters]] = {
    "value embeddings (but value residual)": model(value_embeddings=0),
    "gates of value embeddings": model(value_gate=False),
    "bigram embedding": model(bigram_buckets=0),
    "one gated skip (but a U-net's)": model(skips=None),
    "residual share of 1.1": model(residual_init=1.0),
    "tied head": untied,
    "attention within documents": model(document_separator=None),
    "half of each head rotated": model(rope_fraction=1.0),
    "attention scale of 0.1": lambda hp: model(attention_scale=hp.model.head_size**-0.5)(hp),
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
    "batch schedule": lambda hp: each_stage(hp, batch=2 / 3, rate=1.52),  # the middle one's
    "NorMuon": lambda hp: replace(hp, neuron_decay=None),
    "cautious weight decay": lambda hp: replace(hp, weight_decay=0.0),
    "cautious weight decay in Adam": adam(weight_decay=0.0),
    "Adam at every second step": lambda hp: replace(hp, adam_every=1),
    "slow means of coefficients": adam(betas=(0.65, 0.95)),
    "rate of matrices out of MLPs": lambda hp: replace(hp, mlp_out_factor=1.0),
    "learning-rate floor": lambda hp: replace(hp, final_learning_rate_factor=0.0),
}

# Pieces that are no settings: what takes them out of the process that calls it.
BUILT_IN: dict[str, Change] = {
    "YaRN": without_yarn,
    "Polar Express": without_polar_express,
}
