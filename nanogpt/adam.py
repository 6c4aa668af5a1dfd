"""Adam's settings for each group of parameters; nanogpt/optim/groups.py says what is in a group."""

from dataclasses import dataclass, fields
from typing import ClassVar

from nanogpt.checks import Decay, NotNegative


@dataclass(frozen=True)
class Adam:
    """Adam's settings for a group of parameters."""

    learning_rate: NotNegative
    """Learning rate."""

    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay rates of the first and second moments."""

    weight_decay: NotNegative = 0.0
    """Cautious weight decay: rate^2 times this, where the update already shrinks the weight."""


@dataclass(frozen=True)
class AdamGroups:
    """Adam's settings for each group of parameters. The defaults are the speedrun's."""

    # Groups that are trained as part of `scalars` if their settings are the same, as in older runs.
    LATER: ClassVar = (
        *("stream", "additions", "connections", "connection_biases"),
        *("dynamic_gates", "dynamic_gate_biases"),
    )

    embedding: Adam = Adam(0.008, (0.5, 0.95), 0.75)
    """Token embedding."""
    head: Adam = Adam(0.008, (0.5, 0.95), 0.75)
    """Output head."""
    tables: Adam = Adam(0.6, (0.75, 0.95), 0.025)
    """Value and bigram embeddings."""
    gates: Adam = Adam(0.008, (0.9, 0.99), 0.005)
    """Attention gates and value gates."""
    smear_gate: Adam = Adam(0.00008)
    """Gate of the smear."""
    skip_gate: Adam = Adam(0.0004)
    """Gates of the skips."""
    shortcuts: Adam = Adam(0.008, (0.9, 0.95))
    """Weights of the token embeddings added in each layer."""
    stream: Adam = Adam(0.04, (0.9, 0.95))
    """Weights of the stream in each layer."""
    additions: Adam = Adam(0.008, (0.9, 0.95))
    """Weights of bigrams, attention and MLP in each layer."""
    scalars: Adam = Adam(0.04)
    """All other scalars."""
    connections: Adam = Adam(0.002, weight_decay=0.005)
    """Dynamic connections."""
    connection_biases: Adam = Adam(0.002)
    """Their biases."""
    dynamic_gates: Adam = Adam(0.0008, weight_decay=0.005)
    """The MLPs that compute dynamic gates."""
    dynamic_gate_biases: Adam = Adam(0.0008)
    """Their biases and scale."""

    @classmethod
    def alike(
        cls, tables: float, head: float, others: float, betas: tuple[float, float]
    ) -> "AdamGroups":
        """Return groups with three rates (tables, head, everything else) and the same betas."""
        few = {each.name for each in fields(cls)} - {"embedding", "head", "tables"}
        return cls(
            embedding=Adam(tables, betas),
            head=Adam(head, betas),
            tables=Adam(tables, betas),
            **{name: Adam(others, betas) for name in few},
        )
