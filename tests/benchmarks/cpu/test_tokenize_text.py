"""The comparison of prepare_data.py with tiktoken runs, and compares the same tokens."""

import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.cpu import tokenize_text
from nanogpt.data.tokenizer import TokenizerError, gpt2_encoding


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Run it on one core with little text; return the figures."""
    try:
        gpt2_encoding()
    except TokenizerError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(tokenize_text.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(tokenize_text, "SLICE", 2)

    def measure():
        assert tokenize_text.main(["--tiny"]) == 0
        return json.loads(Path(tmp_path / "tokenize_text_tiny.json").read_text())

    return measure


def test_the_figures_are_rates_of_both_sides_and_their_ratio(monkeypatch, measure):
    monkeypatch.setattr(tokenize_text, "documents", lambda n: [f"one two {i}" for i in range(10)])
    (figures,) = measure()["mb_per_s_and_core"].values()
    assert figures["megabytes"] == pytest.approx(90e-6)
    assert figures["ratio"] == pytest.approx(figures["prepare_data"] / figures["tiktoken"])


def test_a_side_that_left_something_out_is_no_comparison(monkeypatch, measure):
    monkeypatch.setattr(tokenize_text, "documents", lambda n: ["one", "two", " "])
    with pytest.raises(AssertionError, match="2 documents"):
        measure()


def test_the_text_is_the_corpus_again_and_again(monkeypatch):
    texts = list(tokenize_text.documents(30_000_000))
    assert 30e6 <= sum(len(text.encode()) for text in texts) < 31e6
    assert texts.count(texts[0]) == 2
