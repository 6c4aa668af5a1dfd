"""The settings for a model of another size. No JAX here, so that `--help` answers at once."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_gpt import Hyperparameters


def at_width(
    base: "Hyperparameters", num_layers: int, num_heads: int, width: int
) -> "Hyperparameters":
    """The settings for a model of another size, with learning rates that suit its width.

    What a step does to the activations is to stay the same (Yang, Simon and Bernstein,
    arXiv:2310.17813), for which only the rate of the head changes:

        Muon            constant: its updates have a spectral norm of sqrt(max(1, O / I)) at any
                        width (Bernstein and Newhouse, arXiv:2410.21265)
        Adam, head      by 1 / width: each logit adds up as many changes as the stream is wide
                        (Yang et al., arXiv:2203.03466, table 3, output weights)
        Adam, others    constant: a token looks up one row, and scalars are no sums over the width
                        (the same table, input weights and biases)

    These rules are about width. None of them tells how the rates change with depth, with the size
    of a batch, or with how many tokens a run takes.
    """
    model, head = base.model, base.adam.head
    rate = head.learning_rate * model.width / width
    return replace(
        base,
        adam=replace(base.adam, head=replace(head, learning_rate=rate)),
        model=replace(
            model,
            num_layers=num_layers,
            num_heads=num_heads,
            width=width,
            mlp_width=4 * width,
            attention_scale=(width // num_heads) ** -0.5,
        ),
    )
