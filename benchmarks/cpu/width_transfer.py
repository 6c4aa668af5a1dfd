"""Do learning rates transfer to another width, by the rule of the larger presets?

    python3 -m benchmarks.cpu.width_transfer

Small models of two widths, otherwise equal, are trained with the rates from `at_width`, and with
multiples of Muon's or the head's rate. If the rule holds, the best multiple is the same at both
widths. A constant rate of the head would be a quarter of the rule's rate at a quarter of the base
width. One run per core at a time.
"""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.command import run
from benchmarks.results import save

if TYPE_CHECKING:
    from train_gpt import Hyperparameters

HEAD_SIZE = 16
WIDTHS = (32, 128)
TIMES = {
    "matrices": (1 / 4, 1 / 2, 1, 2),
    "head": (1 / 4, 1 / 2, 2, 4),  # 1 is among the others
}
TINY_TIMES = {"matrices": (1,), "head": ()}


@dataclass(frozen=True)
class Options:
    """Train small models of two widths with multiples of the learning rates."""

    tiny: bool = False
    """Train one layer of one width for a step, without multiples: a test of this script only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Train at each width with each rate; print and save the table."""
    from benchmarks.cpu.proxy_runs import final_losses

    num_steps, val_tokens, times = (1, 1024, TINY_TIMES) if options.tiny else (150, 65_536, TIMES)
    widths = WIDTHS[:1] if options.tiny else WIDTHS
    base = base_of(num_steps, val_tokens, num_layers=1 if options.tiny else 2)
    runs = {
        (name, factor, width): (with_rate(base, width, name, factor), None)
        for width in reversed(widths)  # the longest first
        for name, factors in times.items()
        for factor in factors
    }
    losses = final_losses(runs, own_core=True)
    losses |= {("head", 1, width): losses["matrices", 1, width] for width in widths}
    print(f"| rate | times | {' | '.join(f'width {width}' for width in widths)} |")
    print("|---" * (2 + len(widths)) + "|")
    table = {name: {} for name in times}
    for name, factor in sorted({(name, factor) for name, factor, _ in losses}):
        row = [losses[name, factor, width] for width in widths]
        table[name][factor] = dict(zip(widths, row, strict=True))
        print(f"| {name} | {factor:g} | {' | '.join(f'{loss:.4f}' for loss in row)} |")
    figures = {"tokens": base.schedule.tokens(num_steps), "losses": table}
    save("width_transfer", figures, options.tiny)


def base_of(num_steps: int, val_tokens: int, num_layers: int) -> "Hyperparameters":
    """Return the base run, at the larger width."""
    from benchmarks.cpu.proxy_runs import on_bytes

    return on_bytes(
        "baseline",
        {"num_layers": num_layers, "num_heads": 8, "width": 128},
        total_batch_size=1024,
        num_steps=num_steps,
        cooldown_fraction=0.5,
        val_tokens=val_tokens,
    )


def with_rate(base: "Hyperparameters", width: int, name: str, times: float) -> "Hyperparameters":
    """Return the settings of a run with one rate multiplied, all others given by the rule."""
    from train_gpt import at_width

    hp = at_width(base, base.model.num_layers, width // HEAD_SIZE, width)
    if name == "matrices":
        return replace(hp, learning_rate=times * hp.learning_rate)
    head = replace(hp.adam.head, learning_rate=times * hp.adam.head.learning_rate)
    return replace(hp, adam=replace(hp.adam, head=head))


if __name__ == "__main__":
    sys.exit(main())
