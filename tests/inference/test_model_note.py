"""MODEL.md: its program computes the model's logits from the arrays, and it lists them all."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from nanogpt.inference.export import save_model
from nanogpt.inference.model_note import note
from nanogpt.training.step import graph_of, param_shapes
from tests.model import test_gpt as test_model

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 21))
SOURCE = {"run": "a", "step": 5, "tokens": 500, "commit": "abc", "val_loss": 1.25}
SETTINGS = {"tokenizer": "bytes", "sequence_length": 16, "dtype": "float32", "from": SOURCE}


# Every setting that changes the program appears here with each of its effects.
EVERY_TRICK = replace(
    test_model.EVERY_TRICK,
    vocab_size=300,
    document_separator=4,
    value_gate=True,
    skips=((0, 2), (1, 4), (3, 4)),
)
SPEEDRUN = replace(  # composed heads also share less than a window, and their output is exclusive
    test_model.SPEEDRUN,
    vocab_size=300,
    skips=((0, 1), (0, 2), (1, 4), (3, 5)),
    exclusive=(1, 4, -1),
    gated=(0, 4, -1),
    composed=(1, -1),
    composed_window=9,
)
ALONE = replace(test_model.BARE, num_layers=3, attention_source=0, dynamic=True, skips=())
CONFIGS = {
    "every trick": EVERY_TRICK,
    "the speedrun": SPEEDRUN,
    "value tables of their own": replace(
        EVERY_TRICK, value_embeddings=2, value_layers=(4, 1), windows=()
    ),
    "value tables of their own without gates": test_model.LATE,
    "documents do not end, and a U-net and value tables without gates": replace(
        EVERY_TRICK, document_separator=None, skips=None, value_gate=False
    ),
    "an attention source, narrow bigrams and one table": replace(
        EVERY_TRICK, attention_source=1, backout=None, bigram_width=7, value_embeddings=1
    ),
    "an attention source without bigrams, and a table for most layers": replace(
        EVERY_TRICK,
        **{"attention_source": 0, "bigram_buckets": 0, "skips": None},
        **{"value_embeddings": 4, "mlp_only": (1,)},
    ),
    "no table and no skips": replace(EVERY_TRICK, value_embeddings=1, mlp_only=(-1,), skips=()),
    "dynamic U-net with shared tables without gates and bigrams without signs": replace(
        SPEEDRUN,
        **{"value_embeddings": 3, "value_layers": (), "value_gate": False},
        **{"skips": None, "bigram_width": None},
    ),
    "dynamic with all kinds of gates, the only table and narrow bigrams": replace(
        SPEEDRUN,
        **{"attention_gate": True, "value_embeddings": 1, "value_layers": (5,)},
        **{"bigram_width": 7, "document_separator": None},
    ),
    "dynamic connections and shares alone": ALONE,
    "dynamic with a table for one layer": replace(ALONE, value_embeddings=1, value_layers=(0,)),
    "composed heads without windows and documents": replace(
        test_model.BARE,
        **{"num_layers": 4, "attention_source": 2, "dynamic": True, "mlp_only": (1,)},
        **{"composed": (0, 3), "composed_window": 4},
    ),
    "value residual": test_model.VALUE_RESIDUAL,
    "overlapping": test_model.OVERLAPPING,
    "bare": test_model.BARE,
    "from the last": replace(
        test_model.OVERLAPPING, num_heads=2, smear=False, key_offset=(-1,), paired_heads=(-2,)
    ),
    "no gate but a skip's": replace(
        EVERY_TRICK, value_gate=False, smear=False, attention_gate=False
    ),
    "windows": replace(test_model.BARE, num_layers=2, bigram_buckets=7, windows=(2, 5)),
    "documents of tokens alone": replace(test_model.BARE, document_separator=4),
}


def alive(config):
    """Return random parameters.

    Those of dynamic connections and gates are such that a token's weights are about as large as
    other shares: differences of large terms, or a vanishing stream, would magnify rounding.
    """
    params = test_model.alive(config)
    dynamic = params.get("dynamic", {})
    for name in dynamic.keys() - {"gate_scale"}:
        dynamic[name]["up"] *= 0.05
        dynamic[name]["bias"] *= 10
    if dynamic:
        dynamic["gate_scale"] = np.float32(0.15)
    return params


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_program_in_the_note_is_the_model_with_whatever_tricks_it_has(
    tmp_path, monkeypatch, config
):
    params = alive(config)
    texts = {"MODEL.md": note(config, SETTINGS, params)}
    save_model(tmp_path / "gpt", config, params, SETTINGS, texts)
    monkeypatch.chdir(tmp_path / "gpt")
    (program,) = re.findall(r"```python\n(.*?)```", Path("MODEL.md").read_text(), re.DOTALL)
    names = {}
    exec(program, names)
    tokens = TOKENS % config.vocab_size
    tokens[0, 7] = tokens[1, 0] = 4  # a separator, where there is one
    graph = graph_of(config)
    expected = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, tokens)
    for row, logits in zip(tokens, expected, strict=True):
        np.testing.assert_allclose(names["logits"](row), logits, atol=2e-4)


@pytest.mark.parametrize("config", [EVERY_TRICK, SPEEDRUN], ids=["every trick", "the speedrun"])
def test_the_note_names_every_array_with_its_shape_and_where_it_comes_from(config):
    config = replace(config, vocab_size=50257)
    params = param_shapes(config)
    text = note(config, SETTINGS | {"tokenizer": "gpt2"}, params)
    for name, array in traverse_util.flatten_dict(params, sep=".").items():
        assert f"| `{name}` | {list(array.shape)} | " in text
    for words in ("step 5,", "500 tokens", "1.2500", "commit abc", "50256", "tiktoken", "50,304"):
        assert words in text
