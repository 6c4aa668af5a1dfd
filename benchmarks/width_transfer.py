"""Whether learning rates carry over to another width, by the rule of the larger presets.

    .venv/bin/python -m benchmarks.width_transfer

Small models of two widths, all else equal, are trained with the rates that `at_width` gives
them, and with a multiple of Muon's or of the head's. If the rule holds, the multiple that is best
at one width is best at the other, too. A rate of the head that stayed constant would be a quarter
of the rule's at a quarter of the base's width. One run per core at a time.
"""

from dataclasses import replace

from benchmarks.ablation import final_losses
from benchmarks.results import save
from train_gpt import PRESETS, Hyperparameters, at_width

BASE = replace(
    PRESETS["baseline"],
    train_files=None,
    val_files=None,
    tokenizer="bytes",
    shuffle=True,
    batch_size=4,
    sequence_length=128,
    total_batch_size=1024,
    num_steps=150,
    cooldown_fraction=0.5,
    momentum_warmup_steps=50,
    val_loss_every=0,
    val_tokens=65_536,
    device="cpu",
    dtype="float32",
    sample_tokens=0,
    checkpoint_every=0,
    model=replace(PRESETS["baseline"].model, vocab_size=256, num_layers=2, num_heads=8, width=128),
)
HEAD_SIZE = 16
WIDTHS = (32, 128)
TIMES = {
    "learning_rate": (1 / 4, 1 / 2, 1, 2),
    "head_learning_rate": (1 / 4, 1 / 2, 2, 4),  # 1 is among the others
}


def with_rate(width: int, name: str, times: float) -> Hyperparameters:
    """The settings of a run: one rate is multiplied, all others are the rule's."""
    hp = at_width(BASE, BASE.model.num_layers, width // HEAD_SIZE, width)
    return replace(hp, **{name: times * getattr(hp, name)})


def main() -> None:
    """Train at each width with each rate; print the table, and save it."""
    runs = {
        (name, times, width): (with_rate(width, name, times), None)
        for width in reversed(WIDTHS)  # the longest first
        for name, each in TIMES.items()
        for times in each
    }
    losses = final_losses(runs, own_core=True)
    losses |= {
        ("head_learning_rate", 1, width): losses["learning_rate", 1, width] for width in WIDTHS
    }
    print(f"| rate | times | {' | '.join(f'width {width}' for width in WIDTHS)} |")
    print("|---" * (2 + len(WIDTHS)) + "|")
    table = {name: {} for name in TIMES}
    for name, times in sorted({(name, times) for name, times, _ in losses}):
        row = [losses[name, times, width] for width in WIDTHS]
        table[name][times] = dict(zip(WIDTHS, row, strict=True))
        print(f"| {name} | {times:g} | {' | '.join(f'{loss:.4f}' for loss in row)} |")
    save("width_transfer", {"tokens": BASE.schedule.tokens(BASE.num_steps), "losses": table})


if __name__ == "__main__":
    main()
