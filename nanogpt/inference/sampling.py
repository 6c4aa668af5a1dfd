"""How the next token is chosen, and what is told of it when it was: plain facts, no JAX."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from msgspec import Meta

from nanogpt.checks import NotNegative, Positive, Seed, checked


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from what the model says of all of them."""

    temperature: NotNegative = 0.8
    """Logits are divided by this; 0 always takes the likeliest token."""
    top_k: Positive | None = None
    """Only the so many likeliest tokens may follow; None for all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Only the likeliest tokens may follow that together have this probability; 1 for all. It is
    counted after the temperature, and within top_k (Holtzman et al., arXiv:1904.09751)."""
    seed: Seed = 0
    """Another seed, another text."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for settings that make no sense."""
        checked(asdict(self), Sampling)


@dataclass(frozen=True)
class Token:
    """One token as it was written."""

    text: str
    """What it adds to the text; nothing while the bytes of a character are incomplete."""
    probability: float
    """What the model gave it, before temperature, top_k and top_p."""
    alternatives: Sequence[tuple[str, float]] = ()
    """The likeliest tokens in its place, itself perhaps among them, with their probabilities."""
