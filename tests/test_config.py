"""The arithmetic of a model's shape, and invalid shapes."""

import dataclasses
import json

import pytest

from nanogpt.checks import ConfigError, checked
from nanogpt.config import GPTConfig
from tests.conftest import like_the_speedrun, with_every_trick

NEUTRAL = {  # fields that older files lack, with values that change nothing
    "value_layers": (),
    "bigram_width": None,
    "attention_out_init": 0.0,
    "attention_source": None,
    "exclusive": (),
    "dynamic": False,
    "gated": (),
    "composed": (),
    "composed_window": 112,
}


@pytest.mark.parametrize(
    ("vocab_size", "padded"),
    # 50304 is what nanoGPT and modded-nanogpt pad GPT-2's 50257 to.
    [(50257, 50304), (1, 128), (128, 128), (129, 256), (256, 256)],
)
def test_the_vocabulary_is_padded_to_the_next_multiple_of_128(vocab_size, padded):
    assert GPTConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_the_default_is_the_shape_of_the_smallest_gpt2_with_heads_twice_as_wide():
    config = GPTConfig()
    config.check()
    assert (config.num_layers, config.width, config.mlp_width) == (12, 768, 4 * 768)
    assert config.head_size == 2 * 64


@pytest.mark.parametrize(
    ("windows", "per_layer"),
    [
        ((), [None] * 5),
        ((0,), [None] * 5),
        ((7,), [7] * 5),
        ((8, 0), [8, None, 8, None, 8]),
        ((1, 2, 3), [1, 2, 3, 1, 2]),
    ],
)
def test_windows_repeat_over_the_layers_and_zero_means_all(windows, per_layer):
    config = GPTConfig(windows=windows, num_layers=5)
    assert [config.window(layer) for layer in range(5)] == per_layer


@pytest.mark.parametrize(
    ("how", "tables", "gated"),
    [
        ({}, {0: 1, 1: 2, 9: 0, 10: 1, 11: 2}, (0, 1, 9, 10, 11)),
        ({"value_gate": False}, {0: 1, 1: 2, 9: 0, 10: 1, 11: 2}, ()),
        ({"value_layers": (8, 2, 11)}, {2: 1, 8: 0, 11: 2}, (2, 8, 11)),
        (
            {"value_layers": (8, 2, 11), "attention_source": 5, "dynamic": True},
            *({2: 1, 8: 0, 11: 2}, (2, 8)),
        ),
        ({"value_layers": (3, 4, 5), "mlp_only": (0, -1)}, {3: 0, 4: 1, 5: 2}, (3, 4, 5)),
    ],
)
def test_named_layers_have_a_value_table_each_and_gates_unless_they_are_dynamic(how, tables, gated):
    config = GPTConfig(**how)
    config.check()
    assert config.value_tables == tables
    assert config.gated_values == gated


@pytest.mark.parametrize(
    ("mlp_only", "count"), [((), 12), ((0, 7), 10), ((7, 0, 7), 10), ((*range(11),), 1)]
)
def test_layers_that_are_named_have_no_attention(mlp_only, count):
    assert GPTConfig(mlp_only=mlp_only).num_attentions == count


@pytest.mark.parametrize("make", [with_every_trick, like_the_speedrun])
def test_a_shape_comes_back_from_json(make):
    shape = make()
    assert checked(json.loads(json.dumps(dataclasses.asdict(shape))), GPTConfig) == shape


def test_a_shape_from_before_a_field_was_added_has_none_of_what_it_adds():
    written = {k: v for k, v in dataclasses.asdict(GPTConfig()).items() if k not in NEUTRAL}
    found = checked(json.loads(json.dumps(written)), GPTConfig)
    assert {name: getattr(found, name) for name in NEUTRAL} == NEUTRAL
    assert written == {k: v for k, v in dataclasses.asdict(found).items() if k not in NEUTRAL}


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(GPTConfig)])
def test_no_other_field_of_a_shape_may_be_missing(name):
    written = dataclasses.asdict(GPTConfig())
    del written[name]
    if name in NEUTRAL:
        checked(written, GPTConfig)
    else:
        with pytest.raises(ConfigError, match=f"^{name} is missing"):
            checked(written, GPTConfig)


def test_a_field_that_a_shape_does_not_have_is_refused_also_if_another_is_missing():
    written = dataclasses.asdict(GPTConfig()) | {"width_of_bigrams": 8}
    del written["bigram_width"]
    with pytest.raises(ConfigError, match=r"^width_of_bigrams, 8, is unknown to this version"):
        checked(written, GPTConfig)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
        ({"num_layers": 10**9}, "num_layers must be at most 1,000, not 1000000000"),
        ({"num_heads": -2}, "num_heads must be at least 1, not -2"),
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"mlp_width": 0}, "mlp_width must be at least 1, not 0"),
        ({"width": 36, "num_heads": 2}, r"width \(36\) must be a multiple of 4 \* num_heads \(8\)"),
        ({"width": 100, "num_heads": 3}, r"width \(100\) must be a multiple .*\(12\)"),
        ({"value_embeddings": 13}, "value_embeddings must be 0 to num_layers, 12, not 13"),
        ({"value_embeddings": -1}, "value_embeddings must be 0 to num_layers, 12, not -1"),
        ({"num_layers": 2, "value_embeddings": 3}, "0 to num_layers, 2, not 3"),
        ({"bigram_buckets": -1}, "bigram_buckets must be at least 0, not -1"),
        ({"windows": (4, -1)}, r"windows\[1\] must be at least 0, not -1"),
        ({"windows": (8,), "rotary_windows": (4, 0)}, r"rotary_windows\[1\] .* 1, not 0"),
        ({"skips": ((3, 3),)}, r"skips has \(3, 3\), but a skip must go .* 0 to 11 to a later one"),
        ({"skips": ((3, 12),)}, r"skips has \(3, 12\), but a skip must go .* to a later one"),
        (
            {
                "skips": ((0, 1),),
                "width": 8,
                "num_heads": 2,
                "smear": False,
                "value_gate": False,
                "attention_gate": False,
            },
            "skips reads 12 channels, but width is 8: set it to None",
        ),
        ({"mlp_only": (12,)}, "mlp_only contains layer 12, but layers are numbered 0 to 11"),
        ({"key_offset": (3, -13)}, "key_offset contains layer -13, but layers are"),
        ({"backout": 12}, "backout is layer 12, but layers are numbered 0 to 11"),
        ({"attention_source": 12}, "attention_source is layer 12, but layers are numbered 0 to 11"),
        ({"attention_source": -1}, "attention_source is layer -1, but layers are numbered"),
        ({"exclusive": (1, 12)}, "exclusive contains layer 12, but layers are numbered 0 to 11"),
        (
            {"value_layers": (1, 12), "value_embeddings": 2},
            "value_layers contains layer 12, but layers are numbered 0 to 11",
        ),
        (
            {"value_layers": (-1,), "value_embeddings": 1},
            r"value_layers\[0\] .* at least 0, not -1",
        ),
        (
            {"value_layers": (1, 2)},
            r"value_layers must be as many different layers as value_embeddings, 3, not \(1, 2\)",
        ),
        ({"value_layers": (1,), "value_embeddings": 0}, r"as value_embeddings, 0, not \(1,\)"),
        ({"value_layers": (1, 1, 2)}, r"value_layers .* value_embeddings, 3, not \(1, 1, 2\)"),
        ({"value_layers": (1, 1, 2), "value_embeddings": 2}, r"embeddings, 2, not \(1, 1, 2\)"),
        (
            {"value_layers": (1, 4, 2), "mlp_only": (-10, -8)},
            "value_layers contains layer 2, which has no attention",
        ),
        ({"paired_heads": (0,), "num_heads": 3}, "paired_heads needs an even num_heads, not 3"),
        (
            {"paired_heads": (1, -3), "exclusive": (-1, 9)},
            "paired_heads and exclusive both contain layer 9",
        ),
        (
            {"paired_heads": (1, 4), "composed": (-1, -8, 2)},
            "paired_heads and composed both contain layer 4",
        ),
        ({"exclusive": (1,)}, "exclusive needs dynamic, but it is False"),
        ({"gated": (1,)}, "gated needs dynamic, but it is False"),
        ({"composed": (1,)}, "composed needs dynamic, but it is False"),
        ({"composed": (-13,)}, "composed contains layer -13, but layers are numbered 0 to 11"),
        ({"gated": (12,)}, "gated contains layer 12, but layers are numbered 0 to 11"),
        ({"composed_window": 0}, "composed_window must be at least 1, not 0"),
        ({"bigram_width": 0}, "bigram_width must be at least 1, not 0"),
        ({"bigram_width": 769}, r"bigram_width \(769\) must be at most width \(768\)"),
        ({"attention_out_init": -0.1}, "attention_out_init must be at least 0, not -0.1"),
        ({"attention_out_init": float("inf")}, "attention_out_init must be a number, not inf"),
        ({"dynamic": True}, "dynamic needs an attention_source before the last layer"),
        ({"dynamic": True, "attention_source": 11}, "dynamic needs an attention_source before"),
        ({"dynamic": 1, "attention_source": 5}, "dynamic must be true or false, not 1"),
        (
            {"dynamic": True, "attention_source": 5, "mlp_only": (-1,)},
            "dynamic needs attention in layer 11: change mlp_only",
        ),
        (
            {"dynamic": True, "attention_source": 5, "mlp_only": (4, 0)},
            "dynamic needs attention in layer 0: change mlp_only",
        ),
        (
            {"dynamic": True, "attention_source": 10, "mlp_only": (*range(5, 11),)},
            "dynamic needs attention in one of layers 5 to 10: change mlp_only",
        ),
        (
            {"dynamic": True, "attention_source": 0, "num_layers": 2, "value_embeddings": 0},
            "dynamic needs 3 layers or more, not 2",
        ),
        ({"mlp_only": (*range(12),)}, "mlp_only contains all layers, but at least one"),
        ({"width": 8, "num_heads": 1}, "smear reads 12 channels, but width is 8: set it to False"),
        ({"width": 8, "num_heads": 1, "smear": False}, "attention_gate reads 12 .* width is 8"),
        ({"document_separator": 50257}, "document_separator .* 50,257 token ids, not 50257"),
        ({"document_separator": -1}, "document_separator must be at least 0, not -1"),
        ({"attention_scale": 0.0}, "attention_scale must be above 0, not 0.0"),
        ({"attention_scale": float("inf")}, "attention_scale must be a number, not inf"),
        ({"rope_base": 0.5}, "rope_base must be at least 1, not 0.5"),
        ({"rope_base": float("nan")}, "rope_base must be at least 1, not nan"),
        ({"rope_fraction": 1.1}, "rope_fraction must be at most 1, not 1.1"),
        ({"rope_fraction": -0.1}, "rope_fraction must be at least 0, not -0.1"),
        ({"logit_scale": 0.0}, "logit_scale must be above 0, not 0.0"),
        ({"logit_shift": float("nan")}, "logit_shift must be a number, not nan"),
        ({"softcap": 0.0}, "softcap must be above 0, not 0.0"),
        ({"softcap": 40.5}, "softcap must be at most 40, not 40.5"),
        ({"softcap": float("nan")}, "softcap .* nan"),
        ({"width": True}, "width must be an integer, not True"),
        ({"width": 10**30}, "width must be at most 2,147,483,647, not 10{30}"),
        ({"smear": 1}, "smear must be true or false, not 1"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_in_one_sentence(change, complaint):
    config = dataclasses.replace(GPTConfig(), **change)
    with pytest.raises(ConfigError, match=complaint) as refusal:
        config.check()
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


LATE = {"attention_source": 3, "dynamic": True}


@pytest.mark.parametrize(
    "change",
    [
        {"value_embeddings": 12},
        {"value_embeddings": 0},
        {"num_layers": 1, "value_embeddings": 1},
        {"width": 24, "num_heads": 6},
        {"softcap": 40.0},
        {"windows": (0,), "bigram_buckets": 0},
        {"document_separator": 0},
        {"mlp_only": (*range(11), 0), "key_offset": (0, 11), "backout": 11},
        {"windows": (1,), "rotary_windows": (1, 5)},
        {"skips": ()},
        {"skips": ((0, 10), (1, 2))},
        {"width": 12, "num_heads": 1},
        {"width": 8, "num_heads": 1, "attention_gate": False, "smear": False, "value_gate": False},
        {"rope_base": 1.0, "rope_fraction": 0.0, "logit_shift": -100.0},
        {"rope_fraction": 1.0},
        {"value_embeddings": 2, "value_layers": (11, 0)},
        {"value_embeddings": 12, "value_layers": (*range(12),)},
        {"bigram_width": 768, "attention_out_init": 0.0},
        {"attention_source": 10, "dynamic": True, "mlp_only": (*range(1, 5), *range(6, 11))},
        {
            "attention_source": 0,
            "dynamic": True,
            "skips": (),
            "num_layers": 3,
            "value_embeddings": 0,
        },
        LATE | {"exclusive": (1, -1), "composed": (0, 3), "paired_heads": (-2,)},
        LATE | {"composed_window": 1, "gated": (*range(12),), "paired_heads": (*range(12),)},
    ],
)
def test_a_shape_on_the_edge_of_what_can_be_built_is_accepted(change):
    dataclasses.replace(GPTConfig(), **change).check()
