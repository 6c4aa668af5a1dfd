"""Trained weights, of a run or an exported model, to use or to start a run from."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Required, TypedDict

import numpy as np

from nanogpt.checks import ConfigError, Count, Positive, Total
from nanogpt.config import GPTConfig, ModelSettings
from nanogpt.files import found_in, read_json
from nanogpt.inference.hub import folder_of
from nanogpt.schedule import Schedule, Stage
from nanogpt.training.resume import (
    RESTORE,
    Settings,
    refuse_earlier_version,
    saved_settings,
)

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

    from nanogpt.training.checkpoint import Checkpoint
    from nanogpt.training.step import Params, TrainState
    from train_gpt import Hyperparameters

# JAX, and what imports it, is imported in the functions that need it: train_gpt.py parses its
# arguments first.


def early_and_late(model: GPTConfig, named: tuple[int, ...]) -> tuple[int, int] | None:
    """Return how many layers of a setting have gates chosen early, and how many late."""
    if not model.dynamic:
        return None
    layers = model.layers(named) - model.layers(model.mlp_only)
    early = sum(layer < model.late_gates_from for layer in layers)
    return early, len(layers) - early


# Settings that a run takes over from the weights it starts from, because shapes or meaning of the
# weights depend on them. vocab_size is compared after padding, and settings that name layers only
# by what they do to shapes: three of them, in this order, decide on the number of value gates.
BOUND = {
    "tokenizer": lambda hp: hp.tokenizer,
    "model.vocab_size": lambda hp: hp.model.padded_vocab_size,
    "model.num_layers": lambda hp: hp.model.num_layers,
    "model.num_heads": lambda hp: hp.model.num_heads,
    "model.width": lambda hp: hp.model.width,
    "model.mlp_width": lambda hp: hp.model.mlp_width,
    "model.value_embeddings": lambda hp: hp.model.value_embeddings,
    "model.value_gate": lambda hp: hp.model.value_gate,
    "model.dynamic": lambda hp: hp.model.dynamic,
    "model.attention_source": lambda hp: (
        hp.model.attention_source is None or (hp.model.dynamic and hp.model.late_gates_from)
    ),
    "model.value_layers": lambda hp: hp.model.value_layers and (len(hp.model.gated_values),),
    "model.mlp_only": lambda hp: (
        *(len(hp.model.gated_values), hp.model.num_attentions),
        early_and_late(hp.model, (*range(hp.model.num_layers),)),
    ),
    "model.skips": lambda hp: (
        *(hp.model.skips is None, len(hp.model.skip_pairs)),
        hp.model.dynamic and sum(b < hp.model.late_gates_from for _, b in hp.model.skips or ()),
    ),
    "model.bigram_buckets": lambda hp: hp.model.bigram_buckets,
    "model.bigram_width": lambda hp: hp.model.bigram_buckets and hp.model.bigram_width,
    "model.smear": lambda hp: hp.model.smear,
    "model.attention_gate": lambda hp: hp.model.attention_gate,
    "model.exclusive": lambda hp: early_and_late(hp.model, hp.model.exclusive),
    "model.gated": lambda hp: early_and_late(hp.model, hp.model.gated),
    "model.composed": lambda hp: early_and_late(hp.model, hp.model.composed),
    "model.backout": lambda hp: hp.model.backout is None,
}


@dataclass(frozen=True)
class RunSettings(ModelSettings):
    """The hyperparameters of a run that are used after training."""

    val_files: str | None
    val_tokens: Positive
    canonical_masking: bool = False  # which runs before 2026-11-29 do not have


class Origin(TypedDict, total=False):
    """Where weights come from, as far as known."""

    run: str
    step: Required[Count]
    tokens: Total
    commit: str
    val_loss: float


class Commit(TypedDict):
    """The fields of run.json that are read."""

    commit: str


Exported = TypedDict("Exported", {"from": Origin})  # fields of an exported config.json


def load_run(folder: Path, mesh: "Mesh") -> "tuple[RunSettings, nnx.GraphDef, Params, Checkpoint]":
    """Load a run: its settings, its model, its weights, and the checkpoint they come from.

    That is the newest, unless the folder is a checkpoint: runs/<name>/checkpoints/<step>. The
    weights are replicated on all devices; the model is that of the stage they were saved in.

    Raises ConfigError if the folder is not that of a run with a checkpoint.
    """

    from nanogpt.devices.mesh import REPLICATED, shapes_on
    from nanogpt.inference.export import is_exported
    from nanogpt.training.checkpoint import checkpoint_in, load_params, run_of
    from nanogpt.training.step import graph_of, param_shapes

    if is_exported(folder):
        raise ConfigError(
            f"{folder} is an exported model, not a run: give the run that it comes from."
        )
    run = run_of(folder)
    config = run / "config.json"
    if not os.path.exists(config):
        reason = "it has no config.json" if os.path.exists(run) else "it does not exist"
        raise ConfigError(
            f"{run} is not a run folder: {reason}; give a folder that train_gpt.py created, such "
            "as runs/<name>."
        )
    refuse_earlier_version(config)
    hp = read_json(config, RunSettings, RESTORE, others=True)
    schedule = schedule_in(run)
    checkpoint = checkpoint_in(folder, lambda line: print(line, file=sys.stderr))
    model = schedule.used(hp.model, schedule.stage(min(checkpoint.step, schedule.num_steps)))
    with found_in(config, RESTORE):
        model.check()
    shapes = param_shapes(model)
    params = load_params(checkpoint, shapes_on(mesh, REPLICATED, shapes))
    return hp, graph_of(model), params, checkpoint


def origin_of(checkpoint: "Checkpoint") -> Origin:
    """Return the run and step of a checkpoint, and its commit and validation loss if known."""
    from nanogpt.training.checkpoint import run_of
    from nanogpt.training.records import validation_losses

    run, step = run_of(checkpoint.folder), checkpoint.step
    origin = Origin(run=run.resolve().name, step=step, tokens=checkpoint.facts["tokens"])
    with suppress(ConfigError):
        origin["commit"] = read_json(run / "run.json", Commit, "", others=True)["commit"]
    if (val_loss := validation_losses(run).get(step)) is not None:
        origin["val_loss"] = val_loss
    return origin


def with_weights(state: "TrainState", name: str, mesh: "Mesh") -> "TrainState":
    """Return the state with the weights given by `--init-from`, sharded as its own were."""
    import jax

    weights = load_model(folder_of(name), mesh)[2]
    places = jax.tree.map(lambda p: p.sharding, state.params)
    return replace(state, params=jax.device_put(weights, places))


def schedule_in(run: Path) -> Schedule:
    """Read the schedule in a run's config.json; raises ConfigError if it is invalid."""
    schedule = read_json(run / "config.json", Schedule, RESTORE, others=True)
    with found_in(run / "config.json", RESTORE):
        schedule.check()
    return schedule


def load_model(folder: Path, mesh: "Mesh") -> "tuple[ModelSettings, nnx.GraphDef, Params, Origin]":
    """Load an exported folder, a run or a checkpoint: settings, model, weights and their origin.

    The weights are replicated on all devices; a run's are its newest (see `load_run`).

    Raises ConfigError if the folder is none of these, or is damaged.
    """
    from flax import traverse_util
    from safetensors import safe_open

    from nanogpt.devices.mesh import REPLICATED, put
    from nanogpt.inference.export import CONFIG, array_files, is_exported, model_in
    from nanogpt.inference.huggingface import EXPORT_AGAIN
    from nanogpt.training.step import graph_of

    if not is_exported(folder):
        settings, graph, params, checkpoint = load_run(folder, mesh)
        return settings, graph, params, origin_of(checkpoint)
    settings = model_in(folder)
    origin = read_json(folder / CONFIG, Exported, EXPORT_AGAIN, others=True)["from"]
    params = {}
    for path in array_files(folder):
        with safe_open(path, "numpy") as file:
            for name in file.offset_keys():  # one at a time: all may not fit into host memory
                array = file.get_tensor(name).astype(np.float32, copy=False)
                if not np.isfinite(array).all():
                    raise ConfigError(f"{path}: {name} has values that are not finite numbers.")
                params[name] = put(mesh, REPLICATED, array.shape, array.__getitem__)
    params = traverse_util.unflatten_dict(params, sep=".")
    return settings, graph_of(settings.model), params, origin


class Weights(NamedTuple):
    """Weights that a run can start from, and the settings that it takes over with them."""

    folder: Path
    settings: "Hyperparameters | None"  # of the run that trained them; None for an exported model
    model: GPTConfig  # of the stage they were saved in
    tokenizer: str
    sequence_length: int


def weights_in(kind: type[Settings], name: str) -> Weights:
    """Return the weights given by `--init-from`, of a run or an exported model, without loading.

    Raises ConfigError if there are none.
    """
    from nanogpt.inference.export import is_exported, model_in
    from nanogpt.training.checkpoint import checkpoint_in, run_of

    folder = folder_of(name)
    if is_exported(folder):
        told = model_in(folder)
        return Weights(folder, None, told.model, told.tokenizer, told.sequence_length)
    config = run_of(folder) / "config.json"
    if not os.path.isfile(config):
        raise ConfigError(
            f"{folder} has no weights to start from: it has neither a run's config.json nor an "
            "exported model."
        )
    saved = saved_settings(kind, config)
    step = checkpoint_in(folder, lambda line: print(line, file=sys.stderr)).step
    stage = saved.schedule.stage(min(step, saved.num_steps))
    model = saved.schedule.used(saved.model, stage)
    return Weights(folder, saved, model, saved.tokenizer, saved.sequence_length)


def settings_with(
    weights: Weights, start: Settings, override: Callable[[Settings], Settings]
) -> Settings:
    """Return the settings of a run that starts from these weights: those of `start`, overridden.

    The model is that of the weights, and a single stage replaces all others. Raises ConfigError if
    `override` asks for a model or a tokenizer that does not match the weights.
    """
    # With the full learning rates: when the laptop preset's model of Python was trained further on
    # 2 MB of English, lower rates gave higher losses after 150 steps, 1.39 at 0.3 times the rates
    # and 1.50 at 0.1 times, instead of 1.34. On a text small enough for five epochs, lower rates
    # were better.
    before = replace(
        start,
        model=weights.model,
        tokenizer=weights.tokenizer,
        sequence_length=weights.sequence_length,
        stages=(Stage(),),
        run_name="",
    )
    after = override(before)
    for name, bound in BOUND.items():
        if bound(after) != bound(before):
            has, asked = attrgetter(name)(before), attrgetter(name)(after)
            raise ConfigError(
                f"{name} cannot be {asked}: the weights in {weights.folder} were trained with "
                f"{has}; leave it unchanged, or start without --init-from."
            )
    if after.model.tied_head and not before.model.tied_head:
        raise ConfigError(
            f"model.tied_head cannot be True: embedding and head in {weights.folder} were trained "
            "untied; leave it unchanged, or start without --init-from."
        )
    return after
