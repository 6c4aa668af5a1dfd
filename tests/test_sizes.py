"""Sizes by depth: the preset's own at its depth, and the stated rule at others."""

from dataclasses import asdict, replace
from fractions import Fraction
from math import isclose, prod

import jax
import pytest

from nanogpt.sizes import at_depth, matrix_weights, shape_of
from nanogpt.training.step import param_shapes
from train_gpt import PRESETS

DEPTHS = {"laptop": 3, "speedrun": 11, "baseline": 12, "gpt2-medium": 24}


def with_layers_counted(hp):
    """Return the settings as a dictionary, with layers counted from 0 and no depth."""
    model = asdict(hp.model)
    for name in ("key_offset", "paired_heads", "mlp_only", "exclusive"):
        model[name] = hp.model.layers(model[name])
    return asdict(hp) | {"model": model, "depth": None}


@pytest.mark.parametrize("preset", DEPTHS)
def test_at_its_own_depth_a_preset_is_itself(preset):
    hp = PRESETS[preset]
    same = with_layers_counted(at_depth(hp, DEPTHS[preset]))
    assert same == with_layers_counted(hp)


@pytest.mark.parametrize("preset", DEPTHS)
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6, 8, 13, 18, 30])
def test_at_any_depth_the_settings_are_valid_and_batches_are_of_whole_rows(preset, depth):
    hp = at_depth(PRESETS[preset], depth)
    hp.check()
    assert hp.model.num_layers == hp.depth == depth
    for stage in range(len(hp.stages)):
        tokens, length = hp.schedule.tokens_per_step(stage), hp.schedule.row_length(stage)
        assert tokens % length == 0
        assert tokens // length >= (hp.batch_size or 1)
    ratio = Fraction(hp.total_batch_size, PRESETS[preset].total_batch_size)
    assert prod((ratio.numerator, ratio.denominator)).bit_count() == 1  # a power of two


def test_weights_in_matrices_are_those_of_the_model():
    for preset in ("laptop", "speedrun"):
        model = PRESETS[preset].model
        params = param_shapes(model)
        matrices = [*jax.tree.leaves([params["attention"]["qkv"], params["attention"]["out"]])]
        matrices += jax.tree.leaves([params["mlp"]["up"], params["mlp"]["down"]])
        assert matrix_weights(model) == sum(each.size for each in matrices)


def test_twice_as_deep_is_twice_as_wide_with_eight_times_the_weights_and_tokens():
    base, hp = PRESETS["laptop"], at_depth(PRESETS["laptop"], 6)
    model = hp.model
    assert (model.width, model.mlp_width, model.num_heads) == (192, 768, 4)
    assert hp.schedule.tokens(hp.num_steps) == 8 * 1000 * 4096
    # A batch of 8^0.571 = 3.3 times as many tokens, to the nearest power of two: 4.
    assert (hp.total_batch_size, hp.num_steps) == (4 * 4096, 8 * 1000 // 4)
    assert at_depth(base, 1).total_batch_size == 4096 // 8  # 27^-0.571 = 0.15; 27^-0.5 is 0.19
    faster = 4**0.5 / 8**0.25
    assert hp.learning_rate == pytest.approx(0.035 * faster)
    assert hp.adam.tables.learning_rate == pytest.approx(0.17 * faster)
    assert hp.adam.head.learning_rate == pytest.approx(0.012 / 2 * faster)
    assert hp.momentum_warmup_steps / hp.num_steps == 50 / 1000
    assert hp.val_loss_every / hp.num_steps == 200 / 1000
    same = ("sequence_length", "momentum", "neuron_decay", "cooldown_fraction", "val_tokens")
    assert all(getattr(hp, name) == getattr(base, name) for name in same)


@pytest.mark.parametrize("depth", range(1, 12))
def test_a_smaller_speedrun_has_as_many_rows_for_as_many_devices(depth):
    hp = at_depth(PRESETS["speedrun"], depth)
    rows = [hp.schedule.tokens_per_step(s) // hp.schedule.row_length(s) for s in range(4)]
    assert rows == [8, 16, 24, 24]
    assert hp.sequence_length >= hp.max_document_length


def test_the_number_of_tokens_can_be_given():
    hp = at_depth(PRESETS["laptop"], 3, tokens=16 * 1000 * 4096)
    assert hp.model.width == 96
    assert (hp.total_batch_size, hp.num_steps) == (4 * 4096, 4 * 1000)
    assert isclose(hp.learning_rate, 0.035)  # 4^(1/2) = 16^(1/4)


@pytest.mark.parametrize("depth", [2, 6, 11, 16])
def test_weight_decay_takes_the_same_share_of_a_weight_over_any_run(depth):
    base, hp = PRESETS["speedrun"], at_depth(PRESETS["speedrun"], depth)

    def shares(hp):
        groups = [(hp.learning_rate, hp.weight_decay)]
        groups += [(group.learning_rate, group.weight_decay) for group in vars(hp.adam).values()]
        return [rate**2 * decay * hp.num_steps for rate, decay in groups]

    assert shares(hp) == pytest.approx(shares(base))


@pytest.mark.parametrize("depth", [2, 5, 8, 16, 22])
def test_special_layers_stay_together(depth):
    """In the record, layers with long windows are those with the key offset."""
    hp = at_depth(PRESETS["speedrun"], depth)
    for stage in hp.stages:
        long = {layer for layer, window in enumerate(stage.windows) if window > min(stage.windows)}
        assert len(stage.windows) == depth
        assert long == set(hp.model.key_offset)
    assert depth - 1 in long
    assert not set(hp.model.mlp_only) & (set(hp.model.paired_heads) | long)
    # With long windows, attention is gated, and in the last layer composed.
    if hp.model.dynamic:
        assert hp.model.gated == hp.model.key_offset
        assert {depth - 1} <= set(hp.model.composed) <= set(hp.model.gated)
    assert not set(hp.model.mlp_only) & set(hp.model.exclusive)


def test_special_layers_stay_in_place_at_twice_the_depth():
    model = at_depth(PRESETS["speedrun"], 21).model  # layer 2 n is like layer n of 11
    for name in ("mlp_only", "key_offset", "paired_heads", "exclusive", "gated", "composed"):
        even = {layer // 2 for layer in getattr(model, name) if layer % 2 == 0}
        assert even == set(getattr(PRESETS["speedrun"].model, name))
    assert (model.skips, model.attention_source, model.dynamic) == (((6, 12),), 14, True)
    assert (model.value_layers, model.value_embeddings) == ((2, 4, 16, 18, 20), 5)
    assert at_depth(with_backout(PRESETS["speedrun"], 7), 21).model.backout == 14


def with_backout(hp, layer):
    return replace(hp, model=replace(hp.model, backout=layer))


@pytest.mark.parametrize(
    ("depth", "tables", "source"),
    [
        (1, (0,), 0),
        (2, (0, 1), 1),
        (3, (0, 2), 1),
        (5, (0, 1, 3, 4), 3),  # layer 10 n / 4 of 11; both 9 and 10 are nearest to the last
        (8, (1, 6, 7), 5),  # 0.7, 1.4, 5.6, 6.3 and 7 of 7; 4.9
        (11, (1, 2, 8, 9, 10), 7),
    ],
)
def test_value_tables_and_what_late_attentions_read_are_at_the_nearest_layers(
    depth, tables, source
):
    hp = at_depth(PRESETS["speedrun"], depth)
    assert (hp.model.value_layers, hp.model.attention_source) == (tables, source)
    assert hp.model.value_embeddings == len(tables)
    # Only where a layer is late can the last one choose what to read.
    assert hp.model.dynamic == (source < depth - 1)
    if not hp.model.dynamic:
        assert hp.model.exclusive == hp.model.gated == hp.model.composed == ()


def test_a_value_table_whose_nearest_layer_has_no_attention_is_left_out():
    base = PRESETS["speedrun"]
    base = replace(base, model=replace(base.model, value_layers=(1, 5), value_embeddings=2))
    model = at_depth(base, 8).model  # layers 1 and 5 of 11 are nearest to 0.7 and 3.5
    assert model.mlp_only == (4,)
    assert (model.value_layers, model.value_embeddings) == ((1,), 1)


@pytest.mark.parametrize("depth", [1, 2, 5, 11, 18])
def test_bigrams_fill_the_same_part_of_the_stream_at_any_width(depth):
    base = PRESETS["speedrun"]
    hp = at_depth(base, depth)
    assert hp.model.bigram_width == hp.model.width
    quarter = replace(base, model=replace(base.model, bigram_width=192))
    assert at_depth(quarter, depth).model.bigram_width == hp.model.width / 4
    assert at_depth(PRESETS["laptop"], depth).model.bigram_width is None
    assert hp.model.num_heads % hp.heads_together == 0


@pytest.mark.parametrize(
    ("preset", "depth", "heads", "width"),
    [
        ("baseline", 6, 3, 384),
        ("baseline", 7, 4, 512),  # 448 is 3.5 heads of 128
        ("baseline", 1, 1, 128),
        ("speedrun", 16, 8, 1024),  # 1117 is 4.4 pairs of heads
        ("laptop", 1, 2, 32),
        ("laptop", 6, 4, 192),
        ("gpt2-medium", 12, 8, 512),
    ],
)
def test_heads_of_matrix_units_stay_whole_and_pairs_stay_pairs(preset, depth, heads, width):
    assert shape_of(PRESETS[preset].model, depth) == (heads, width)
