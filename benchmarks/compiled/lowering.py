"""Lowering the programs of a planned run for devices that are not present."""

import jax
from jax.sharding import Mesh
from jax.stages import Lowered

from nanogpt.training.plan import Plan, optimizer_of
from nanogpt.training.programs import lowered
from nanogpt.training.step import make_init


def lowered_for(mesh: Mesh, plan: Plan, stage: int) -> dict[str, Lowered]:
    """Lower the training step and the validation of a stage, counted from 0."""
    optimizer = optimizer_of(plan.hp, mesh, plan.shard_params)
    init = make_init(plan.hp.model, optimizer, mesh, plan.shard_params)
    steps = {stage: plan.stages[stage].first_step}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return {name: x for (name, _), x in lowered(plan, mesh, optimizer, init, steps).items()}
