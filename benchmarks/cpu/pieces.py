"""The pieces of the recipe, with functions that remove or add them, and the runs to test them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.cpu.proxy_runs import Change
from nanogpt.adam import Adam, AdamGroups
from nanogpt.config import GPTConfig
from nanogpt.schedule import Schedule, Stage
from train_gpt import PRESETS, Hyperparameters

# The laptop preset, in 300 of its 1,000 steps.
CPU = replace(
    PRESETS["laptop"],
    num_steps=300,
    val_loss_every=0,
    sample_tokens=0,
    checkpoint_every=0,
    device="cpu",
)

# The speedrun for a GPU: its depth, with matrices a ninth of the size.
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
        bigram_buckets=3 * 50304,
        bigram_width=256,
    ),
)

JORDAN = (3.4445, -4.7750, 2.0315)  # the Newton-Schulz coefficients of the original Muon


def each_stage(hp: Hyperparameters, **changes: Any) -> Hyperparameters:
    """Return the settings with the same change in each stage."""
    return replace(hp, stages=tuple(replace(stage, **changes) for stage in hp.stages))


def model(**changes: Any) -> Callable[[Hyperparameters], Hyperparameters]:
    """Return a function that changes settings of the model."""
    return lambda hp: replace(hp, model=replace(hp.model, **changes))


def half_batch(hp: Hyperparameters) -> Hyperparameters:
    """Use half the batch for the first half of the tokens."""
    two = (Stage(2.0, batch=0.5, rate=0.7), Stage(1.0))
    return replace(hp, stages=two, num_steps=hp.num_steps * 3 // 2)


def tied(hp: Hyperparameters) -> Hyperparameters:
    """Tie embedding and head for two thirds of the run."""
    two = (Stage(2.0), Stage(1.0, split_head=True))
    adam = replace(hp.adam, embedding=hp.adam.head)
    return replace(hp, adam=adam, stages=two, model=replace(hp.model, tied_head=True))


def dynamic(**changes: Any) -> Callable[[Hyperparameters], Hyperparameters]:
    """Return a function that adds dynamic connections and, with `changes`, what needs them."""
    # As in the speedrun, a quarter of the head's rate for the connections, a tenth for the gates.
    slow = {
        **dict.fromkeys(("connections", "connection_biases"), 1 / 4),
        **dict.fromkeys(("dynamic_gates", "dynamic_gate_biases"), 1 / 10),
    }

    def add(hp: Hyperparameters) -> Hyperparameters:
        rates = {name: Adam(share * hp.adam.head.learning_rate) for name, share in slow.items()}
        how = {"dynamic": True, "attention_source": hp.model.num_layers - 2} | changes
        return replace(hp, adam=replace(hp.adam, **rates), model=replace(hp.model, **how))

    return add


def untied(hp: Hyperparameters) -> Hyperparameters:
    """Untie embedding and head, with the embedding trained like the other tables."""
    adam = replace(hp.adam, embedding=hp.adam.tables)
    return replace(hp, adam=adam, model=replace(hp.model, tied_head=False))


def with_adam_decay(hp: Hyperparameters) -> Hyperparameters:
    """Add the speedrun's weight decay to all of Adam's groups."""
    decays = {name: how.weight_decay for name, how in vars(AdamGroups()).items()}
    groups = vars(hp.adam).items()
    groups = {name: replace(how, weight_decay=decays[name]) for name, how in groups}
    return replace(hp, adam=AdamGroups(**groups))


def without_adam_decay(hp: Hyperparameters) -> Hyperparameters:
    """Remove weight decay from all of Adam's groups."""
    groups = {name: replace(how, weight_decay=0.0) for name, how in vars(hp.adam).items()}
    return replace(hp, adam=AdamGroups(**groups))


def middle_batch(hp: Hyperparameters) -> Hyperparameters:
    """Use batch and rate of the second stage throughout, for the same number of tokens."""
    second = hp.stages[:2][-1]
    batch, rate = second.batch, second.rate
    steps = round(hp.schedule.tokens(hp.num_steps) / (batch * hp.total_batch_size))
    return replace(each_stage(hp, batch=batch, rate=rate), num_steps=steps)


def without_yarn() -> None:
    """Do not adapt rotations when windows grow."""

    def windows_only(self: Schedule, config: GPTConfig, stage: int) -> GPTConfig:
        return replace(config, windows=self.stages[stage].windows)

    Schedule.model = windows_only


def without_polar_express() -> None:
    """Use five of the original Newton-Schulz steps instead of Polar Express."""
    import nanogpt.optim.muon

    nanogpt.optim.muon.POLAR_EXPRESS = (JORDAN,) * 5


def without_out_share() -> None:
    """Remove the learned scale on the output of each attention."""
    from nanogpt.model.gpt import Attention

    whole = Attention.__init__

    def init(self: Attention, *arguments: Any, **named: Any) -> None:
        whole(self, *arguments, **named)
        del self.out_share

    Attention.__init__ = init


# What each piece is without; a proxy that does not have it stays the same.
PIECES: dict[str, Callable[[Hyperparameters], Hyperparameters]] = {
    "value embeddings (but value residual)": model(value_embeddings=0, value_layers=()),
    "value tables of their own (but shared ones)": model(value_layers=()),
    "value gates (but one share per layer)": model(value_gate=False),
    "bigram table": model(bigram_buckets=0),
    "signs of bigrams": model(bigram_width=None),
    "skips": model(skips=()),
    "skips (but a U-net)": model(skips=None),
    "residual share of 1.1": model(residual_init=1.0),
    "output matrices of attentions that are not zero at first": model(attention_out_init=0.0),
    "attention gate": model(attention_gate=False),
    "exclusive attention": model(exclusive=()),
    "gated attention": model(gated=()),
    "composed heads": model(composed=()),
    "dynamic connections and all gates (but backout)": lambda hp: model(
        dynamic=False, exclusive=(), gated=(), composed=(), backout=hp.model.attention_source
    )(hp),
    "one source of late attentions": lambda hp: model(
        attention_source=hp.model.attention_source and hp.model.num_layers - 2
    )(hp),
    "half of each head rotated": model(rope_fraction=1.0),
    "attention scale (but 1 / sqrt(H))": lambda hp: model(attention_scale=hp.model.head_size**-0.5)(
        hp
    ),
    "smear": model(smear=False),
    "MLP-only layer": model(mlp_only=()),
    "key offset": model(key_offset=()),
    "paired heads": model(paired_heads=()),
    "document mask": model(document_separator=None),
    "tied head": untied,
    "split of the tied head": lambda hp: each_stage(hp, split_head=False),
    "logit rescale": model(softcap=15.0, logit_scale=1.0, logit_shift=0.0),
    "several targets": lambda hp: each_stage(hp, target_weights=(1.0,)),
    "shorter documents at first": lambda hp: each_stage(hp, max_document_length=None),
    "aligned rows": lambda hp: replace(hp, max_document_length=None),
    "window schedule": lambda hp: each_stage(hp, windows=hp.stages[-1].windows),
    "windows": lambda hp: each_stage(hp, windows=None, validation_windows=None),
    "longer windows in use": lambda hp: each_stage(hp, validation_windows=None),
    "batch schedule": middle_batch,
    "NorMuon": lambda hp: replace(hp, neuron_decay=None),
    "Muon by pairs of heads": lambda hp: replace(hp, heads_together=None),
    "faster matrices out of MLPs": lambda hp: replace(hp, mlp_out_factor=1.0),
    "cautious decay in Muon": lambda hp: replace(hp, weight_decay=0.0),
    "cautious decay in Adam": without_adam_decay,
    "Adam every second step": lambda hp: replace(hp, adam_every=1),
    "learning-rate floor": lambda hp: replace(hp, final_learning_rate_factor=0.0),
    "hold of the lowest rates": lambda hp: replace(hp, hold_fraction=0.0),
    "fall of the momentum": lambda hp: replace(hp, momentum_cooldown_steps=0),
}

# Pieces of the speedrun that the laptop preset does not have.
ADDITIONS: dict[str, Callable[[Hyperparameters], Hyperparameters]] = {
    "value tables of their own": model(value_layers=(1, 2)),
    "signs of bigrams": lambda hp: model(bigram_width=hp.model.width)(hp),
    "residual share of 1.1": model(residual_init=1.1),
    "output matrices of attentions that are not zero at first": model(attention_out_init=0.5),
    "head tied for two thirds": tied,
    "dynamic connections": dynamic(),
    "dynamic connections, gated attention": dynamic(gated=(-1,)),
    "dynamic connections, exclusive attention": dynamic(exclusive=(1,)),
    "dynamic connections, composed heads": dynamic(composed=(1,), composed_window=32),
    "backout": model(backout=1),
    "faster matrices out of MLPs": lambda hp: replace(hp, mlp_out_factor=2.0),
    "Muon head by head": lambda hp: replace(hp, heads_together=1),
    "cautious decay in Muon": lambda hp: replace(hp, weight_decay=1.2),
    "cautious decay in Adam": with_adam_decay,
    "Adam every second step": lambda hp: replace(hp, adam_every=2),
    "learning-rate floor": lambda hp: replace(hp, final_learning_rate_factor=0.15),
    "fall of the momentum": lambda hp: replace(hp, momentum_cooldown_steps=50),
    "half the batch at first": half_batch,
    "several targets": lambda hp: replace(hp, stages=(Stage(target_weights=(1.0, 0.5)), Stage())),
}

# Pieces that are not settings, with functions that remove them from the current process.
BUILT_IN: dict[str, Change] = {
    "YaRN": without_yarn,
    "Polar Express": without_polar_express,
    "share of what attentions add": without_out_share,
}
