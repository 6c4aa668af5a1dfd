"""Ablation of the recipe: a small speedrun, with one piece left out at a time.

    python3 -m benchmarks.cpu.ablation          # on CPUs, one run per core at a time
    python3 -m benchmarks.cpu.ablation --gpu    # on Python's packages, in GPT-2 tokens

Every run uses the same data, number of tokens and seeds as the run with all pieces. The table gives
the loss that each piece saves: the mean over the seeds of the difference of validation losses, run
without it minus run with it, and its standard deviation. A proxy does not show the gain in a large
run, but it shows which pieces work as intended. (Without the document mask, the same targets are
validated in other rows, which are cut anywhere.)
"""

import sys
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import TYPE_CHECKING

from benchmarks.command import Mistake, check_positive, run
from benchmarks.results import save

if TYPE_CHECKING:
    from train_gpt import Hyperparameters


@dataclass(frozen=True)
class Options:
    """Train a small speedrun with one piece of its recipe left out at a time."""

    gpu: bool = False
    """Use the larger proxy, on a GPU, instead of the small one on the CPU."""
    seeds: int = 3
    """Number of runs of each kind."""
    pieces: tuple[str, ...] = ()
    """Only the pieces with names that contain one of these."""
    num_steps: int | None = None
    """Steps of each run; None: those of the proxy."""
    tiny: bool = False
    """Runs of one layer, step and stage, and a single piece: a test of this script only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Train with each piece left out, with every seed; print and save the table."""
    check_positive(options, "seeds", "num_steps")
    from benchmarks.cpu.pieces import BUILT_IN, PIECES
    from benchmarks.cpu.proxy_runs import final_losses

    proxy, seeds = proxy_of(options), range(1 if options.tiny else options.seeds)
    variants = {piece: leave_out(proxy) for piece, leave_out in PIECES.items()}
    # Leave out pieces that the proxy does not have.
    variants = {piece: hp for piece, hp in variants.items() if hp != proxy}
    variants |= dict.fromkeys(BUILT_IN, proxy)
    wanted = ("YaRN",) if options.tiny else options.pieces
    pieces = [name for name in variants if not wanted or any(part in name for part in wanted)]
    if not pieces:
        raise Mistake(f"No piece has such a name; the pieces are {', '.join(variants)}.")
    runs = {
        (piece, seed): (replace(variants.get(piece, proxy), seed=seed), BUILT_IN.get(piece))
        for seed in seeds
        for piece in (None, *pieces)
    }
    found = final_losses(runs, own_core=not options.gpu)
    losses = {piece: [found[piece, seed] for seed in seeds] for piece in (None, *pieces)}
    print_table(losses)
    figures = {
        "tokens": proxy.schedule.tokens(proxy.num_steps),
        "with_everything": losses.pop(None),
        "without": losses,
    }
    save(f"ablation_{'gpu' if options.gpu else 'cpu'}", figures, options.tiny)


def proxy_of(options: Options) -> "Hyperparameters":
    """Return the settings of the run with all pieces."""
    from benchmarks.cpu.pieces import CPU, GPU

    proxy = GPU if options.gpu else CPU
    if options.num_steps is not None:
        proxy = replace(proxy, num_steps=options.num_steps)
    if options.tiny:
        thin = {"width": 32, "mlp_width": 64, "bigram_buckets": 64, "bigram_width": 8}
        one = {"num_layers": 1, "mlp_only": (), "skips": (), "value_embeddings": 1}
        places = {"key_offset": (0,), "value_layers": (0,)}
        plain = {"attention_source": None, "dynamic": False}
        plain |= dict.fromkeys(("exclusive", "gated", "composed"), ())
        model = replace(proxy.model, **thin, **one, **places, **plain)
        proxy = replace(proxy, num_steps=1, stages=proxy.stages[:1], val_tokens=1024, model=model)
    if options.gpu:
        from benchmarks.cpu.python_sources import python_sources

        train_files, val_files = python_sources()
        proxy = replace(proxy, train_files=train_files, val_files=val_files)
    return proxy


def print_table(losses: dict[str | None, list[float]]) -> None:
    """Print what each piece saves, largest first; losses[None] are those with all pieces."""
    print(f"with everything: {' '.join(f'{loss:.4f}' for loss in losses[None])}")
    print("| without | costs | sd |\n|---|---|---|")
    gains = {
        piece: [without - whole for without, whole in zip(values, losses[None], strict=True)]
        for piece, values in losses.items()
        if piece is not None
    }
    for piece, gain in sorted(gains.items(), key=lambda item: -mean(item[1])):
        spread = f"{stdev(gain):.4f}" if len(gain) > 1 else "-"
        print(f"| {piece} | {mean(gain):+.4f} | {spread} |")


if __name__ == "__main__":
    sys.exit(main())
