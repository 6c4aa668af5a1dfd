"""Does one number decide everything? Losses of models that `--depth` sizes, and of neighbors.

    python3 -m benchmarks.cpu.depths

The `laptop` preset is trained at several depths, with all settings from the rule in
`nanogpt/sizes.py`. At two depths its rates or its batch are also halved and doubled: if the rule is
right, no such neighbor is better by more than seeds differ. Two more depths are trained with the
FLOPs of the preset: if the rule's tokens per weight are right, none is better than the preset. A
power law through the losses of all depths but the largest predicts that of the largest before it is
trained. Prints the tables of docs/sizes.md and draws docs/sizes.png, in two hours on two cores.
"""

import sys
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from benchmarks import results
from benchmarks.command import ROOT, run
from benchmarks.results import save

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float64

    from nanogpt.report.compute import PowerLaw
    from train_gpt import Hyperparameters

    Name = tuple[int, str, int]  # depth, what differs from the rule, seed

SEEDS = {1: 3, 2: 3, 3: 3, 4: 1}  # by depth
LARGEST = 5
ENDS = 2, 4  # depths at which neighbors are trained
RULE, SAME_FLOPS = "none", "tokens, for the FLOPs of the preset"


@dataclass(frozen=True)
class Options:
    """Train the laptop preset at several depths, and neighbors of the rule's settings."""

    tiny: bool = False
    """Train two models for a few steps: a test of this script only."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    depth: int
    differs: str
    """What differs from the rule."""
    seed: int
    width: int
    weights_in_matrices: int
    tokens: int
    batch: int
    steps: int
    flops: float
    seconds: float
    """Time of training."""
    loss: float
    """Validation loss, in nats per byte."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, measure, arguments)


def measure(options: Options) -> None:
    """Train all models; print and save the tables, and draw the picture."""
    from nanogpt.report.compute import fit

    runs, largest = all_settings(), sized(LARGEST)
    if options.tiny:
        smallest, largest = (1, RULE, 0), few_steps(sized(2))
        runs = {smallest: few_steps(runs[smallest])}
    found = trained(runs, own_core=True)
    law = fit(*means(found).T) if len(means(found)) >= 4 else None
    figures = {}
    if law:
        loss, error = float(law.loss(flops(largest))), law.error(flops(largest))
        figures = {"fit": f"{law}", "predicted": loss, "standard_error": error}
        print(f"fit: {law}\npredicted for depth {LARGEST}: {loss:.4f} ± {error:.4f}")
    # The prediction is saved before the largest model is trained.
    save("depths", figures | {"runs": [vars(each) for each in found]}, options.tiny)
    found += trained({(largest.model.num_layers, RULE, 0): largest}, own_core=False)
    save("depths", figures | {"runs": [vars(each) for each in found]}, options.tiny)
    print_sizes(found)
    print_others(found)
    draw(
        found, law, results.FOLDER / "depths_tiny.png" if options.tiny else ROOT / "docs/sizes.png"
    )


def all_settings() -> "dict[Name, Hyperparameters]":
    """Return the settings of every run but the largest, the longest first."""
    from train_gpt import PRESETS

    preset = PRESETS["laptop"]
    runs: dict[Name, Hyperparameters] = {}
    for depth in sorted(SEEDS, reverse=True):
        hp = sized(depth)
        runs |= {(depth, RULE, seed): replace(hp, seed=seed) for seed in range(SEEDS[depth])}
        if depth in ENDS:
            for times in (0.5, 2.0):
                runs[depth, f"rates x {times:g}", 0] = replace(hp, learning_rate_factor=times)
                runs[depth, f"batch x {times:g}", 0] = with_batch(hp, times)
        if abs(depth - preset.model.num_layers) == 1:
            tokens = hp.schedule.tokens(hp.num_steps) * flops(preset) / flops(hp)
            runs[depth, SAME_FLOPS, 0] = sized(depth, tokens)
    return runs


def sized(depth: int, tokens: float | None = None) -> "Hyperparameters":
    """Return the laptop preset at a depth, validated and saved only at its end."""
    from nanogpt.sizes import at_depth
    from train_gpt import PRESETS

    hp = replace(at_depth(PRESETS["laptop"], depth, tokens), val_loss_every=0, device="cpu")
    return replace(hp, sample_tokens=0, checkpoint_every=0)


def with_batch(hp: "Hyperparameters", times: float) -> "Hyperparameters":
    """Return the settings with another batch for the same tokens, and rates that suit it."""
    return replace(
        hp,
        total_batch_size=round(hp.total_batch_size * times),
        num_steps=round(hp.num_steps / times),
        momentum_warmup_steps=round(hp.momentum_warmup_steps / times),
        learning_rate_factor=sqrt(times),
    )


def few_steps(hp: "Hyperparameters") -> "Hyperparameters":
    """Return the settings with few tokens."""
    return replace(hp, num_steps=2, total_batch_size=512, val_tokens=1024)


def flops(hp: "Hyperparameters") -> float:
    """Return the FLOPs of a run."""
    from nanogpt.devices.hardware import training_flops

    return training_flops(hp.model, hp.schedule, hp.num_steps)


def trained(runs: "dict[Name, Hyperparameters]", own_core: bool) -> list[Result]:
    """Train, each run on one core of its own or one run on all; return the results."""
    from benchmarks.cpu.proxy_runs import last_records
    from nanogpt.sizes import matrix_weights

    last = last_records({name: (hp, None) for name, hp in runs.items()}, own_core)
    return [
        Result(
            *name,
            hp.model.width,
            matrix_weights(hp.model),
            hp.schedule.tokens(hp.num_steps),
            hp.total_batch_size,
            hp.num_steps,
            flops(hp),
            last[name]["time_s"],
            last[name]["val_loss"],
        )
        for name, hp in runs.items()
    ]


def of(found: list[Result], differs: str) -> dict[int, list[Result]]:
    """Return the runs that differ from the rule in one way, by depth from the smallest."""
    depths = sorted({each.depth for each in found if each.differs == differs})
    return {
        depth: [each for each in found if (each.depth, each.differs) == (depth, differs)]
        for depth in depths
    }


def means(found: list[Result]) -> "Float64[np.ndarray, 'depths 2']":
    """Return FLOPs and mean loss of each depth, sized by the rule."""
    import numpy as np

    runs = of(found, RULE).values()
    return np.array([(each[0].flops, fmean(r.loss for r in each)) for each in runs])


def print_sizes(found: list[Result]) -> None:
    """Print the table of the rule's sizes."""
    print("\n| depth | width | weights in matrices | tokens | batch | steps | FLOPs | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for depth, runs in of(found, RULE).items():
        r, losses = runs[0], [each.loss for each in runs]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        print(
            f"| {depth} | {r.width} | {r.weights_in_matrices:,} | {r.tokens:,} | {r.batch:,} "
            f"| {r.steps:,} | {r.flops:.2e} | {fmean(losses):.4f}{spread} |"
        )


def print_others(found: list[Result]) -> None:
    """Print how the neighbors differ from the rule, and other depths with the preset's FLOPs."""
    from train_gpt import PRESETS

    rule = of(found, RULE)
    print(
        "\n| depth | differs | loss, less the rule's mean | time, over the rule's |"
        "\n|---|---|---|---|"
    )
    for each in found:
        if each.differs not in (RULE, SAME_FLOPS):
            others, same_seed = rule[each.depth], rule[each.depth][0]
            print(
                f"| {each.depth} | {each.differs} "
                f"| {each.loss - fmean(other.loss for other in others):+.4f} "
                f"| {each.seconds / same_seed.seconds:.2f} |"
            )
    others = of(found, SAME_FLOPS)
    if preset := rule.get(PRESETS["laptop"].model.num_layers):
        others[preset[0].depth] = preset
    print("\n| depth | tokens | FLOPs | loss |\n|---|---|---|---|")
    for depth, runs in sorted(others.items()):
        loss = fmean(each.loss for each in runs)
        print(f"| {depth} | {runs[0].tokens:,} | {runs[0].flops:.2e} | {loss:.4f} |")


def draw(found: list[Result], law: "PowerLaw | None", path: Path) -> None:
    """Draw loss against compute with the fit, which does not include the largest depth."""
    import numpy as np

    from nanogpt.report.picture import COLOURS, new_figure, own_style

    with own_style():
        figure = new_figure(6.4, 4)
        axes = figure.subplots()
        for depth, (x, y) in zip(of(found, RULE), means(found), strict=True):
            new = depth == LARGEST
            axes.plot(x, y, "D" if new else "o", c=COLOURS[new], label="_")
            axes.annotate(f"depth {depth}", (x, y), (6, 4), textcoords="offset points")
        if law:
            x = np.geomspace(*means(found)[[0, -1], 0], 100)
            label = f"fit to depths 1 to {LARGEST - 1}"
            axes.plot(x, law.loss(x), c=COLOURS[0], lw=1, label=label)
            axes.legend()
        axes.set(xscale="log", xlabel="FLOPs", ylabel="validation loss (nats per byte)")
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
