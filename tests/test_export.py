"""Exported models: the files give the same logits, here and in an independent program."""

import json
import os
import resource
import shutil
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file, save_file

import export
from nanogpt.config import ConfigError, GPTConfig
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference.export import save_model
from nanogpt.inference.weights import load_model, load_run
from nanogpt.training.step import graph_of
from tests.conftest import like_the_speedrun, with_every_trick
from tests.model import test_gpt as test_model

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 21))
SETTINGS = {"tokenizer": "bytes", "sequence_length": 16, "dtype": "float32"}


@pytest.fixture(scope="module")
def run(base):
    return base.folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder that the script writes for a run."""
    out = tmp_path_factory.mktemp("exports") / "new" / "gpt"
    assert export.main([str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(exported, tmp_path / "gpt")


@partial(jax.jit, static_argnums=0)  # one program for two equal models
def logits_of(graph, params):
    return nnx.merge(graph, params)(jnp.asarray(TOKENS))


# The same model


def test_an_exported_run_has_all_that_is_needed_to_use_it(run, exported):
    assert {file.name for file in exported.iterdir()} == {
        *("model.safetensors", "config.json", "MODEL.md", "README.md"),
        *("configuration_nanogpt.py", "modeling_nanogpt.py", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    modes = {file.stat().st_mode & 0o777 for file in exported.iterdir()}
    assert len(modes) == 1  # by the umask, for whoever receives the folder
    hp, graph, params, _ = load_run(run, make_mesh(1))
    settings = json.loads((exported / "config.json").read_text())
    source, model = settings.pop("from"), settings.pop("model")
    for name in settings.pop("auto_map").values():  # which transformers imports
        file, _, kind = name.partition(".")
        assert f"class {kind}(" in (exported / f"{file}.py").read_text()
    assert settings.pop("architectures") == [kind]
    assert settings.pop("model_type") == "nanogpt"
    assert model == json.loads(json.dumps(asdict(nnx.merge(graph, params).config)))
    assert settings == {
        name: getattr(hp, name) for name in ("tokenizer", "sequence_length", "dtype")
    }
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    environment = json.loads((run / "run.json").read_text())
    expected = {name: record[name] for name in ("step", "tokens", "val_loss")}
    assert source == expected | {"run": "base", "commit": environment["commit"]}


@pytest.mark.parametrize("devices", [1, 8])
def test_an_exported_model_has_the_logits_of_its_run_to_the_last_bit(run, exported, devices):
    mesh = make_mesh(devices)
    hp, *model, origin = load_model(run, mesh)
    settings, *same, told = load_model(exported, mesh)
    assert told == origin
    np.testing.assert_array_equal(logits_of(*same), logits_of(*model))
    for one, other in zip(*(jax.tree.leaves_with_path(x[1]) for x in (same, model)), strict=True):
        assert one[0] == other[0]
        assert (one[1].dtype, one[1].sharding) == (jnp.float32, other[1].sharding)
        assert one[1].sharding.is_fully_replicated
        np.testing.assert_array_equal(one[1], other[1])
    for name in ("tokenizer", "sequence_length", "dtype"):
        assert getattr(settings, name) == getattr(hp, name)


@pytest.mark.parametrize("make", [with_every_trick, like_the_speedrun])
def test_arrays_and_settings_of_a_model_with_whatever_tricks_come_back_to_the_last_bit(
    tmp_path, make
):
    config = replace(make(), vocab_size=256)
    params = test_model.alive(config)
    save_model(tmp_path / "gpt", config, params, SETTINGS | {"from": {"step": 5}}, {})
    settings, graph, same, _ = load_model(tmp_path / "gpt", make_mesh(1))
    assert settings.model == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert graph == graph_of(config)


def test_a_model_exported_before_some_settings_existed_has_the_logits_of_its_run(run, copy):
    config = json.loads((copy / "config.json").read_text())
    for name in GPTConfig.ADDED:
        del config["model"][name]
    (copy / "config.json").write_text(json.dumps(config))
    _, *model, _ = load_model(run, make_mesh(1))
    _, *same, _ = load_model(copy, make_mesh(1))
    np.testing.assert_array_equal(logits_of(*same), logits_of(*model))


def test_a_second_model_in_numpy_makes_the_same_logits_of_the_bare_file(run, exported):
    arrays = load_file(exported / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype("f4")}
    _, graph, params, _ = load_run(run, make_mesh(1))
    # The one of test_model.py counts layers from the first.
    config = replace(nnx.merge(graph, params).config, key_offset=(1,), paired_heads=(1,))
    nested = traverse_util.unflatten_dict(arrays, sep=".")
    expected = test_model.numpy_logits(config, nested, TOKENS)
    np.testing.assert_allclose(logits_of(graph, params), expected, atol=1e-4)


# The folder


def one_sentence(error, *told):
    (line,) = str(error).splitlines()
    assert line.endswith(".")
    for words in told:
        assert words in line
    return True


def test_an_empty_folder_may_be_written_and_a_taken_one_is_left_as_it_was(
    run, exported, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    inode = (tmp_path / "empty").stat().st_ino  # that of a mount point, or of a shell's folder
    assert export.main([str(run), "--out", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty").stat().st_ino == inode
    same = [
        (tmp_path / "empty" / file.name).read_bytes() == file.read_bytes()
        for file in exported.iterdir()
    ]
    assert same == [True] * 9
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("all of it")
    (tmp_path / "file").write_text("something")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    long = "x" * 5000
    assert export.main([str(run), "--out", str(tmp_path / long)]) == 2
    assert one_sentence(capsys.readouterr().err, long, "File name too long")
    for name in ("taken", "file"):
        assert export.main([str(run), "--out", str(tmp_path / name)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert one_sentence(output.err, name, "already exists")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_written_whole_is_not_written_at_all(exported, tmp_path):
    _, graph, params, _ = load_model(exported, make_mesh(1))
    config = nnx.merge(graph, params).config
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # of a file, like a full disk
    try:
        with pytest.raises(ConfigError) as error:
            save_model(tmp_path / "gpt", config, params, SETTINGS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert one_sentence(error.value, "gpt cannot be written", "File too large")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_and_no_traceback(run, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanogpt.inference.export.save_file", interrupted)
    assert export.main([str(run), "--out", str(tmp_path / "gpt")]) == 130
    assert capsys.readouterr().err == "Interrupted: nothing was written.\n"
    assert list(tmp_path.iterdir()) == []


def test_only_a_run_can_be_exported(exported, tmp_path, capsys):
    harmed = tmp_path / "harmed"
    (harmed / "config.json").mkdir(parents=True)  # a file that cannot be read
    told = {tmp_path / "nothing": "does not exist", exported: "give the run", harmed: "restore it"}
    for folder, words in told.items():
        assert export.main([str(folder), "--out", str(tmp_path / "gpt")]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert one_sentence(output.err, str(folder), words)
    shutil.rmtree(harmed)
    assert list(tmp_path.iterdir()) == []


# Damage


def truncated(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def rewrite(folder, change):
    """The arrays, changed."""
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def array_missing(folder):
    rewrite(folder, lambda arrays: arrays.pop("attention.qkv"))


def array_too_many(folder):
    rewrite(folder, lambda arrays: arrays.update(lm_bias=np.zeros(3, "f4")))


def array_misshapen(folder):
    rewrite(folder, lambda arrays: arrays.update(head=arrays["head"].T.copy()))


def array_of_halves(folder):
    rewrite(folder, lambda arrays: arrays.update(head=arrays["head"].astype("f2")))


def array_of_nan(folder):
    rewrite(folder, lambda arrays: arrays.update(head=arrays["head"] * np.float32("nan")))


def no_config(folder):
    (folder / "config.json").unlink()


def config_cut_short(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-9])


def config_of(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def config_of_another_program(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def no_arrays(folder):
    (folder / "model.safetensors").unlink()


def arrays_elsewhere(folder):
    no_arrays(folder)
    index = {"weight_map": {"head": "../a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def config_that_is_a_list(folder):
    (folder / "config.json").write_text("[1, 2]")


def model_of_words(folder):
    config_of(folder, model=asdict(GPTConfig()) | {"width": "wide"})


def unknown_tokenizer(folder):
    config_of(folder, tokenizer="words")


def no_rows(folder):
    config_of(folder, sequence_length=0)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (truncated, ["model.safetensors is damaged"]),
        (no_arrays, ["model.safetensors is missing"]),
        (arrays_elsewhere, ["has a file outside of its folder", "../a.safetensors"]),
        (array_of_nan, ["head has values that are not finite"]),
        (empty, ["model.safetensors is damaged"]),
        (array_missing, ["attention.qkv is missing", "[2, 3, 32, 32]"]),
        (array_too_many, ["lm_bias", "[3]", "should be absent"]),
        (array_misshapen, ["head", "[32, 256]", "[256, 32]"]),
        (array_of_halves, ["head", "F32[32, 256]", "F16[32, 256]"]),
        (no_config, ["config.json cannot be read (No such file or directory)"]),
        (config_cut_short, ["config.json is not valid JSON"]),
        (config_of_another_program, ["is a model of type gpt2, which export.py did not write"]),
        (config_that_is_a_list, ["config.json must be an object, not [1, 2]"]),
        (model_of_words, ['config.json: model.width must be an integer, not "wide"']),
        (unknown_tokenizer, ["config.json", "tokenizer"]),
        (no_rows, ["config.json", "sequence_length"]),
    ],
)
def test_a_damaged_folder_is_told_in_one_sentence_that_names_what_is_wrong(copy, harm, told):
    harm(copy)
    with pytest.raises(ConfigError) as error:
        load_model(copy, make_mesh(1))
    assert one_sentence(error.value, str(copy), *told)


def test_a_folder_with_neither_run_nor_model_is_told_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_model(tmp_path, make_mesh(1))
    assert one_sentence(error.value, str(tmp_path), "is not a run folder")
