"""Where the settings of a run start."""

from dataclasses import replace

import pytest

from nanogpt.runs.settings import suited_to_own_text
from train_gpt import PRESETS


@pytest.mark.parametrize(
    ("preset", "tokenizer", "vocab_size", "separator"),
    [
        ("speedrun", "bytes", 256, 255),
        ("speedrun", "gpt2", 50257, 50256),
        ("laptop", "gpt2", 50257, None),  # attends across documents, whatever separates them
    ],
)
def test_own_text_has_the_vocabulary_of_its_tokenizer_and_its_separator_where_one_is_heeded(
    preset, tokenizer, vocab_size, separator
):
    start = PRESETS[preset]
    asked = replace(start, data=("some.txt",), tokenizer=tokenizer)
    model = suited_to_own_text(start, asked).model
    assert (model.vocab_size, model.document_separator) == (vocab_size, separator)
    replace(asked, model=model).check()
