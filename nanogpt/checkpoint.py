"""The weights of a run on disk: a plain nested dict of arrays, written by Orbax."""

import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from nanogpt.config import ConfigError, GPTConfig
from nanogpt.mesh import REPLICATED, shapes_on
from nanogpt.step import Params, graph_of, init_params


def save_weights(run: Path, params: Params) -> None:
    """Write `params` as `run/weights`, which appears whole or not at all."""
    ocp.save(run.resolve() / "weights", params)


def load_run(run: Path, mesh: Mesh) -> tuple[dict[str, Any], nnx.GraphDef, Params]:
    """The hyperparameters of a finished run, its model, and its weights, whole on every device.

    Raises ConfigError when the folder is not that of a finished run.
    """
    for part in ("config.json", "weights"):
        if not (run / part).exists():
            raise ConfigError(
                f"{run} is not the folder of a finished run: it has no {part}; give one that "
                "train_gpt.py made, such as runs/<name>."
            )
    try:
        hp = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config = GPTConfig(**hp["model"] | {"windows": tuple(hp["model"]["windows"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{run / 'config.json'} is not what train_gpt.py wrote ({type(error).__name__}: "
            f"{error}): restore it, or name another run."
        ) from error
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    try:
        params = ocp.load(run.resolve() / "weights", shapes_on(mesh, REPLICATED, shapes))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{run / 'weights'} does not hold the weights of the model in config.json "
            f"({type(error).__name__}): restore it, or name another run."
        ) from error
    return hp, graph_of(config), params
