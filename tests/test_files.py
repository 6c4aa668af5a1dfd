"""Files that are read back: a mistake is one sentence with file, field, value and remedy."""

import json
import os
import re
from dataclasses import asdict, fields, replace
from errno import EACCES, ENOSPC, EROFS
from math import inf, nan

import pytest

import evaluate
import export
import prepare_data
import sample
import train_gpt
from nanogpt.adam import Adam
from nanogpt.checks import ConfigError, checked
from nanogpt.config import GPTConfig
from nanogpt.files import cannot_write, read_json, write_whole
from nanogpt.schedule import Stage
from nanogpt.training.resume import ADDED, saved_settings
from train_gpt import PRESETS, Hyperparameters

RUN = json.loads(json.dumps(asdict(PRESETS["laptop"])))  # the config.json of a run
EXPORTED = {name: RUN[name] for name in ("tokenizer", "sequence_length", "dtype", "model")}
DROPPED = object()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (ENOSPC, "here cannot be written (No space left on device): make room there, or wait."),
        (EACCES, "here cannot be written (Permission denied): get permission to write there, or"),
        (EROFS, "here cannot be written (Read-only file system): wait."),
    ],
)
def test_what_cannot_be_written_says_what_helps(code, sentence):
    assert cannot_write("here", OSError(code, os.strerror(code)), "wait").startswith(sentence)


def changed(values, path, value):
    """Return JSON values with another value at a path such as model.width, or without it."""
    values = json.loads(json.dumps(values))
    *before, last = path.split(".")
    place = values
    for name in before:
        place = place[int(name) if name.isdecimal() else name]
    if value is DROPPED:
        del place[last]
    else:
        place[last] = value
    return values


def refusal(capsys, folder, program, *arguments):
    """Return the sentence with which a program refuses a folder, which must stay unchanged."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert program.main([*map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return sentence


# A run's config.json


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, with all that is read before its config.json is accepted."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    return folder


PROGRAMS = {
    "resume": (train_gpt, "--resume", "runs/a"),
    "resume the latest": (train_gpt, "--resume", "auto"),
    "repeat": (train_gpt, "--config", "runs/a/config.json"),
    "begin with its weights": (train_gpt, "--init-from", "runs/a"),
    "sample": (sample, "runs/a"),
    "evaluate": (evaluate, "runs/a"),
    "export": (export, "runs/a", "--out", "gpt"),
}
TRAINING = [name for name, (program, *_) in PROGRAMS.items() if program is train_gpt]
ONE, BOTH = ["repeat"], ["repeat", "sample"]  # of training, and of the others


@pytest.mark.parametrize(
    ("programs", "content", "told"),
    [
        (PROGRAMS, b"", " is not valid JSON (empty)"),
        (BOTH, b" \n", " is not valid JSON (empty)"),
        (BOTH, b'{"preset": "laptop', " is not valid JSON (Unterminated string"),
        (BOTH, json.dumps(RUN).encode() + b"}", " is not valid JSON (Extra data"),
        (BOTH, b'{"preset": "\xff"}', " is not valid JSON (not UTF-8 at byte 12)"),
        (BOTH, b"\x80\x04pickle", " is not valid JSON (not UTF-8 at byte 0)"),
        (BOTH, b"[" * 10_000, " is not valid JSON (nested too deeply)"),
        (BOTH, b'{"a":' * 100_000, " is not valid JSON (nested too deeply)"),
        (BOTH, b'{"seed": 1, "seed": 2}', ' is not valid JSON ("seed" is given twice)'),
        (BOTH, b'{"seed": ' + b"1" * 5000 + b"}", " is not valid JSON (Exceeds the limit"),
        (PROGRAMS, b"[]", " must be an object, not []"),
        (BOTH, b"null", " must be an object, not null"),
        (BOTH, b'"text"', ' must be an object, not "text"'),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(run, capsys, programs, content, told):
    (run / "config.json").write_bytes(content)
    for program in programs:
        sentence = refusal(capsys, run, *PROGRAMS[program])
        assert f"runs/a/config.json{told}" in sentence
        assert sentence.endswith(": restore it, or give another run.")


@pytest.mark.parametrize(
    ("programs", "path", "value", "told"),
    [
        (BOTH, "sequence_length", "128", 'sequence_length must be an integer, not "128"'),
        (BOTH, "sequence_length", 128.0, "sequence_length must be an integer, not 128.0"),
        (BOTH, "sequence_length", True, "sequence_length must be an integer, not true"),
        (BOTH, "sequence_length", None, "sequence_length must be an integer, not null"),
        (BOTH, "sequence_length", [1], "sequence_length must be an integer, not [1]"),
        (BOTH, "sequence_length", {}, "sequence_length must be an integer, not {}"),
        (PROGRAMS, "sequence_length", 0, "sequence_length must be at least 1, not 0"),
        (BOTH, "num_steps", 10**30, f"num_steps must be at most 2,147,483,647, not {10**30}"),
        (BOTH, "num_steps", DROPPED, "num_steps is missing"),
        (BOTH, "dtype", "float16", 'dtype must be float32 or bfloat16, not "float16"'),
        (BOTH, "dtype", 16, "dtype must be a string, not 16"),
        (BOTH, "tokenizer", "words", 'tokenizer must be gpt2 or bytes, not "words"'),
        (BOTH, "model", [], "model must be an object, not []"),
        (BOTH, "model", DROPPED, "model is missing"),
        (BOTH, "model.width", "wide", 'model.width must be an integer, not "wide"'),
        (PROGRAMS, "model.width", DROPPED, "model.width is missing"),
        (BOTH, "model.smear", 1, "model.smear must be true or false, not 1"),
        (BOTH, "model.softcap", nan, "model.softcap must be above 0, not NaN"),
        (BOTH, "model.windows", [8, -1], "model.windows[1] must be at least 0, not -1"),
        (BOTH, "model.skips", [[0, 2], [1]], "model.skips[1] must have 2 entries, not [1]"),
        (BOTH, "model.dynamic", 1, "model.dynamic must be true or false, not 1"),
        (BOTH, "model.value_layers", [0, "1"], "model.value_layers[1] must be an integer, not"),
        (BOTH, "model.attention_source", "3", "model.attention_source must be an integer or"),
        (BOTH, "model.layers", 2, "model.layers, 2, is unknown to this version"),
        (BOTH, "stages", [], "stages must have at least 1 entry, not []"),
        (BOTH, "stages", {}, "stages must be a list, not {}"),
        (BOTH, "stages.0.share", DROPPED, "stages[0].share is missing"),
        (BOTH, "stages.0.rate", inf, "stages[0].rate must be a number, not Infinity"),
        (BOTH, "stages.0.windows", "x" * 99, "stages[0].windows must be a list or null, not"),
        (ONE, "learning_rate", nan, "learning_rate must be at least 0, not NaN"),
        (ONE, "learning_rate", 10**400, "learning_rate must be a number, not 1000000"),
        (ONE, "learning_rate", DROPPED, "learning_rate is missing"),
        (ONE, "adam", [], "adam must be an object, not []"),
        (ONE, "adam", DROPPED, "adam is missing"),
        (ONE, "adam.gates", DROPPED, "adam.gates is missing"),
        (ONE, "adam", {}, "adam.additions is missing"),
        (ONE, "adam.biases", 1, "adam.biases, 1, is unknown to this version"),
        (ONE, "adam.head.betas", [0.9], "adam.head.betas must have 2 entries, not [0.9]"),
        (ONE, "adam.head.betas", [0.9, 1], "adam.head.betas[1] must be below 1, not 1"),
        (ONE, "adam.head.learning_rate", nan, "adam.head.learning_rate must be at least 0,"),
        (ONE, "adam_every", 0, "adam_every must be at least 1, not 0"),
        (ONE, "batch_size", "4", 'batch_size must be an integer or null, not "4"'),
        (ONE, "data", "notes", 'data must be a list, not "notes"'),
        (ONE, "data", ["notes", 3], "data[1] must be a string, not 3"),
        (TRAINING, "seed", 2**32, "seed must be at most 4,294,967,295, not 4294967296"),
        (ONE, "warp\ndrive", [1], "warp\\ndrive, [1], is unknown to this version"),
    ],
)
def test_a_field_that_is_not_as_declared_is_named(run, capsys, programs, path, value, told):
    (run / "config.json").write_text(json.dumps(changed(RUN, path, value)))
    for program in programs:
        sentence = refusal(capsys, run, *PROGRAMS[program])
        assert sentence.startswith(f"runs/a/config.json: {told}")
        assert sentence.endswith(": restore it, or give another run.")


def test_what_does_not_go_together_is_told_with_its_file(run, capsys):
    for path, value in {"stages.0.batch": 0.3, "model.num_heads": 5}.items():
        (run / "config.json").write_text(json.dumps(changed(RUN, path, value)))
        if path.startswith("stages"):
            told = r"runs/a/config.json: batch of stage 1, 0.3 \* 4,096, is not .*: restore it"
            assert re.match(told, refusal(capsys, run, *PROGRAMS["sample"]))
        sentence = refusal(capsys, run, *PROGRAMS["repeat"])
        told = "batch of stage 1" if "batch" in path else "width (96) must be"
        assert sentence.startswith(f"runs/a/config.json: {told}")


@pytest.mark.parametrize("option", ["--resume", "--config"])
def test_saved_settings_that_do_not_go_together_are_told_with_their_file(run, capsys, option):
    (run / "config.json").write_text(json.dumps(changed(RUN, "model.vocab_size", 100)))
    path = "runs/a/config.json"
    said = refusal(capsys, run, train_gpt, option, path if option == "--config" else "runs/a")
    assert said.startswith(f"{path}: model.vocab_size 100 is less than the 256 ids")


def test_a_prompt_that_is_no_text_is_refused_before_anything_is_trained(run, capsys):
    said = refusal(capsys, run, train_gpt, "--sample-prompt", "a\udcff")
    assert said == "sample_prompt must be UTF-8, not 'a\\udcff'."


def test_a_file_that_cannot_be_read_or_named_is_refused(run, capsys):
    (run / "config.json").mkdir()
    sentence = refusal(capsys, run, train_gpt, "--config", "runs/a/config.json")
    assert sentence.startswith("runs/a/config.json cannot be read (Is a directory): restore it")
    for option in ("--resume", "--init-from", "--config"):
        assert refusal(capsys, run, train_gpt, option, "x" * 5000).endswith(".")
    for program, *more in ((sample,), (evaluate,), (export, "--out", "gpt")):
        assert "does not exist" in refusal(capsys, run, program, "x" * 5000, *more)


# A run of an earlier version

OF_2026_11_22 = """{"preset": "laptop", "train_files": null, "val_files": null,
"tokenizer": "bytes", "shuffle": true, "max_document_length": null, "batch_size": 4,
"sequence_length": 128,
"total_batch_size": 2048, "num_steps": 900, "stages": [{"share": 1.0, "batch": 1.0, "length": 1.0,
"rate": 1.0, "windows": null, "target_weights": [1.0]}], "learning_rate": 0.03,
"embedding_learning_rate": 0.15, "head_learning_rate": 0.008, "scalar_learning_rate": 0.04,
"cooldown_fraction": 0.5, "final_learning_rate_factor": 0.0, "momentum": 0.9,
"momentum_warmup_steps": 50, "neuron_decay": 0.95, "adam_betas": [0.7, 0.95], "weight_decay": 0.0,
"val_loss_every": 150, "val_tokens": 262144, "device": "auto", "dtype": "float32",
"loss_kernel": "xla", "fp8_head": false, "seed": 0, "skip_spikes": 0.0, "verify_data": false,
"run_name": "", "resume": null, "checkpoint_every": 500, "keep_checkpoints": 2,
"sample_tokens": 600, "sample_prompt": "import jax\\n\\n\\ndef ", "model": {"vocab_size": 256,
"num_layers": 4, "num_heads": 2, "width": 128, "mlp_width": 512, "mlp_only": [], "windows": [],
"earlier_windows": [], "document_separator": null, "value_embeddings": 2, "bigram_buckets": 16384,
"smear": true, "attention_gate": true, "key_offset": [3], "paired_heads": [3], "backout": null,
"attention_scale": 0.12, "rope_base": 1024.0, "rope_fraction": 0.5, "softcap": 15.0,
"logit_scale": 1.0, "logit_shift": 0.0}}"""


# One of the speedrun, in which layers without attention mixed the embedding into the stream, too.
OF_2026_11_29 = json.loads(json.dumps(asdict(PRESETS["speedrun"])))
for name in GPTConfig.ADDED:
    del OF_2026_11_29["model"][name]
OF_2026_11_29 = json.dumps(OF_2026_11_29)


def of_2026_11_30(**how):
    """Return a config.json with late attentions, which saw bigrams in the token embeddings."""
    config = json.loads(json.dumps(asdict(PRESETS["speedrun"])))
    for name in ("gated", "composed", "composed_window"):
        del config["model"][name]
    return json.dumps(config | {"model": config["model"] | how})


@pytest.mark.parametrize(
    ("programs", "old", "told", "remedy"),
    [
        (PROGRAMS, OF_2026_11_22, '{"commit": "0123abc"}', "check out its commit, 0123abc, to"),
        (BOTH, OF_2026_11_22, '{"commit": "0123abc-dirty"}', "check out its commit, 0123abc, to"),
        (BOTH, OF_2026_11_22, '{"commit": "unknown"}', "use that version to"),
        (BOTH, OF_2026_11_22, '{"commit": ', "use that version to"),
        (BOTH, OF_2026_11_22, "[]", "use that version to"),
        (PROGRAMS, OF_2026_11_22, None, "use that version to"),
        (BOTH, OF_2026_11_29, '{"commit": "4567def"}', "check out its commit, 4567def, to"),
        (BOTH, of_2026_11_30(), '{"commit": "4567def"}', "check out its commit, 4567def, to"),
        (BOTH, of_2026_11_30(dynamic=False), None, "use that version to"),
        (BOTH, of_2026_11_30(dynamic=False, exclusive=[]), None, "use that version to"),
        (BOTH, of_2026_11_30(dynamic=False, attention_source=None), None, "use that version to"),
    ],
)
def test_a_run_of_a_version_with_other_parameters_is_refused_with_its_commit(
    run, capsys, programs, old, told, remedy
):
    (run / "config.json").write_text(old)
    if told is not None:
        (run / "run.json").write_text(told)
    for program in programs:
        assert refusal(capsys, run, *PROGRAMS[program]) == (
            "runs/a/config.json is from an earlier version, whose models were different: "
            f"{remedy} continue with it, or give another run."
        )


@pytest.mark.parametrize("old", [OF_2026_11_22, OF_2026_11_29])
def test_an_exported_model_of_such_a_version_is_refused_with_its_commit_too(run, capsys, old):
    (run / "model.safetensors").touch()
    old = {"model": json.loads(old)["model"], "from": {"commit": "0123abc"}}
    (run / "config.json").write_text(json.dumps(EXPORTED | old))
    for program in ("sample", "begin with its weights"):
        sentence = refusal(capsys, run, *PROGRAMS[program])
        assert sentence.startswith("runs/a/config.json is from an earlier version, ")
        assert ": check out its commit, 0123abc, to continue with it, or " in sentence


def test_a_run_of_this_version_is_read_as_it_was_whatever_its_settings(tmp_path):
    for hp in PRESETS.values():
        hp = replace(hp, run_name="a", data=("x", "y"), mesh="data=2", rematerialize=True, seed=7)
        (tmp_path / "config.json").write_text(json.dumps(asdict(hp)))
        assert saved_settings(Hyperparameters, tmp_path / "config.json") == hp


def test_no_setting_takes_a_default_in_silence(tmp_path):
    for name in RUN.keys() - ADDED:
        (tmp_path / "config.json").write_text(json.dumps(changed(RUN, name, DROPPED)))
        with pytest.raises(ConfigError, match=f"config.json: {name} is missing: restore it"):
            saved_settings(Hyperparameters, tmp_path / "config.json")


def test_a_run_from_before_a_setting_was_added_is_as_it_was(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({name: RUN[name] for name in RUN if name not in ADDED}))
    saved = saved_settings(Hyperparameters, config)
    assert (saved.learning_rate_factor, saved.checkpoint_minutes, saved.keep_best) == (
        1.0,
        None,
        False,
    )
    assert saved.heads_together is None


def without(values, names):
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("preset", ["laptop", "baseline", "gpt2-medium"])
def test_a_run_from_before_the_model_and_its_groups_had_more_is_as_it_was(tmp_path, preset):
    hp, rate = PRESETS[preset], Adam(0.123, (0.4, 0.5), 0.6)
    written = json.loads(json.dumps(asdict(replace(hp, adam=replace(hp.adam, scalars=rate)))))
    written["model"] = without(written["model"], GPTConfig.ADDED)
    later = ("stream", "additions", "connections", "connection_biases")
    written["adam"] = without(written["adam"], later)
    written["stages"] = [without(stage, Stage.ADDED) for stage in written["stages"]]
    written = without(written, {"heads_together", *ADDED})
    config = tmp_path / "config.json"
    config.write_text(json.dumps(written))
    saved = saved_settings(Hyperparameters, config)
    assert (saved.model, saved.stages) == (hp.model, hp.stages)  # which use none of it
    # What is in these groups now was among the other scalars.
    assert {name: getattr(saved.adam, name) for name in later} == dict.fromkeys(later, rate)
    assert replace(saved, adam=hp.adam) == hp

    config.write_text(json.dumps(changed(written, "adam.stream", asdict(Adam(0.7)))))
    assert saved_settings(Hyperparameters, config).adam.stream == Adam(0.7)
    for path in ("model.backout", "adam.head", "adam.shortcuts", "stages.0.rate"):
        config.write_text(json.dumps(changed(written, path, DROPPED)))
        name = re.escape(path.replace(".0", "[0]"))
        with pytest.raises(ConfigError, match=f"config.json: {name} is missing: restore it"):
            saved_settings(Hyperparameters, config)
    config.write_text(json.dumps(changed(written, "model.late", 3)))
    with pytest.raises(ConfigError, match=r"config.json: model.late, 3, is unknown to this"):
        saved_settings(Hyperparameters, config)


# An exported model's


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("dtype", "float16", 'dtype must be float32 or bfloat16, not "float16"'),
        ("sequence_length", "128", 'sequence_length must be an integer, not "128"'),
        ("model", [], "model must be an object, not []"),
        ("model.width", 2.0, "model.width must be an integer, not 2.0"),
        ("model.backout", DROPPED, "model.backout is missing"),
        ("model.bigram_width", 97, "bigram_width (97) must be at most width (96)"),
        ("model.layers", 2, "model.layers, 2, is unknown to this version"),
        ("model.num_heads", 5, "width (96) must be a multiple of 4 * num_heads"),
    ],
)
def test_a_field_of_an_exported_model_is_named(run, capsys, path, value, told):
    (run / "model.safetensors").touch()
    (run / "config.json").write_text(json.dumps(changed(EXPORTED, path, value) | {"from": {}}))
    for program in ("sample", "begin with its weights"):
        sentence = refusal(capsys, run, *PROGRAMS[program])
        assert sentence.startswith(f"runs/a/config.json: {told}")
        assert sentence.endswith(": export, save or download the model again.")


# The record of prepared text


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("train", None, "train must be a list, not null"),
        ("train", [1], "train must have 2 entries, not [1]"),
        ("train", [1, -5], "train[1] must be at least 0, not -5"),
        ("next", "0", 'next must be a list, not "0"'),
        ("done", 1, "done must be true or false, not 1"),
        ("fingerprint", DROPPED, "fingerprint is missing"),
        ("bad", DROPPED, "bad is missing"),
        ("shards", 3, "shards, 3, is unknown to this version"),
    ],
)
def test_a_damaged_record_of_prepared_text_is_named(tmp_path, capsys, path, value, told):
    (tmp_path / "x.txt").write_text("some words " * 100)
    order = [tmp_path / "x.txt", "--out", tmp_path / "out", "--tokenizer", "bytes"]
    arguments = [*map(str, order), "--processes", "1"]
    assert prepare_data.main(arguments) == 0
    capsys.readouterr()
    record = tmp_path / "out" / "prepared.json"
    record.write_text(json.dumps(changed(json.loads(record.read_text()), path, value)))
    sentence = refusal(capsys, tmp_path / "out", prepare_data, *arguments)
    assert sentence == f"{record}: {told}: choose another folder, or delete it."


# The command line


def numbers(settings):
    return [x.name for x in fields(settings) if isinstance(getattr(settings, x.name), float)]


@pytest.mark.parametrize("value", [inf, -inf, nan])
@pytest.mark.parametrize("name", [*numbers(PRESETS["laptop"]), *numbers(GPTConfig())])
def test_no_setting_is_infinite_or_nan(name, value):
    hp = PRESETS["laptop"]
    of_model = name in numbers(hp.model)
    wrong = replace(
        hp, **({"model": replace(hp.model, **{name: value})} if of_model else {name: value})
    )
    with pytest.raises(ConfigError, match=rf"^(model\.)?{name} must be .*, not {value}\.$"):
        wrong.check()


def test_the_presets_are_as_declared():
    for hp in PRESETS.values():
        hp.check()
        assert checked(asdict(hp), Hyperparameters) == hp


# Reading and writing


def test_what_a_file_may_have_besides_is_left_out(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(asdict(Stage()) | {"more": 1}))
    assert read_json(path, Stage, "restore it", others=True) == Stage()
    with pytest.raises(ConfigError, match=r"x\.json: more, 1, is unknown to .*: restore it\.$"):
        read_json(path, Stage, "restore it")


def test_a_file_holds_the_old_text_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_whole(path, "old")
    seen = []
    replace_file = train_gpt.os.replace
    monkeypatch.setattr("os.replace", lambda *a: (seen.append(path.read_text()), replace_file(*a)))
    write_whole(path, "new é")
    assert (seen, path.read_text(encoding="utf-8")) == (["old"], "new é")
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_text_alone(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
