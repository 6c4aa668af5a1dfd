"""Settings for other model sizes. JAX is not imported here, so that `--help` appears at once."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_gpt import Hyperparameters


def at_width(
    base: "Hyperparameters", num_layers: int, num_heads: int, width: int
) -> "Hyperparameters":
    """Return the settings for a model of another size, with learning rates scaled to its width.

    The rates are scaled so that a step changes activations by the same amount at any width (Yang,
    Simon and Bernstein, arXiv:2310.17813); only that of the head changes:

        Muon            constant: its updates have a spectral norm of sqrt(max(1, O / I)) at any
                        width (Bernstein and Newhouse, arXiv:2410.21265)
        Adam, head      1 / width: each logit is a sum over the width of the stream
                        (Yang et al., arXiv:2203.03466, table 3, output weights)
        Adam, others    constant: a token looks up one row, and scalars are not summed over width
                        (the same table, input weights and biases)

    These rules cover width only, not depth, batch size or the number of training tokens.
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
