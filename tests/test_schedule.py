"""The stages of a run, and its rates at the corners, computed by hand."""

import json
from dataclasses import asdict, replace
from math import inf, nan

import pytest

from nanogpt.checks import ConfigError, checked
from nanogpt.config import GPTConfig
from nanogpt.schedule import Schedule, Stage


def schedule(*stages, **how):
    """Return a schedule, by default of a single stage, without cooldown and momentum changes."""
    settings = dict(
        stages=stages or (Stage(),),
        num_steps=100,
        total_batch_size=1024,
        sequence_length=64,
        hold_fraction=0.0,
        cooldown_fraction=0.0,
        final_learning_rate_factor=0.0,
        momentum=0.95,
        momentum_warmup_steps=0,
        momentum_cooldown_steps=0,
    )
    return Schedule(**(settings | how))


def rates_at(run, steps):
    return {step: run.rates(step).rate for step in steps}


def momenta_at(run, steps):
    return {step: run.rates(step).momentum for step in steps}


# Stages


@pytest.mark.parametrize(
    ("shares", "num_steps", "ends"),
    [
        ((1,), 7, (7,)),
        ((1, 1, 1), 9, (3, 6, 9)),
        ((1, 1, 1), 10, (3, 7, 10)),  # 3.33 and 6.67
        ((1, 1, 1), 11, (4, 7, 11)),
        ((0.33, 0.33, 0.32, 0.02), 2160, (713, 1426, 2117, 2160)),  # 712.8, 1425.6, 2116.8
        ((3, 1), 8, (6, 8)),
        ((0.3, 0.1), 8, (6, 8)),  # shares are relative to their sum
        ((0.33, 0.33, 0.32, 0.02), 2, (1, 1, 2, 2)),
        ((1, 1, 1), 1, (0, 1, 1)),
        ((0.001, 1), 100, (0, 100)),
    ],
)
def test_stages_share_the_steps_and_leave_none_out(shares, num_steps, ends):
    run = schedule(*map(Stage, shares), num_steps=num_steps)
    assert run.ends == ends
    # A step belongs to the first stage that has not ended; a stage without a step has none.
    stages = [run.stage(step) for step in range(1, num_steps + 1)]
    assert stages == [
        next(stage for stage, end in enumerate(ends) if end >= step)
        for step in range(1, num_steps + 1)
    ]
    for stage in range(len(shares)):
        steps = [step for step, its in enumerate(stages, start=1) if its == stage]
        assert steps == list(range(run.first_step(stage), ends[stage] + 1))


def test_batches_and_rows_of_a_stage_are_shares_of_the_whole():
    run = schedule(
        Stage(batch=1 / 3, length=0.5),
        Stage(batch=2 / 3),
        total_batch_size=393_216,
        sequence_length=2048,
    )
    run.check()
    assert [run.tokens_per_step(stage) for stage in (0, 1)] == [131_072, 262_144]
    assert [run.row_length(stage) for stage in (0, 1)] == [1024, 2048]


def test_the_rows_of_a_stage_are_of_a_kind_with_its_length_and_its_limit_to_documents():
    run = schedule(Stage(length=0.5), Stage(max_document_length=9), Stage())
    run.check()
    assert [run.row_kind(stage) for stage in range(3)] == [(32, None), (64, 9), (64, None)]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50, 101])
def test_tokens_are_those_of_all_steps_so_far(num_steps):
    run = schedule(
        Stage(0.33, 1 / 4), Stage(0.33, 1 / 2), Stage(0.32), Stage(0.02, 2.0), num_steps=num_steps
    )
    tokens = 0
    assert run.tokens(0) == 0
    for step in range(1, num_steps + 1):
        tokens += (256, 512, 1024, 2048)[run.stage(step)]
        assert run.tokens(step) == tokens


# Rates


def test_rates_of_three_stages_are_those_of_modded_nanogpts_record_of_2025_11_29():
    # Thirds at 1, 1.52 and 1.73; from 45% of the steps on a linear decay to 0.1. So the second
    # stage decays from its own rate, and the third starts in the middle of the decay.
    run = schedule(
        Stage(rate=1.0),
        Stage(rate=1.52),
        Stage(rate=1.73),
        num_steps=1000,
        cooldown_fraction=0.55,
        final_learning_rate_factor=0.1,
    )
    run.check()
    assert run.ends == (333, 667, 1000)
    expected = {
        1: 1.0,
        333: 1.0,
        334: 1.52,
        451: 1.52,
        452: 0.1 + 1.42 * 549 / 550,
        667: 0.1 + 1.42 * 334 / 550,  # 0.962
        668: 0.1 + 1.63 * 333 / 550,  # 1.087
        725: 0.1 + 1.63 / 2 + 1.63 / 550,  # one step before the middle of the fall
        1000: 0.1 + 1.63 / 550,
    }
    assert rates_at(run, expected) == pytest.approx(expected)


def test_a_run_that_falls_from_first_to_last_and_to_nothing_still_moves_in_its_last_step():
    expected = {1: 1.0, 2: 0.99, 51: 0.5, 100: 0.01}
    assert rates_at(schedule(cooldown_fraction=1.0), expected) == pytest.approx(expected)


def test_without_a_cooldown_no_step_is_taken_at_less_than_the_rate_of_its_stage():
    run = schedule(Stage(rate=1.5), Stage(rate=0.5), num_steps=10)
    assert [run.rates(step).rate for step in range(1, 11)] == [1.5] * 5 + [0.5] * 5


def test_rates_stay_at_their_lowest_in_the_last_steps():
    run = schedule(hold_fraction=0.2, cooldown_fraction=0.5, final_learning_rate_factor=0.1)
    expected = {40: 1.0, 41: 1.0, 42: 0.1 + 0.9 * 39 / 40, 61: 0.55, 80: 0.1 + 0.9 / 40}
    assert rates_at(run, expected) == pytest.approx(expected)
    assert {run.rates(step).rate for step in range(81, 101)} == {0.1}


def test_one_factor_lowers_the_rates_of_all_steps_and_nothing_else():
    whole = schedule(Stage(rate=1.0), Stage(rate=1.5), final_learning_rate_factor=0.1)
    lower = replace(whole, learning_rate_factor=0.3)
    for step in (1, 50, 51, 100):
        before, after = whole.rates(step), lower.rates(step)
        assert after == before._replace(rate=pytest.approx(0.3 * before.rate))


# Targets


def test_of_several_targets_the_last_loses_its_weight_by_the_end_of_its_stage():
    run = schedule(
        Stage(target_weights=(1.0, 0.5, 0.25)),
        Stage(target_weights=(1.0, 0.5)),
        Stage(),
        num_steps=12,
    )
    weights = [run.rates(step).target_weights for step in range(1, 13)]
    assert weights[:4] == [(1.0, 0.5, part) for part in (0.25, 0.1875, 0.125, 0.0625)]
    assert weights[4:8] == [(1.0, part) for part in (0.5, 0.375, 0.25, 0.125)]
    assert weights[8:] == [(1.0,)] * 4


# Momentum


def test_momentum_rises_from_085():
    run = schedule(num_steps=40, momentum_warmup_steps=20)
    expected = {1: 0.85, 2: 0.855, 11: 0.9, 20: 0.945, 21: 0.95, 40: 0.95}
    assert momenta_at(run, expected) == pytest.approx(expected)


def test_momentum_falls_back_in_the_last_steps():
    run = schedule(num_steps=40, momentum_warmup_steps=20, momentum_cooldown_steps=10)
    expected = {21: 0.95, 31: 0.95, 32: 0.94, 36: 0.9, 40: 0.86}
    assert momenta_at(run, expected) == pytest.approx(expected)


def test_momentum_without_warmup_is_the_same_in_every_step():
    assert set(momenta_at(schedule(), range(1, 101)).values()) == {0.95}


# The model


def test_a_stage_trains_the_model_with_its_windows_and_remembers_the_longest_so_far():
    config = GPTConfig(windows=(7,), softcap=11.0)
    run = schedule(Stage(windows=(3, 5)), Stage(windows=(4, 9)), Stage(windows=(20, 6)))
    run.check()
    expected = [((3, 5), (5,)), ((4, 9), (5, 9)), ((20, 6), (5, 9, 20))]
    for stage, (windows, longest) in enumerate(expected):
        model = run.model(config, stage)
        model.check()
        assert model == replace(config, windows=windows, rotary_windows=longest)
        assert run.used(config, stage) == model


def test_a_stage_may_use_its_model_with_other_windows_which_turn_nothing():
    config = GPTConfig()
    run = schedule(Stage(windows=(3, 5)), Stage(windows=(4, 9), validation_windows=(4, 12)))
    trained = run.model(config, 1)
    assert trained.rotary_windows == (5, 9)
    assert run.used(config, 1) == replace(trained, windows=(4, 12))


def test_a_tied_head_is_one_with_the_embedding_until_a_stage_splits_them():
    run = schedule(Stage(), Stage(split_head=True), Stage())
    tied = GPTConfig(tied_head=True)
    assert [run.ties_head(tied, stage) for stage in range(3)] == [True, False, False]
    assert not any(run.ties_head(GPTConfig(), stage) for stage in range(3))


def test_a_stage_without_windows_trains_the_model_as_it_is():
    config = GPTConfig(windows=(7, 0))
    run = schedule(Stage(), Stage(batch=0.5))
    assert [run.model(config, stage) for stage in (0, 1)] == [config, config]


# What is refused


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"momentum_warmup_steps": -1}, "momentum_warmup_steps must be at least 0, not -1"),
        ({"cooldown_fraction": -0.1}, "cooldown_fraction must be at least 0, not -0.1"),
        ({"cooldown_fraction": nan}, "cooldown_fraction must be at least 0, not nan"),
        (
            {"final_learning_rate_factor": 1.1},
            "final_learning_rate_factor .* at most 1, not 1.1",
        ),
        ({"momentum": 1.0}, "momentum must be below 1, not 1.0"),
        ({"stages": ()}, "stages must have at least 1 entry"),
        ({"stages": (Stage(windows=(3,)), Stage())}, "Either every stage has windows, or none"),
        ({"stages": (Stage(), Stage(windows=(3,)))}, "Either every stage has windows, or none"),
        (
            {"stages": (Stage(windows=(3, 0)),)},
            r"stages\[0\].windows\[1\] .* at least 1, not 0",
        ),
        (
            {"stages": (Stage(validation_windows=(3,)),)},
            "stage 1 has validation_windows, but no windows",
        ),
        ({"hold_fraction": 1.0}, "hold_fraction must be below 1, not 1.0"),
        ({"stages": (Stage(windows=()),)}, r"stages\[0\].windows must have at least 1 "),
        ({"stages": (Stage(), Stage(share=0.0))}, r"stages\[1\].share must be above 0, not 0.0"),
        ({"stages": (Stage(rate=-1.0),)}, r"stages\[0\].rate must be above 0, not -1.0"),
        ({"stages": (Stage(batch=inf),)}, r"stages\[0\].batch must be a number, not inf"),
        ({"stages": (Stage(length=nan),)}, r"stages\[0\].length must be above 0, not nan"),
        ({"stages": (Stage(batch=0.3),)}, r"batch of stage 1, 0.3 \* 1,024, is not a whole number"),
        ({"stages": (Stage(length=1e-3),)}, r"length of stage 1, 0.001 \* 64, is not a whole"),
        ({"stages": (Stage(length=0.75),)}, "length of stage 1, 0.75, must be one over a whole"),
        ({"stages": (Stage(length=2.0),)}, "length of stage 1, 2.0, must be one over a whole"),
        (
            {"stages": (Stage(length=1 / 64, target_weights=(1.0, 1.0)),)},
            "stage 1 has more target_weights than tokens in a row",
        ),
        (
            {"stages": (Stage(), Stage(max_document_length=0))},
            r"stages\[1\].max_document_length must be at least 1, not 0",
        ),
        (
            {"stages": (Stage(max_document_length=2.5),)},
            r"stages\[0\].max_document_length must be an integer or null, not 2.5",
        ),
        ({"stages": (Stage(target_weights=()),)}, r"stages\[0\].target_weights must have at least"),
        (
            {"stages": (Stage(target_weights=(0.0, 1.0)),)},
            r"stages\[0\].target_weights\[0\] must be above 0, not 0.0",
        ),
        (
            {"stages": (Stage(target_weights=(1.0, 0.0)),)},
            r"stages\[0\].target_weights\[1\] must be above 0, not 0.0",
        ),
        (
            {"stages": (Stage(target_weights=(1.0, inf)),)},
            r"stages\[0\].target_weights\[1\] must be a number, not inf",
        ),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_in_one_sentence(change, complaint):
    schedule().check()
    with pytest.raises(ConfigError, match=complaint) as refusal:
        schedule(**change).check()
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"cooldown_fraction": 1.0},
        {"final_learning_rate_factor": 1.0, "momentum": 0.0},
        {"stages": (Stage(share=30, batch=3.0, length=1 / 32, target_weights=(2.0, 1e-3)),)},
        {"stages": (Stage(windows=(1,)), Stage(windows=(10**6, 1)))},
        {"stages": (Stage(max_document_length=1), Stage(max_document_length=10**6))},
    ],
)
def test_a_schedule_on_the_edge_of_what_makes_sense_is_accepted(change):
    schedule(**change).check()


def test_stages_come_back_from_json():
    stages = (
        Stage(0.5, windows=(3, 4), target_weights=(1.0, 0.5), max_document_length=7),
        Stage(rate=1.5),
    )
    written = json.loads(json.dumps([asdict(stage) for stage in stages]))
    assert checked(written, tuple[Stage, ...]) == stages


def test_a_stage_from_before_it_could_limit_documents_does_not():
    written = asdict(Stage(0.5, split_head=True))
    del written["max_document_length"]
    assert checked(written, Stage) == Stage(0.5, split_head=True)
    del written["rate"]
    with pytest.raises(ConfigError, match=r"^rate is missing"):
        checked(written, Stage)
