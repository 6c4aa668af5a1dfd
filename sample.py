"""Continue a prompt with a trained run: `python3 sample.py runs/<name> --prompt "def "`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanogpt.config import ConfigError
from nanogpt.tokenizer import TokenizerError, load_tokenizer


@dataclass(frozen=True)
class Options:
    """Continue a prompt with a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, runs/<name>."""
    prompt: str = ""
    """What to continue; nothing begins a new document."""
    num_tokens: int = 500
    """Tokens to write."""
    temperature: float = 0.8
    """Logits are divided by this; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the so many likeliest tokens may follow; None for all."""
    seed: int = 0
    """Another seed, another text."""

    def check(self) -> None:
        """Raise ConfigError, in a sentence for the user, for options that make no sense."""
        if self.num_tokens < 1:
            raise ConfigError(f"num_tokens must be at least 1, not {self.num_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or a positive number: {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}.")


def main(arguments: list[str] | None = None) -> int:
    """Print the prompt and its continuation; return the exit status."""
    options = tyro.cli(Options, args=arguments)
    try:
        options.check()
        print(options.prompt + continuation(options))
    except (ConfigError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def continuation(options: Options) -> str:
    """What the run's model writes after the prompt."""
    from nanogpt.checkpoint import load_run
    from nanogpt.generate import generate
    from nanogpt.mesh import make_mesh

    hp, graph, params = load_run(options.run, make_mesh(1))
    tokenizer = load_tokenizer(hp["tokenizer"])
    tokens = generate(
        graph,
        params,
        [tokenizer.separator, *tokenizer.encode(options.prompt)],
        num_tokens=options.num_tokens,
        context=hp["sequence_length"],
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    return tokenizer.decode(tokens)


if __name__ == "__main__":
    sys.exit(main())
