"""What a finished run shows: its loss curve, a sample, and what to do next."""

from typing import TYPE_CHECKING

import jax

from nanogpt.inference.text import sample
from nanogpt.report.picture import loss_png
from nanogpt.runs.folder import Run
from nanogpt.runs.session import what_next

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from nanogpt.training.plan import Plan
    from nanogpt.training.step import Params


def show_result(run: Run, plan: "Plan", params: "Params", mesh: "Mesh") -> None:
    """Plot the loss, generate a sample and print what to do next."""
    if jax.process_index() == 0:
        try:
            run.say(f"loss curve: {loss_png(run.folder)}")
        except Exception as error:  # a broken Matplotlib must not prevent the sample
            run.say(f"WARNING: could not plot the loss: {error}")
    if plan.hp.sample_tokens:
        run.say(sample(plan, params, mesh))
    run.say(what_next(run))
