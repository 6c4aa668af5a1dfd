"""Trained weights: of a run or an exported model, to use as they are or to begin a run with."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx, traverse_util
from jax.sharding import Mesh
from safetensors import safe_open

from nanogpt.config import ConfigError, GPTConfig, from_json
from nanogpt.devices.mesh import REPLICATED, put, shapes_on
from nanogpt.inference.export import ARRAYS, is_exported, model_in
from nanogpt.schedule import Schedule, Stage, stages_from_json
from nanogpt.training.checkpoint import Checkpoint, load_params, newest_checkpoint
from nanogpt.training.resume import saved_settings
from nanogpt.training.step import Params, graph_of, init_params

Settings = TypeVar("Settings")  # train_gpt.Hyperparameters

# What weights bind whoever begins with them: the settings on which their shapes depend, or their
# meaning. The vocabulary counts as padded, and of mlp_only and backout how many layers they name.
BOUND = {
    "tokenizer": lambda hp: hp.tokenizer,
    "model.vocab_size": lambda hp: hp.model.padded_vocab_size,
    "model.num_layers": lambda hp: hp.model.num_layers,
    "model.num_heads": lambda hp: hp.model.num_heads,
    "model.width": lambda hp: hp.model.width,
    "model.mlp_width": lambda hp: hp.model.mlp_width,
    "model.mlp_only": lambda hp: hp.model.num_attentions,
    "model.value_embeddings": lambda hp: hp.model.value_embeddings,
    "model.bigram_buckets": lambda hp: hp.model.bigram_buckets,
    "model.smear": lambda hp: hp.model.smear,
    "model.attention_gate": lambda hp: hp.model.attention_gate,
    "model.backout": lambda hp: hp.model.backout is None,
}


def load_run(run: Path, mesh: Mesh) -> tuple[dict[str, Any], nnx.GraphDef, Params, Checkpoint]:
    """The hyperparameters of a run, its model, its newest weights, and whence these come.

    The weights are whole on every device; the model is that of the stage in which they were saved.

    Raises ConfigError when the folder is not that of a run with a checkpoint.
    """
    if is_exported(run):
        raise ConfigError(
            f"{run} is an exported model, not a run: name the run that it comes from."
        )
    if not (run / "config.json").exists():
        raise ConfigError(
            f"{run} is not the folder of a run: it has no config.json; give one that train_gpt.py "
            "made, such as runs/<name>."
        )
    try:
        hp = json.loads((run / "config.json").read_text(encoding="utf-8"))
        whole = from_json(GPTConfig, hp["model"])
        named = {field.name: hp[field.name] for field in fields(Schedule)}
        schedule = Schedule(**named | {"stages": stages_from_json(hp["stages"])})
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            f"{run / 'config.json'} is not what train_gpt.py wrote ({type(error).__name__}: "
            f"{error}): restore it, or name another run."
        ) from error
    checkpoint = newest_checkpoint(run, lambda line: print(line, file=sys.stderr))
    config = schedule.model(whole, schedule.stage(min(checkpoint.step, schedule.num_steps)))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = load_params(checkpoint, shapes_on(mesh, REPLICATED, shapes))
    return hp, graph_of(config), params, checkpoint


def load_model(folder: Path, mesh: Mesh) -> tuple[dict[str, Any], nnx.GraphDef, Params]:
    """Settings, model and weights, whole on every device: of an exported folder, or of a run.

    The settings have at least tokenizer, sequence_length, dtype and model; a run's are all its
    hyperparameters, and its weights the newest (see `nanogpt.inference.weights.load_run`).

    Raises ConfigError when the folder holds neither, or is damaged.
    """
    if not is_exported(folder):
        return load_run(folder, mesh)[:3]
    settings, model = model_in(folder)
    params = {}
    with safe_open(folder / ARRAYS, "numpy") as file:
        for name in file.offset_keys():  # one by one: host memory need not hold them all
            array = file.get_tensor(name)
            params[name] = put(mesh, REPLICATED, array.shape, array.__getitem__)
    return settings, graph_of(model), traverse_util.unflatten_dict(params, sep=".")


class Weights(NamedTuple):
    """What a run can begin with instead of random numbers, and what binds it."""

    folder: Path
    settings: Any | None  # of the run that made them; an exported folder does not tell
    model: GPTConfig  # as they were trained last
    tokenizer: str
    sequence_length: int


def weights_in(kind: type[Settings], folder: Path) -> Weights:
    """What `--init-from` names: a run's newest weights, or an exported folder's; none are read.

    Raises ConfigError if there are none.
    """
    if is_exported(folder):
        settings, model = model_in(folder)
        return Weights(folder, None, model, settings["tokenizer"], settings["sequence_length"])
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds no weights to begin with: it has neither a run's config.json nor an "
            "exported model."
        )
    saved = saved_settings(kind, folder / "config.json")
    step = newest_checkpoint(folder, lambda line: print(line, file=sys.stderr)).step
    stage = saved.schedule.stage(min(step, saved.num_steps))
    model = saved.schedule.model(saved.model, stage)
    return Weights(folder, saved, model, saved.tokenizer, saved.sequence_length)


def settings_with(
    weights: Weights, start: Settings, override: Callable[[Settings], Settings]
) -> Settings:
    """The settings of a run that begins with these weights: those of `start`, overridden.

    The model is that of the weights, and one stage takes the place of all. Raises ConfigError if
    `override` asks for a model or a tokenizer that the weights do not fit.
    """
    # At the full rates: when the laptop's model of Python went on with 2 MB of English, lower ones
    # left the loss higher after 150 steps, 1.39 at 0.3 times the rates and 1.50 at 0.1, not 1.34.
    # With so little text that it is read five times, they were better.
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
                f"{has}; leave it so, or begin without --init-from."
            )
    return after
