"""How the next token is chosen, and what is told of it when it was: plain facts, no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from nanogpt.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from what the model says of all of them."""

    temperature: float = 0.8
    """Logits are divided by this; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the so many likeliest tokens may follow; None for all."""
    top_p: float = 1.0
    """Only the likeliest tokens may follow that together have this probability; 1 for all. It is
    counted after the temperature, and within top_k (Holtzman et al., arXiv:1904.09751)."""
    seed: int = 0
    """Another seed, another text."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for settings that make no sense."""
        if not 0 <= self.temperature < inf:
            raise ConfigError(f"temperature must be 0 or a positive number: {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie above 0 and not above 1, not at {self.top_p}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be 0 or more, below 2**32, not {self.seed}.")


@dataclass(frozen=True)
class Token:
    """One token as it was written."""

    text: str
    """What it adds to the text; nothing while the bytes of a character are incomplete."""
    probability: float
    """What the model gave it, before temperature, top_k and top_p."""
    alternatives: Sequence[tuple[str, float]] = ()
    """The likeliest tokens in its place, itself perhaps among them, with their probabilities."""
