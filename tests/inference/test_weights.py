"""Runs that start from another run's weights: what they take over, and what is refused."""

import json
import math
import shutil
from dataclasses import asdict, fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import tyro

import export
import train_gpt
from nanogpt.config import ConfigError, GPTConfig
from nanogpt.data.shards import write_shard
from nanogpt.devices.mesh import make_mesh
from nanogpt.inference.weights import Weights, load_run, settings_with
from nanogpt.runs.settings import settings
from nanogpt.schedule import Stage
from nanogpt.training.step import param_shapes
from tests.conftest import like_the_speedrun, with_every_trick
from tests.programs import run_to_end
from tests.run_folders import arrays, mean_loss, records, steps, without_times
from tests.small_runs import SMALL, T
from tests.training.test_resume import another, assert_one_sentence
from train_gpt import PRESETS, Hyperparameters

STEPS = 4
TUNED = [
    *("--train-files", "train.bin", "--val-files", "val.bin", "--no-shuffle"),
    *("--num-steps", f"{STEPS}", "--checkpoint-every", "1", "--keep-checkpoints", "9"),
    *("--run-name", "tuned"),
]


@pytest.fixture(scope="module")
def first(base):
    """The run whose weights the others start from."""
    return base.folder


def write_data(folder):
    """A text to continue training on, and a shard with an id beyond bytes."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    write_shard(folder / "train.bin", text[:4000])
    write_shard(folder / "val.bin", text[4000:6000])
    write_shard(folder / "beyond.bin", np.where(np.arange(2000) == 1234, 300, 0))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with data."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tuned(first, cache, tmp_path_factory):
    """A run that started from the weights of a copy of the first run, deleted since."""
    place = tmp_path_factory.mktemp("tuned")
    write_data(place)
    shutil.copytree(first, place / "runs" / "copy")
    done = run_to_end(["--init-from", "runs/copy", *TUNED], place, cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert "starting from the weights in runs/copy" in done.stdout.splitlines()
    shutil.rmtree(place / "runs" / "copy")
    return place / "runs" / "tuned"


def asked(*arguments):
    """Return the settings of `train_gpt.py` with these arguments."""
    override = partial(tyro.cli, Hyperparameters, args=[*map(str, arguments)])
    return settings(override(), PRESETS, lambda start: override(default=start))


# The run


def test_the_first_loss_is_that_of_the_other_runs_weights_on_the_first_batch(first, tuned):
    _, graph, params, _ = load_run(first, make_mesh(1))
    expected = mean_loss(graph, params, tuned.parent.parent / "train.bin", 256, T)
    losses = [record["train_loss"] for record in records(tuned)]
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert abs(losses[0] - math.log(256)) > 0.1
    assert losses[-1] < losses[0]


def test_steps_schedule_and_optimizer_begin_anew(first, tuned):
    assert [record["step"] for record in records(tuned)] == [1, 2, 3, 4]
    assert steps(tuned) == [1, 2, 3, 4]
    # The laptop preset's: constant for half of the steps, then down to zero.
    factors = [record["learning_rate_factor"] for record in records(tuned)]
    assert factors == pytest.approx([1, 1, 1, 0.5])
    # Adam's first step has exactly the size of the rate, for any gradient.
    head = np.asarray(load_run(first, make_mesh(1))[2]["head"])
    after = arrays(tuned, 1)["['params']['head']"]
    moved = np.abs(np.frombuffer(after[2], "f4").reshape(after[1]) - head)
    same = np.isclose(moved, PRESETS["laptop"].adam.head.learning_rate, atol=1e-6)
    assert same.mean() > 0.99  # the others have almost no gradient


def test_an_exported_model_begins_the_same_run_on_two_devices(exported, tuned, place, cache):
    arguments = [*SMALL, *TUNED, "--checkpoint-every", "0"]
    done = run_to_end(["--init-from", exported, *arguments], place, cache, devices=2)
    assert (done.returncode, done.stderr) == (0, "")
    for ours, theirs in zip(records(place / "runs" / "tuned"), records(tuned), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"train_loss", "val_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_it_is_resumed_from_its_own_checkpoints_when_the_other_run_is_gone(tuned, place, cache):
    run = shutil.copytree(tuned, place / "runs" / "tuned")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"{step:08}")
    done = run_to_end(["--resume", "runs/tuned"], place, cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming runs/tuned after step 2" in done.stdout
    assert "starting from" not in done.stdout
    assert without_times(run) == without_times(tuned)
    assert arrays(run, STEPS) == arrays(tuned, STEPS)
    assert json.loads((run / "config.json").read_text())["init_from"] == "runs/copy"


# Its settings


def test_settings_are_those_of_the_other_run_but_for_what_begins_anew(first):
    before = json.loads((first / "config.json").read_text())
    after = asked("--init-from", first, "--seed", "7", "--model.softcap", "9")
    model = before.pop("model")
    assert json.loads(json.dumps(asdict(after.model))) == model | {"softcap": 9.0}
    assert (after.init_from, after.resume) == (str(first), None)
    assert (after.run_name, after.stages, after.seed) == ("", (Stage(),), 7)
    anew = "init_from", "run_name", "stages", "seed"
    same = {name: value for name, value in before.items() if name not in anew}
    assert same.items() <= json.loads(json.dumps(asdict(after))).items()


def test_a_preset_that_is_named_gives_all_settings_but_what_the_weights_bind(first, exported):
    for folder in (first, exported):
        after = asked("--init-from", folder, "--preset", "baseline", "--num-steps", "5")
        expected = replace(
            PRESETS["baseline"],
            **{"model": after.model, "tokenizer": "bytes", "sequence_length": T, "num_steps": 5},
            init_from=str(folder),
        )
        assert after == expected
        assert after.model.width == 32


def test_an_exported_model_takes_the_other_settings_from_the_preset_for_this_machine(exported):
    after = asked("--init-from", exported)
    assert after == replace(
        PRESETS["laptop"], model=after.model, sequence_length=T, init_from=str(exported)
    )
    assert after.model.width == 32


@pytest.mark.parametrize(
    ("num_steps", "windows", "rotary"), [(6, (48, 64), (16, 32)), (12, (8, 16), (16,))]
)
def test_the_model_is_that_of_the_stage_in_which_the_weights_were_saved(
    first, tmp_path, num_steps, windows, rotary
):
    run = shutil.copytree(first, tmp_path / "run")
    stages = Stage(0.5, windows=(8, 16)), Stage(0.5, 0.5, 1.0, 1.7, (24, 32), (48, 64))
    config = json.loads((run / "config.json").read_text())
    config |= {"stages": [asdict(stage) for stage in stages], "num_steps": num_steps}
    (run / "config.json").write_text(json.dumps(config))
    after = asked("--init-from", run)
    assert (after.model.windows, after.model.rotary_windows) == (windows, rotary)
    assert after.stages == (Stage(),)
    after.check()


def tied(run, folder):
    """Copy the run, as if its head had been tied in the first half of its 6 steps."""
    stages = Stage(), Stage(split_head=True)
    config = json.loads((run / "config.json").read_text())
    config |= {"stages": [asdict(stage) for stage in stages], "num_steps": 6}
    config["model"]["tied_head"] = True
    config["adam"]["embedding"] = config["adam"]["head"]
    (shutil.copytree(run, folder) / "config.json").write_text(json.dumps(config))
    return folder, config


def test_a_head_that_was_split_from_the_embedding_stays_so(first, tmp_path, capsys):
    run, config = tied(first, tmp_path / "run")
    assert not asked("--init-from", run).model.tied_head
    assert export.main([str(run), "--out", str(tmp_path / "gpt")]) == 0
    assert not json.loads((tmp_path / "gpt" / "config.json").read_text())["model"]["tied_head"]
    for folder in (run, tmp_path / "gpt"):
        with pytest.raises(ConfigError, match=r"^model\.tied_head cannot be True: .*untied"):
            asked("--init-from", folder, "--model.tied-head")
    # Twice as many steps would have ended with it still tied: it may be split now.
    (run / "config.json").write_text(json.dumps(config | {"num_steps": 12}))
    assert asked("--init-from", run).model.tied_head
    assert not asked("--init-from", run, "--model.no-tied-head").model.tied_head


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (["--model.width", "64"], ["model.width", "64", "32", "base"]),
        (["--model.num-layers", "0"], ["model.num_layers", "0", "2"]),
        (["--model.vocab-size", "50257"], ["model.vocab_size", "50257", "256"]),
        (["--model.backout", "1"], ["model.backout", "1", "None"]),
        (["--tokenizer", "gpt2"], ["tokenizer", "gpt2", "bytes"]),
        (["--resume", "auto"], ["resume", "init_from", "only one"]),
        (["--train-files", "beyond.bin"], ["beyond.bin", "token 300", "256"]),
        (["--init-from", "runs/nothing"], ["runs/nothing", "no weights", "config.json"]),
    ],
)
def test_what_the_weights_do_not_fit_is_told_before_anything_is_made(
    first, place, capsys, mistake, told
):
    before = sorted(place.rglob("*"))
    arguments = ["--init-from", str(first), *TUNED, "--batch-size", "1", *mistake]
    assert train_gpt.main(arguments) == 2
    assert_one_sentence(capsys.readouterr(), *told)
    assert sorted(place.rglob("*")) == before


def no_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def config_cut_short(run):
    (run / "config.json").write_text((run / "config.json").read_text()[:100])


@pytest.mark.parametrize(
    ("harm", "told"), [(no_checkpoints, "has no checkpoint yet"), (config_cut_short, "config.json")]
)
def test_a_run_without_weights_is_told_before_anything_is_made(first, place, capsys, harm, told):
    run = shutil.copytree(first, place / "first")
    harm(run)
    assert train_gpt.main(["--init-from", "first", *TUNED, "--batch-size", "1"]) == 2
    assert_one_sentence(capsys.readouterr(), "first", told)
    assert not (place / "runs").exists()


def test_a_resumed_run_does_not_change_what_it_began_with(tuned, place, capsys):
    shutil.copytree(tuned, place / "runs" / "tuned")
    assert train_gpt.main(["--resume", "runs/tuned", "--init-from", "runs/tuned"]) == 2
    assert_one_sentence(capsys.readouterr(), "resume", "init_from", "only one")


@cache
def shapes(config):
    return param_shapes(config)


def start_from(config, changed):
    """Start a run of a changed model from the weights of a model."""
    weights = Weights(Path("run"), None, config, "bytes", 16)
    settings_with(weights, PRESETS["laptop"], lambda hp: replace(hp, model=changed))


OTHERS = {"vocab_size": 1000, "mlp_only": (0, 2), "value_layers": (0,)}
OTHERS |= {"exclusive": (4, 5), "gated": (1, 5, 1, 0), "composed": (4, 5)}
ABSENT = {"backout": None, "attention_source": None}


@pytest.mark.parametrize("make", [with_every_trick, like_the_speedrun])
def test_a_setting_of_the_model_is_refused_exactly_when_the_shapes_depend_on_it(make):
    config, refused = make(), set()
    for name in {field.name for field in fields(GPTConfig)} - {"tied_head"}:
        value = getattr(config, name)
        other = OTHERS[name] if name in OTHERS else another(value)
        if name in ABSENT and value != ABSENT[name]:
            other = ABSENT[name]
        changed = replace(config, **{name: other})
        try:
            start_from(config, changed)
            assert shapes(changed) == shapes(config), name
        except ConfigError as error:
            assert str(error).startswith(f"model.{name} cannot be {other}: ")
            assert shapes(changed) != shapes(config), name
            refused.add(name)
    assert refused >= {"width", "num_heads", "mlp_only", "smear", "skips", "value_gate", "dynamic"}
    assert refused >= {*ABSENT, "value_layers", "bigram_width"}
    assert config.dynamic == (refused >= {"exclusive", "gated", "composed"})


def test_of_the_vocabulary_the_padded_size_counts_and_of_layers_and_skips_their_number(tiny):
    same = replace(tiny, vocab_size=128, mlp_only=(-3,), backout=0, skips=((1, 3),))
    assert shapes(same) == shapes(tiny)
    start_from(tiny, same)
    model = like_the_speedrun()
    same = replace(model, value_layers=(0, 3, 5), attention_source=4)
    same = replace(same, exclusive=(0, 0, 5, 2), gated=(0, 4), composed=(4, 2), skips=((0, 4),))
    assert shapes(same) == shapes(model)
    start_from(model, same)


def test_the_number_of_value_gates_and_what_they_read_stay(tiny):
    # The same number of layers can have attention or value tables, but another number gates.
    other = replace(tiny, mlp_only=(2,))
    assert shapes(other) != shapes(tiny)
    with pytest.raises(ConfigError, match=r"^model\.mlp_only cannot be \(2,\): "):
        start_from(tiny, other)
    model = like_the_speedrun()  # the last layer's table has none
    other = replace(model, value_layers=(0, 3, 4))
    assert shapes(other) != shapes(model)
    with pytest.raises(ConfigError, match=r"^model\.value_layers cannot be \(0, 3, 4\): "):
        start_from(model, other)
    # The bigrams would lose their signs.
    with pytest.raises(ConfigError, match=r"^model\.bigram_width cannot be None: "):
        start_from(model, replace(model, bigram_width=None))
    # The same gates would read half of their channels elsewhere.
    one = replace(tiny, value_embeddings=1)
    other = replace(one, value_layers=(3,))
    assert shapes(other) == shapes(one)
    with pytest.raises(ConfigError, match=r"^model\.value_layers cannot be \(3,\): "):
        start_from(one, other)
