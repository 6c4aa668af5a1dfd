"""Which form of the same attention layer is fastest in XLA on this CPU?

    python3 -m benchmarks.cpu.forms

Every form computes one layer (queries, keys and values from the stream, norm, rotation, causal
attention, projection back) and all its gradients, with the same results. The forms alternate, so
that other processes slow all of them equally; the table gives the best of many rounds of each, in
ms and as a ratio to the form in `nanogpt/model/gpt.py`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.command import check_positive, run
from benchmarks.results import save
from benchmarks.timing import best_in_turn, seconds


@dataclass(frozen=True)
class Options:
    """Time several forms of an attention layer on this CPU."""

    rounds: int = 300
    """Each figure is the best of this many."""
    tiny: bool = False
    """Two rounds only: a test of this script, not of the speed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run(Options, compare, arguments)


def compare(options: Options) -> None:
    """Check that the forms agree, time them, print a table, and save the figures."""
    check_positive(options, "rounds")
    from benchmarks.cpu.attention_forms import B, H, N, T

    steps = agreeing_steps()
    best = best_in_turn(steps, 2 if options.tiny else options.rounds)
    base = best["as in the model"]
    print(f"one attention layer, B {B}, T {T}, N {N}, H {H}, forward and backward, float32")
    for name, time in best.items():
        print(f"{name:42}{1e3 * time:8.2f} ms{time / base:7.2f}")
    figures = {"ms": {name: round(1e3 * time, 3) for name, time in best.items()}}
    save("cpu_forms", figures, options.tiny)


def agreeing_steps() -> dict[str, Callable[[], float]]:
    """Return functions that time each form with its gradients; AssertionError if one differs."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.cpu.attention_forms import FORMS, B, D, T

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {(B, T, D): T**0.5, (D, 3 * D): 1.0, (D, D): 1.0}
    arguments = [
        jax.random.normal(key, shape) * shape[-2] ** -0.5 * scale
        for key, (shape, scale) in zip(keys, shapes.items(), strict=True)
    ]

    def step(form: Callable) -> Callable[..., Any]:
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(form(*a) ** 2), (0, 1, 2)))

    steps = {name: step(form) for name, form in FORMS.items()}
    results = {name: jax.tree.leaves(step(*arguments)) for name, step in steps.items()}
    for name, result in results.items():
        for got, want in zip(result, results["as in the model"], strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-2, err_msg=name)
    return {name: partial(seconds, step, *arguments) for name, step in steps.items()}


if __name__ == "__main__":
    sys.exit(main())
