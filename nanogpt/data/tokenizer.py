"""Text to token ids and back: raw bytes, or GPT-2's byte-pair encoding."""

from collections.abc import Sequence
from threading import Thread
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Integer, UInt16

from nanogpt.checks import UserError

if TYPE_CHECKING:
    import tiktoken

DOWNLOAD_SECONDS = 60  # the longest wait for GPT-2's vocabulary, 1.5 MB


class TokenizerError(UserError):
    """A tokenizer that does not exist, or a vocabulary that cannot be loaded."""


class Tokenizer(Protocol):
    """The interface of all tokenizers; ids fit uint16, the dtype of the shards."""

    name: str
    vocab_size: int  # ids run from 0 to vocab_size - 1
    separator: int  # the id written before each document

    def encode(self, text: str) -> UInt16[np.ndarray, "tokens"]:
        """Encode `text` as ids; never as a separator, whatever the text contains."""
        ...

    def decode(self, tokens: Integer[np.ndarray, "tokens"] | Sequence[int]) -> str:
        """Decode `tokens`; separators and padding are dropped, invalid UTF-8 becomes U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes: <|endoftext|> for the separator, none beyond `vocab_size`."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte. The separator is 0xFF, a byte that UTF-8 never uses."""

    name = "bytes"
    vocab_size = 256
    separator = 0xFF

    def encode(self, text: str) -> UInt16[np.ndarray, "tokens"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, tokens: Integer[np.ndarray, "tokens"] | Sequence[int]) -> str:
        ids = np.asarray(tokens, np.int64)
        text = ids[ids < self.separator]
        return text.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        if token == self.separator:
            return b"<|endoftext|>"
        return bytes([token]) if token < self.vocab_size else b""


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, from tiktoken; <|endoftext|> separates documents.

    Raises TokenizerError if the vocabulary is neither cached nor downloadable.
    """

    name = "gpt2"
    vocab_size = 50257
    separator = 50256

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()

    def encode(self, text: str) -> UInt16[np.ndarray, "tokens"]:
        # encode_ordinary reads a literal "<|endoftext|>" in a document as plain text.
        return np.array(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, tokens: Integer[np.ndarray, "tokens"] | Sequence[int]) -> str:
        ids = np.asarray(tokens, np.int64)
        return self._encoding.decode(ids[ids < self.separator].tolist(), errors="replace")

    def token_bytes(self, token: int) -> bytes:
        known = token < self.vocab_size
        return self._encoding.decode_single_token_bytes(token) if known else b""


TOKENIZERS = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer `name`, "bytes" or "gpt2"; raises TokenizerError for any other name."""
    if name not in TOKENIZERS:
        raise TokenizerError(f"Unknown tokenizer {name!r}; choose from {', '.join(TOKENIZERS)}.")
    return TOKENIZERS[name]()


def gpt2_encoding() -> "tiktoken.Encoding":
    """Load tiktoken's "gpt2" within DOWNLOAD_SECONDS; raises TokenizerError if that fails."""
    outcome: list[tiktoken.Encoding | Exception] = []

    def load() -> None:
        try:
            import tiktoken

            outcome.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # no network, no cache, not installed: the advice is the same
            outcome.append(error)

    # tiktoken downloads without a timeout; only a thread can be abandoned.
    thread = Thread(target=load, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, Exception):
        raise TokenizerError(
            "tiktoken could not load GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder with"
            " its two files, filled on a machine with network by `TIKTOKEN_CACHE_DIR=FOLDER"
            " python3 -c 'import tiktoken; tiktoken.get_encoding(\"gpt2\")'`"
            f" ({type(result).__name__})."
        ) from result
    return result
