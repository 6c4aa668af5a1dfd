"""Settings for other model sizes. JAX is not imported here, so that `--help` appears at once."""

from dataclasses import replace
from math import gcd, log2, sqrt
from typing import TYPE_CHECKING

from nanogpt.adam import Adam, AdamGroups
from nanogpt.config import GPTConfig
from nanogpt.schedule import Windows

if TYPE_CHECKING:
    from train_gpt import Hyperparameters


def at_depth(base: "Hyperparameters", depth: int, tokens: float | None = None) -> "Hyperparameters":
    """Return the settings for `depth` layers: those of `base` if it has as many.

    Everything follows from the depth and the settings of `base`, marked 0 here:

        layers        L = depth, each like the layer of `base` at the same relative depth
        width         D0 * L / L0; see `shape_of`
        tokens        in proportion to the layers' matrices, unless given: compute-optimal training
                      scales both equally (Hoffmann et al., arXiv:2203.15556)
        batch         B0 * (tokens / tokens0)^0.571, as the optimal batch size (Li et al.,
                      arXiv:2503.04715), rounded to B0 times a power of two
        rates         those of `at_width`, times sqrt(B / B0) (Malladi et al., arXiv:2205.10287)
                      and (tokens / tokens0)^(-1/4), which nearly cancel except for the batch's
                      rounding; Bjorck et al. (arXiv:2409.19913) find a power of -0.32
        weight decay  rate^2 * decay * steps stays the same, so that weights shrink by the same
                      factor over the run (Wang and Aitchison, arXiv:2405.13698)
        warm-ups      the same share of the steps; the number of validations stays the same
        rows          as long as in `base`, unless they hold several documents each: then a smaller
                      batch has shorter rows, not fewer, so that as many devices can share it

    docs/sizes.md has measurements.
    """
    had, per_step = base.schedule.tokens(base.num_steps), base.schedule.tokens_per_step
    hp = at_width(base, depth, *shape_of(base.model, depth))
    hp = with_layers_like(hp, base)
    if tokens is None:
        tokens = had * matrix_weights(hp.model) / matrix_weights(base.model)
    rows = [per_step(n) // base.schedule.row_length(n) for n in range(len(base.stages))]
    most_halvings = (gcd(*rows) & -gcd(*rows)).bit_length() - 1  # whole rows in every step
    times_batch = 2.0 ** max(round(0.571 * log2(tokens / had)), -most_halvings)
    num_steps = max(1, round(base.num_steps * tokens / had / times_batch))
    longer = num_steps / base.num_steps
    faster = sqrt(times_batch) * (tokens / had) ** -0.25

    def scaled(name: str) -> Adam:
        group, old = getattr(hp.adam, name), getattr(base.adam, name)
        rate = group.learning_rate * faster
        decay = old.weight_decay * (old.learning_rate / rate) ** 2 / longer if rate else 0.0
        return replace(group, learning_rate=rate, weight_decay=decay)

    shorter = min(1.0, times_batch) if base.max_document_length else 1.0
    return replace(
        hp,
        depth=depth,
        batch_size=base.batch_size and min(base.batch_size, int(min(rows) * times_batch)),
        sequence_length=int(base.sequence_length * shorter),
        total_batch_size=int(base.total_batch_size * times_batch),
        num_steps=num_steps,
        learning_rate=base.learning_rate * faster,
        weight_decay=base.weight_decay / faster**2 / longer,
        adam=AdamGroups(**{name: scaled(name) for name in vars(hp.adam)}),
        momentum_warmup_steps=round(base.momentum_warmup_steps * longer),
        momentum_cooldown_steps=round(base.momentum_cooldown_steps * longer),
        val_loss_every=base.val_loss_every and max(1, round(base.val_loss_every * longer)),
    )


def shape_of(model: GPTConfig, depth: int) -> tuple[int, int]:
    """Return the number of heads and the width of `depth` layers with a model's proportions.

    Heads of 128, which matrix units are made for, keep their size, and the width is rounded to
    whole heads; smaller heads become wider or narrower. Paired heads need an even number.
    """
    pair, grain = 2 if model.paired_heads else 1, 128 if model.head_size % 128 == 0 else 8
    width = model.width * depth / model.num_layers
    num_heads = pair * max(1, int(width / (pair * model.head_size) + 0.5))
    return num_heads, num_heads * grain * max(1, round(width / (num_heads * grain)))


def with_layers_like(hp: "Hyperparameters", base: "Hyperparameters") -> "Hyperparameters":
    """Return the settings with each layer like that of `base` at the same relative depth."""
    L, old = hp.model.num_layers, base.model
    stretch = (old.num_layers - 1) / max(1, L - 1)
    like = [round(layer * stretch) for layer in range(L - 1)] + [old.num_layers - 1]

    def layers(named: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layer for layer in range(L) if like[layer] in old.layers(named))

    def windows(pattern: Windows) -> Windows:
        return tuple(pattern[layer % len(pattern)] for layer in like)

    def place(layer: int) -> int:
        return min(L - 1, round(layer / stretch)) if stretch else 0

    mlp_only = layers(old.mlp_only)
    own = tuple(sorted({place(layer) for layer in old.value_layers} - {*mlp_only}))
    source = None if old.attention_source is None else place(old.attention_source)
    dynamic = old.dynamic and source != L - 1
    model = replace(
        hp.model,
        mlp_only=mlp_only,
        key_offset=layers(old.key_offset),
        paired_heads=layers(old.paired_heads),
        windows=old.windows and windows(old.windows),
        value_layers=own,
        value_embeddings=len(own) or min(old.value_embeddings, L),
        attention_source=source,
        dynamic=dynamic,
        exclusive=layers(old.exclusive) if dynamic else (),
        gated=layers(old.gated) if dynamic else (),
        composed=layers(old.composed) if dynamic else (),
        skips=old.skips
        and tuple((place(a), place(b)) for a, b in old.skips if place(a) < place(b)),
        backout=None if old.backout is None else place(old.backout),
    )
    stages = tuple(
        replace(
            stage,
            windows=stage.windows and windows(stage.windows),
            validation_windows=stage.validation_windows and windows(stage.validation_windows),
        )
        for stage in base.stages
    )
    return replace(hp, model=model, stages=stages)


def matrix_weights(model: GPTConfig) -> int:
    """Return the number of weights in the matrices of a model's layers."""
    D, F = model.width, model.mlp_width
    return model.num_attentions * 4 * D * D + model.num_layers * 2 * D * F


def at_width(
    base: "Hyperparameters", num_layers: int, num_heads: int, width: int
) -> "Hyperparameters":
    """Return the settings for a model of another size, with learning rates scaled to its width.

    The rates are scaled so that a step changes activations by the same amount at any width (Yang,
    Simon and Bernstein, arXiv:2310.17813); only that of the head changes:

        Muon            constant: its updates have a spectral norm of sqrt(max(1, O / I)) at any
                        width (Bernstein and Newhouse, arXiv:2410.21265)
        Adam, head      1 / width, tied to the embedding or not: each logit is a sum over the width
                        of the stream (Yang et al., arXiv:2203.03466, table 3, output weights)
        Adam, others    constant: a token looks up one row, and scalars are not summed over width
                        (the same table, input weights and biases)

    These rules cover width only, not depth, batch size or the number of training tokens.
    """
    model, head = base.model, base.adam.head
    head = replace(head, learning_rate=head.learning_rate * (model.width / width))
    embedding = head if model.tied_head else base.adam.embedding
    return replace(
        base,
        adam=replace(base.adam, head=head, embedding=embedding),
        model=replace(
            model,
            num_layers=num_layers,
            num_heads=num_heads,
            width=width,
            mlp_width=4 * width,
            bigram_width=model.bigram_width and max(1, model.bigram_width * width // model.width),
            attention_scale=model.attention_scale * sqrt(model.head_size / (width // num_heads)),
        ),
    )
