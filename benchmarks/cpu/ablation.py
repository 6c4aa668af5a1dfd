"""Ablation of the recipe: small runs without one piece of it, or with one more.

    python3 -m benchmarks.cpu.ablation          # the laptop preset, one run per core at a time
    python3 -m benchmarks.cpu.ablation --gpu    # a small speedrun on the source code of Python

On CPUs the pieces of the speedrun that the laptop preset lacks are added, too. Every run uses the
same data, number of tokens and seeds as the unchanged run. The table gives the mean over the seeds
of the difference of validation losses, changed run minus unchanged, its standard deviation, and the
ratio of their times. Such small runs do not show the gain in a large one, but they show which
pieces work as intended. (Without the document mask, the same targets are validated in other rows,
which are cut anywhere.)
"""

import sys
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import TYPE_CHECKING

from benchmarks.command import Mistake, check_positive, run
from benchmarks.results import save

if TYPE_CHECKING:
    from benchmarks.cpu.proxy_runs import Change
    from train_gpt import Hyperparameters

UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Options:
    """Train with one piece of the recipe changed at a time."""

    gpu: bool = False
    """Train a small speedrun, on a GPU, instead of the laptop preset on the CPU."""
    seeds: int = 3
    """Number of runs of each kind."""
    pieces: tuple[str, ...] = ()
    """Only the changes with names that contain one of these."""
    num_steps: int | None = None
    """Steps of each run; None: 300 on the CPU, 500 on a GPU."""
    tiny: bool = False
    """Runs of one layer, step and stage, and a single piece: a test of this script only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Train with each piece changed, with every seed; print and save the table."""
    check_positive(options, "seeds", "num_steps")
    from benchmarks.cpu.proxy_runs import last_records

    proxy, seeds = proxy_of(options), range(1 if options.tiny else options.seeds)
    changes = changes_of(proxy, options)
    wanted = ("Polar Express",) if options.tiny else options.pieces
    chosen = {
        name: change
        for name, change in changes.items()
        if not wanted or any(part in name for part in wanted)
    }
    if not chosen:
        raise Mistake(f"No piece has such a name; the pieces are {'; '.join(changes)}.")
    runs = {
        (name, seed): (replace(hp, seed=seed), by_hand)
        for seed in seeds
        for name, (hp, by_hand) in {UNCHANGED: (proxy, None), **chosen}.items()
    }
    last = last_records(runs, own_core=not options.gpu)
    found = {
        name: {key: [last[name, seed][key] for seed in seeds] for key in ("val_loss", "time_s")}
        for name in (UNCHANGED, *chosen)
    }
    print_table(found)
    figures = {"tokens": proxy.schedule.tokens(proxy.num_steps), "runs": found}
    save(f"ablation_{'gpu' if options.gpu else 'cpu'}", figures, options.tiny)


def changes_of(
    proxy: "Hyperparameters", options: Options
) -> "dict[str, tuple[Hyperparameters, Change | None]]":
    """Return settings, and what else is changed, for each piece that the proxy has or may have."""
    from benchmarks.cpu.pieces import ADDITIONS, BUILT_IN, PIECES

    changed = {f"without {piece}": leave_out(proxy) for piece, leave_out in PIECES.items()}
    if not options.gpu and not options.tiny:
        changed |= {f"with {piece}": add(proxy) for piece, add in ADDITIONS.items()}
    settings = {name: (hp, None) for name, hp in changed.items() if hp != proxy}
    growing = any(stage.windows for stage in proxy.stages)  # what YaRN needs
    built_in = {piece: by_hand for piece, by_hand in BUILT_IN.items() if growing or piece != "YaRN"}
    return settings | {f"without {piece}": (proxy, change) for piece, change in built_in.items()}


def proxy_of(options: Options) -> "Hyperparameters":
    """Return the settings of the unchanged run."""
    from benchmarks.cpu.pieces import CPU, GPU

    proxy = GPU if options.gpu else CPU
    if options.num_steps is not None:
        proxy = replace(proxy, num_steps=options.num_steps)
    if options.tiny:
        thin = {"width": 32, "mlp_width": 64, "bigram_buckets": 0, "smear": False}
        one = {"num_layers": 1, "value_embeddings": 0, "vocab_size": proxy.model.vocab_size}
        model = replace(CPU.model, **thin, **one)
        proxy = replace(proxy, num_steps=1, stages=proxy.stages[:1], val_tokens=1024, model=model)
    if options.gpu:
        from benchmarks.cpu.python_sources import python_sources

        train_files, val_files = python_sources()
        proxy = replace(proxy, train_files=train_files, val_files=val_files)
    return proxy


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    """Print what each change costs, most costly first."""
    unchanged = found[UNCHANGED]
    print(f"{UNCHANGED}: {' '.join(f'{loss:.4f}' for loss in unchanged['val_loss'])}")
    print("| | loss | sd | time |\n|---|---|---|---|")
    costs = {
        name: [a - b for a, b in zip(runs["val_loss"], unchanged["val_loss"], strict=True)]
        for name, runs in found.items()
        if name != UNCHANGED
    }
    for name, cost in sorted(costs.items(), key=lambda item: -mean(item[1])):
        spread = f"{stdev(cost):.4f}" if len(cost) > 1 else "-"
        time = mean(found[name]["time_s"]) / mean(unchanged["time_s"])
        print(f"| {name} | {mean(cost):+.4f} | {spread} | {time:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
