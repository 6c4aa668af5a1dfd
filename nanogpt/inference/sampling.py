"""How the next token is sampled, and what is reported about it. Plain data, no JAX."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from msgspec import Meta

from nanogpt.checks import NotNegative, Positive, Seed, checked


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled from the model's probabilities."""

    temperature: NotNegative = 0.8
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: Positive | None = None
    """Sample only from the k most likely tokens; None: from all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Sample only from the smallest set of tokens whose probabilities sum to p, after temperature
    and top_k (Holtzman et al., arXiv:1904.09751); 1: from all."""
    seed: Seed = 0
    """Random seed; change it for a different text."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, if the settings are invalid."""
        checked(asdict(self), Sampling)


@dataclass(frozen=True)
class Token:
    """One generated token."""

    text: str
    """The text it adds; empty while the bytes of a character are incomplete."""
    probability: float
    """Its probability, before temperature, top_k and top_p."""
    alternatives: Sequence[tuple[str, float]] = ()
    """The most likely tokens at its position, perhaps including itself, with probabilities."""
