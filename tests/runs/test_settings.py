"""Where a run's settings come from."""

import shutil
from dataclasses import replace

import pytest

from nanogpt.checks import ConfigError
from nanogpt.runs.settings import preset_for_hardware, settings_here, suited_to_data, with_own_text
from nanogpt.training.plan import Hardware
from train_gpt import PRESETS, Hyperparameters


@pytest.mark.parametrize(
    ("preset", "tokenizer", "vocab_size", "separator"),
    [
        ("speedrun", "bytes", 256, 255),
        ("speedrun", "gpt2", 50257, 50256),
        ("laptop", "gpt2", 50257, None),  # attends across documents, with any separator
    ],
)
@pytest.mark.parametrize("data", [("some.txt",), ()])  # the user's own text, or shards
def test_the_vocabulary_is_that_of_the_tokenizer_and_its_separator_is_used_where_the_preset_has_one(
    preset, tokenizer, vocab_size, separator, data
):
    start = PRESETS[preset]
    asked = replace(start, data=data, tokenizer=tokenizer)
    model = suited_to_data(start, asked).model
    assert (model.vocab_size, model.document_separator) == (vocab_size, separator)
    model.check()


def test_a_resumed_run_whose_text_changed_is_refused_when_its_shards_are_made_again(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "a\n.txt"
    text.write_text("some words " * 20)
    begun = with_own_text(replace(PRESETS["laptop"], data=(str(text),)))
    resumed = replace(begun, resume="runs/a")
    shutil.rmtree(tmp_path / "cache")
    assert with_own_text(resumed) == resumed  # made again, as they were
    text.write_text("some words " * 19 + "some swords")
    assert with_own_text(resumed) == resumed  # they are there
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"^runs/a was trained on different text: .*/a\\n.txt changed"
    ):
        with_own_text(resumed)


def test_steps_to_profile_must_be_among_those_that_the_minutes_allow(tmp_path, monkeypatch):
    def afford(hp, choose, begun):
        return replace(hp, num_steps=5000)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogpt.training.budget.afford", afford)

    def chosen(steps):
        given = replace(PRESETS["laptop"], minutes=9.0, profile=steps)
        return settings_here(given, PRESETS, lambda start: replace(start, profile=steps))

    beyond = f"{PRESETS['laptop'].num_steps + 1}:2000"
    assert chosen(beyond).profile == beyond
    with pytest.raises(ConfigError, match="within steps 1 to 5000"):
        chosen("4999:5001")


@pytest.mark.parametrize(
    ("gigabytes", "devices", "bfloat16", "given", "chosen"),
    [
        (141, 1, True, {}, "speedrun"),
        (21.6, 1, True, {}, "speedrun"),
        (14.4, 1, True, {}, "baseline"),
        (18.0, 1, True, {}, "baseline"),  # would need nearly all
        (14.4, 2, True, {}, "baseline"),
        (14.4, 8, True, {}, "speedrun"),  # with all parameters sharded
        (14.4, 1, True, {"init_from": "x"}, "speedrun"),
        # Too many for the batch, which a user may enlarge.
        (141, 16, True, {}, "speedrun"),
        (
            14.4,
            1,
            True,
            {"model": replace(PRESETS["speedrun"].model, bigram_buckets=0)},
            "speedrun",
        ),
        (7.2, 8, True, {}, "baseline"),
        (28.8, 1, False, {}, "baseline"),  # without flash attention
        (None, 3, True, {}, "speedrun"),
        (72, 1, True, {"batch_size": 8}, "speedrun"),  # one row fits; a run lowers it
        (14.4, 1, True, {"depth": 6}, "speedrun"),
        (14.4, 1, True, {"preset": "speedrun"}, "baseline"),
    ],
)
def test_with_an_accelerator_the_preset_is_the_speedrun_if_it_fits(
    monkeypatch, capsys, gigabytes, devices, bfloat16, given, chosen
):
    memory = gigabytes and gigabytes * 1e9
    hardware = Hardware("NVIDIA", devices, 1, memory, bfloat16)
    monkeypatch.setattr("nanogpt.runs.settings.find_spec", lambda name: True)
    monkeypatch.setattr("nanogpt.devices.accelerator.use_device", lambda device="auto": "gpu")
    monkeypatch.setattr("nanogpt.training.plan.hardware_here", lambda: hardware)
    monkeypatch.setattr("jax.device_count", lambda: devices)
    changed = {name: given[name] for name in ("model", "batch_size") if name in given}
    given = replace(Hyperparameters(), **given)
    assert preset_for_hardware(given, lambda: replace(PRESETS["speedrun"], **changed)) == chosen
    if given.init_from or changed or devices == 16:
        return
    hp = settings_here(given, PRESETS, lambda start: start)
    assert hp.preset == (chosen if given.preset == "auto" else given.preset)
    told = chosen == "baseline" and given.preset == "auto"
    assert ("speedrun does not fit" in capsys.readouterr().out) == told
