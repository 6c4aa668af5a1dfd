"""Exported models: folders in open formats that can be used without this project.

    model.safetensors   the parameters, float32, named as in the model, e.g. attention.qkv
    config.json         the settings needed to use them, and where they come from
    MODEL.md            what each array is, and how to compute logits from them; see model_note.py
    and others          files for Hugging Face's libraries; see huggingface.py

A safetensors file is a JSON header and the numbers, no code. Models saved again by those libraries
can be read too: in several files, listed in model.safetensors.index.json, and in bfloat16.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from errno import ENOSPC
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanogpt.checks import ConfigError
from nanogpt.config import GPTConfig, ModelSettings
from nanogpt.data.find import why_no_file
from nanogpt.files import cannot_write, found_in, read_json
from nanogpt.inference.huggingface import CLASSES, EXPORT_AGAIN, check_kind
from nanogpt.training.resume import refuse_earlier_version
from nanogpt.training.step import Params, param_shapes

ARRAYS, CONFIG, NOTE = "model.safetensors", "config.json", "MODEL.md"
INDEX = f"{ARRAYS}.index.json"
CONFIGURATION = "configuration_nanogpt.py"  # also stays in folders that transformers writes


class Index(TypedDict):
    """The fields of model.safetensors.index.json that are read."""

    weight_map: dict[str, str]  # the file of each array


def save_model(
    folder: Path,
    model: GPTConfig,
    params: Params,
    settings: Mapping[str, Any],
    texts: Mapping[str, str],
) -> None:
    """Write an exported model to a folder, atomically if it is new.

    Args:
        folder: must be new or empty. An empty one stays the same folder, since it may be a mount
            point or somebody's working directory, and gets the arrays last.
        settings: tokenizer, sequence_length, dtype, and any other settings that JSON can hold.
        texts: the contents of all other files, by name.

    Raises ConfigError if the folder is not empty or cannot be written.
    """
    check_free(folder)
    folder = folder.resolve()
    # Contiguous, because save_file writes an array's memory without regard to its strides.
    arrays = {name: np.asarray(a, order="C") for name, a in named(params).items()}
    config = {**settings, "model": asdict(model), **CLASSES}
    texts = {CONFIG: json.dumps(config, indent=2) + "\n", **texts}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside = folder if folder.exists() else folder.parent
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=inside) as temporary:
            whole = Path(temporary) / "model"
            whole.mkdir()
            for name, text in texts.items():
                (whole / name).write_text(text, encoding="utf-8")
            save_file(arrays, whole / ARRAYS, metadata={"format": "pt"})  # transformers insists
            shutil.copymode(whole / CONFIG, whole / ARRAYS)  # save_file lets only the owner read
            if inside == folder:
                for name in (*texts, ARRAYS):
                    os.replace(whole / name, folder / name)
            else:
                os.replace(whole, folder)
    except OSError as error:
        raise ConfigError(cannot_write(folder, error, "choose another folder")) from error
    except SafetensorError as error:  # the folder could be written before the arrays: it is full
        full = OSError(ENOSPC, f"{error}")
        raise ConfigError(cannot_write(folder, full, "choose another folder")) from error


def check_free(folder: Path) -> None:
    """Raise ConfigError unless the folder is new or empty."""
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(
                f"{folder} already exists and is not an empty folder: choose another."
            )
    except OSError as error:  # no permission to look, or too long a name
        reason = error.strerror
        raise ConfigError(f"{folder} cannot be used ({reason}): choose another folder.") from error


def is_exported(folder: Path) -> bool:
    """Return whether a folder is an exported model, complete or not, rather than a run."""
    return any(os.path.exists(folder / name) for name in (ARRAYS, INDEX, CONFIGURATION))


def array_files(folder: Path) -> list[Path]:
    """Return the files with an exported model's arrays; ConfigError if one cannot be read."""
    paths = [folder / ARRAYS]
    if os.path.exists(folder / INDEX) and not os.path.exists(folder / ARRAYS):
        index = read_json(folder / INDEX, Index, EXPORT_AGAIN, others=True)
        paths = [folder / name for name in sorted({*index["weight_map"].values()})]
    for path in paths:
        if path.parent != folder or path.name == "..":
            raise ConfigError(f"{folder / INDEX} has a file outside of its folder: {path}.")
        if not path.is_file():
            raise ConfigError(f"{path} {why_no_file(path) or 'is missing'}: {EXPORT_AGAIN}.")
    return paths


def model_in(folder: Path) -> ModelSettings:
    """Return the settings of an exported model, after checking its arrays against them.

    Only the headers of safetensors files are read. Raises ConfigError if a file is damaged, or if
    an array does not match the settings; the message names it.
    """
    refuse_earlier_version(folder / CONFIG)
    check_kind(str(folder), folder / CONFIG)
    settings = read_json(folder / CONFIG, ModelSettings, EXPORT_AGAIN, others=True)
    with found_in(folder / CONFIG, EXPORT_AGAIN):
        settings.model.check()
    wanted, found = shapes_of(settings.model), {}
    for path in array_files(folder):
        try:
            with safe_open(path, "numpy") as file:
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged ({error}): {EXPORT_AGAIN}.") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error}): {EXPORT_AGAIN}.") from error
        found |= {name: f"{s.get_dtype()}{s.get_shape()}" for name, s in slices.items()}
    alike = {name: array.replace("BF16", "F32") for name, array in found.items()}
    if different := alike.items() ^ wanted.items():
        name, _ = min(different)
        raise ConfigError(
            f"The arrays in {folder} do not match the model in {CONFIG}: {name} is "
            f"{found.get(name, 'missing')}, but should be {wanted.get(name, 'absent')}: "
            f"{EXPORT_AGAIN}."
        )
    return settings


def named(params: Params) -> dict[str, jax.Array]:
    """Flatten nested dicts of arrays; a name is the path to the array, with dots."""
    return dict(traverse_util.flatten_dict(params, sep="."))


def shapes_of(model: GPTConfig) -> dict[str, str]:
    """Return the dtype and shape of each array of a model, in the notation of safetensors."""
    shapes = param_shapes(model)
    return {name: f"F32{list(a.shape)}" for name, a in named(shapes).items()}
