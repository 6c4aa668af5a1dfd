"""Files of an exported model for Hugging Face's libraries, besides its arrays, and its model card.

configuration_nanogpt.py, modeling_nanogpt.py   the model in PyTorch: copies of pytorch/
generation_config.json                          the tokens that begin, end and pad a text
tokenizer.json, tokenizer_config.json           the tokenizer, as data without code
README.md                                       the model card
"""

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from nanogpt.checks import ConfigError
from nanogpt.config import GPTConfig
from nanogpt.data.tokenizer import Tokenizer, load_tokenizer
from nanogpt.files import read_json

CODE = Path(__file__).with_name("pytorch")
SEPARATOR = "<|endoftext|>"
EXPORT_AGAIN = "export, save or download the model again"

# Fields of config.json by which AutoConfig and AutoModelForCausalLM find that code.
MODEL_TYPE = "nanogpt"
CLASSES = {
    "model_type": MODEL_TYPE,
    "architectures": ["NanoGPTForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
        "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
    },
}


class Kind(TypedDict, total=False):
    """The field of config.json that says whose model it is; old exports do not have it."""

    model_type: str


def check_kind(name: str, config: Path) -> None:
    """Raise ConfigError if a model's config.json was not written for this project's models."""
    kind = read_json(config, Kind, EXPORT_AGAIN, others=True)
    if (found := kind.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
        raise ConfigError(f"{name} is a model of type {found}, which export.py did not write.")


class RunFile(TypedDict, total=False):
    """The fields of run.json that the model card reports."""

    command: str
    date: str
    hardware: str
    accelerators: list[str]
    data: dict[str, Any]
    config: dict[str, Any]


def huggingface_files(model: GPTConfig, settings: dict[str, Any], run: Path) -> dict[str, str]:
    """Return the text of each of these files, by name.

    Args:
        settings: the settings in the exported config.json.
        run: the folder of the run that the model comes from.

    Raises TokenizerError if GPT-2's vocabulary is needed and not available.
    """
    tokenizer = load_tokenizer(settings["tokenizer"])
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.separator)
    # Ids that only pad the vocabulary.
    suppressed = [*range(model.vocab_size, model.padded_vocab_size)]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR),
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": settings["sequence_length"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        "generation_config.json": ids | ({"suppress_tokens": suppressed} if suppressed else {}),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config,
    }
    files = {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
    files |= {path.name: path.read_text(encoding="utf-8") for path in sorted(CODE.glob("*.py"))}
    return files | {"README.md": model_card(settings, run)}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer in the format of Hugging Face's `tokenizers`, as byte-pair encoding.

    The byte tokenizer has no merges. The separator is put before each text, as it is before each
    document in training.
    """
    ranks = {tokenizer.token_bytes(token): token for token in range(tokenizer.separator)}
    spelled = {token: "".join(map(_byte_characters().__getitem__, token)) for token in ranks}
    pairs = [halves(token, ranks) for token in ranks if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"id": SEPARATOR, "ids": [tokenizer.separator], "tokens": [SEPARATOR]}
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first, text = {"SpecialToken": {"id": SEPARATOR, "type_id": 0}}, {"id": "A", "type_id": 0}
    return {
        "version": "1.0",
        "added_tokens": [{"id": tokenizer.separator, "content": SEPARATOR, **how, "special": True}],
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": text}],
            "pair": [first, {"Sequence": text}, first, {"Sequence": {**text, "id": "B"}}],
            "special_tokens": {SEPARATOR: special},
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {spelled[token]: rank for token, rank in ranks.items()}
            | {SEPARATOR: tokenizer.separator},
            "merges": [[spelled[one], spelled[other]] for one, other in pairs],
        },
    }


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that a token of byte-pair encoding is merged from."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(one + other, len(ranks)) for one, other in pairwise(parts)]
        first = merged.index(min(merged))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _byte_characters() -> list[str]:
    """Return the printable character for each byte in GPT-2's vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def model_card(settings: dict[str, Any], run: Path) -> str:
    """Return README.md: what the model was trained on, how, and how to use it."""
    source, told = settings["from"], RunFile()
    with suppress(ConfigError):  # the run may have been copied without it
        told = read_json(run / "run.json", RunFile, "", others=True)
    rows = {
        "run": f"{source['run']}, step {source['step']:,}",
        "tokens": f"{source['tokens']:,}",
        "validation loss": f"{source['val_loss']:.4f} nats/token" if "val_loss" in source else "",
        "recipe": f"preset {told['config']['preset']}" if "config" in told else "",
        "data": told.get("data", {}).get("name", ""),
        "command": f"`{told['command']}`" if "command" in told else "",
        "commit": source.get("commit", ""),
        "date": told.get("date", ""),
        "hardware": ", ".join(told.get("accelerators") or [told.get("hardware", "")]),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- jax-flax-nanogpt
---

# {source["run"]}

A GPT trained with JAX/Flax NanoGPT.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
(tokens,) = model.generate(**inputs, max_new_tokens=100, do_sample=True)
print(tokenizer.decode(tokens, skip_special_tokens=True))
```

`trust_remote_code` runs `configuration_nanogpt.py` and `modeling_nanogpt.py` of this folder. The
model was trained on rows of {settings["sequence_length"]:,} tokens and documents that begin with
`{SEPARATOR}`, which the tokenizer adds. [MODEL.md](MODEL.md) describes the architecture and has a
program for it in NumPy.

## License

The code is under the MIT license. The license of the weights is up to whoever trained them, subject
to that of the data: state it here, and as `license:` at the top of this file.
"""
