"""Weights on disk: every bit comes back, and folders that are no finished runs are told apart."""

import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nanogpt.checkpoint import load_run, save_weights
from nanogpt.config import ConfigError
from nanogpt.mesh import make_mesh
from nanogpt.step import init_params


@pytest.fixture
def params(tiny):
    """Random bits, most of which no computation would give: a copy must keep them all."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(tiny, jax.random.key(0)))
    return jax.tree.map(
        lambda p: jnp.float32(random.uniform(-1, 1, p.shape) * 10.0 ** random.integers(-30, 30)),
        shapes,
    )


def whole_on(mesh):
    return NamedSharding(mesh, PartitionSpec())


@pytest.fixture
def run(tmp_path, tiny, params):
    """The folder of a finished run, as far as this module is concerned."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 5, "model": asdict(tiny)}))
    save_weights(folder, params)
    return folder


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 1), (1, 8), (8, 2)])
def test_weights_come_back_bit_by_bit_on_any_number_of_devices(
    run, params, saved_on, loaded_on, tmp_path
):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text((run / "config.json").read_text())
    save_weights(folder, jax.device_put(params, whole_on(make_mesh(saved_on))))
    mesh = make_mesh(loaded_on)
    _, _, loaded = load_run(folder, mesh)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert (after.dtype, after.shape) == (np.float32, before.shape)
        assert np.asarray(after).tobytes() == np.asarray(before).tobytes()
        assert after.sharding.is_equivalent_to(whole_on(mesh), after.ndim)


def test_a_loaded_run_is_the_model_that_was_configured(run, tiny, params):
    hp, graph, loaded = load_run(run, make_mesh(1))
    assert hp["seed"] == 5
    model = nnx.merge(graph, loaded)
    assert model.config == tiny  # in JSON its tuple of windows was a list
    np.testing.assert_array_equal(model.embed[...], params["embed"])
    np.testing.assert_array_equal(model.blocks.mlp.up[...], params["blocks"]["mlp"]["up"])


def test_weights_are_found_from_a_relative_path(run, params, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    _, _, loaded = load_run(run.relative_to(run.parent.parent), make_mesh(1))
    np.testing.assert_array_equal(loaded["embed"], params["embed"])


def no_folder(run):
    (run / "config.json").rename(run.parent / "config.json")


def unfinished(run):
    (run / "weights").rename(run / "elsewhere")


def config_of_another_program(run):
    (run / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')


def config_cut_short(run):
    (run / "config.json").write_text('{"model": ')


def weights_of_another_program(run):
    unfinished(run)
    (run / "weights").mkdir()
    (run / "weights" / "pytorch_model.bin").write_bytes(b"\x80")


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (no_folder, "no config.json"),
        (unfinished, "no weights"),
        (config_of_another_program, "config.json"),
        (config_cut_short, "config.json"),
        (weights_of_another_program, "weights"),
    ],
)
def test_a_folder_that_is_not_a_finished_runs_is_told_in_one_sentence(run, harm, what):
    harm(run)
    with pytest.raises(ConfigError, match=what) as refusal:
        load_run(run, make_mesh(1))
    assert str(run) in str(refusal.value)
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)
