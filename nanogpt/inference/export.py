"""A trained model outside its run: a folder in open formats, which need nothing of this project.

    model.safetensors   the parameters, float32, named as in the model, such as attention.qkv
    config.json         what is needed to use them, and where they come from
    MODEL.md            what each array is, and how they make logits; see model_note.py

Safetensors is a JSON header and the numbers, no code.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanogpt.checks import ConfigError
from nanogpt.config import GPTConfig, ModelSettings
from nanogpt.files import found_in, read_json
from nanogpt.training.resume import refuse_earlier_version
from nanogpt.training.step import Params, init_params

ARRAYS, CONFIG, NOTE = "model.safetensors", "config.json", "MODEL.md"
EXPORT_AGAIN = "export the run again"


def save_model(
    folder: Path, model: GPTConfig, params: Params, settings: Mapping[str, Any], note: str
) -> None:
    """Write an exported model into a folder, which appears whole or not at all.

    Args:
        folder: must not exist, or be empty.
        settings: tokenizer, sequence_length, dtype, and whatever else JSON can hold.
        note: text of MODEL.md.

    Raises ConfigError when the folder is taken or cannot be written.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already and is not an empty folder: choose another.")
    # Contiguous, for save_file writes an array's memory as it lies.
    arrays = {name: np.asarray(a, order="C") for name, a in named(params).items()}
    config = {**settings, "model": asdict(model)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            whole = Path(temporary) / "model"
            whole.mkdir()
            (whole / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (whole / NOTE).write_text(note, encoding="utf-8")
            save_file(arrays, whole / ARRAYS, metadata={"format": "jax-flax-nanogpt"})
            shutil.copymode(whole / CONFIG, whole / ARRAYS)  # it was made for its owner only
            os.replace(whole, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{folder} cannot be written ({reason}): make room there, or choose another."
        ) from error


def is_exported(folder: Path) -> bool:
    """Whether this is the folder of an exported model rather than of a run."""
    return os.path.exists(folder / ARRAYS)


def model_in(folder: Path) -> ModelSettings:
    """The settings of an exported folder, whose arrays are those of their model.

    Only the header of model.safetensors is read. Raises ConfigError if a file is damaged, or names
    the array that does not fit.
    """
    refuse_earlier_version(folder / CONFIG)
    settings = read_json(folder / CONFIG, ModelSettings, EXPORT_AGAIN, others=True)
    with found_in(folder / CONFIG, EXPORT_AGAIN):
        settings.model.check()
    wanted = shapes_of(settings.model)
    try:
        with safe_open(folder / ARRAYS, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            found = {name: f"{s.get_dtype()}{s.get_shape()}" for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{folder / ARRAYS} is damaged ({error}): {EXPORT_AGAIN}.") from error
    if different := found.items() ^ wanted.items():
        name, _ = min(different)
        raise ConfigError(
            f"{folder / ARRAYS} is not of the model in {CONFIG}, which has "
            f"{wanted.get(name, 'nothing')} as {name} where it has {found.get(name, 'nothing')}: "
            f"{EXPORT_AGAIN}."
        )
    return settings


def named(params: Params) -> dict[str, jax.Array]:
    """The arrays of nested dicts by their path, with dots."""
    return dict(traverse_util.flatten_dict(params, sep="."))


def shapes_of(model: GPTConfig) -> dict[str, str]:
    """Type and shape of each array of a model, as safetensors writes them."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return {name: f"F32{list(a.shape)}" for name, a in named(shapes).items()}
