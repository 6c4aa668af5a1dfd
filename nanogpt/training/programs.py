"""The programs of a run: compiled, tried and fitted into memory before its clock starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from jaxtyping import Array, Int, Key
from rich.console import Console

from nanogpt.devices.compilation import compile_all, first_that_fits, memory_of
from nanogpt.devices.mesh import BATCH, REPLICATED, ROWS, shapes_on
from nanogpt.schedule import Rates
from nanogpt.training.checkpoint import load_state
from nanogpt.training.inputs import Inputs
from nanogpt.training.plan import Plan, optimizer_of
from nanogpt.training.start import Start
from nanogpt.training.step import (
    Params,
    TrainState,
    graph_of,
    make_eval_step,
    make_init,
    make_train_step,
)
from nanogpt.training.validation import validation_loss

Init = Callable[[Key[Array, ""]], TrainState]


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a run, with their compile and step times."""

    plan: Plan
    """The plan, with micro-batches that fit into memory."""
    inputs: Inputs
    init: Init
    """Returns the state before the first step."""
    train: dict[int, Compiled]
    """Training steps by stage: (state, batch, rates) -> (state, metrics)."""
    validate: dict[int, Compiled]
    """Evaluation steps by stage: (params, rows) -> sum of the losses."""
    compile_seconds: dict[tuple[str, int], float]
    """Compile times by name and stage."""
    step_seconds: dict[int, float]
    """Time of one training step, by stage."""

    def train_step(self, step: int) -> Compiled:
        """Return the program of an optimizer step."""
        return self.train[self.plan.hp.schedule.stage(step)]

    def batch(self, step: int) -> Int[Array, "Ng R T1"]:
        """Return the batch of an optimizer step, on the devices."""
        return self.inputs.batch(self.plan, step)

    def validation_loss(
        self, params: Params, step: int, broken_off: Callable[[], bool]
    ) -> float | None:
        """Return the validation loss after a step, or None once `broken_off()` is true."""
        stage = self.plan.hp.schedule.stage(step)
        batches = self.inputs.validation(self.plan, stage)
        eval_step = self.validate[stage]
        return validation_loss(
            lambda params, rows: eval_step(params, rows, self.inputs.impossible),
            params,
            batches,
            self.plan.hp.val_tokens,
            broken_off,
        )

    @property
    def memory(self) -> float:
        """Bytes that the largest program needs on each device."""
        return max(map(memory_of, [*self.train.values(), *self.validate.values()]))

    def seconds_from(self, first_step: int) -> float:
        """Estimate the seconds of training from this step to the last."""
        stages = self.plan.stages
        return sum(
            seconds * (stages[number].last_step - max(first_step, stages[number].first_step) + 1)
            for number, seconds in self.step_seconds.items()
        )

    def first_state(self, start: Start) -> TrainState:
        """Return the state to start from: a new one, or that of the checkpoint."""
        key = jax.random.key(self.plan.hp.seed)
        if start.checkpoint is None:
            return self.init(key)
        return load_state(start.checkpoint, jax.eval_shape(self.init, key))


def prepare_programs(
    plan: Plan,
    mesh: Mesh,
    inputs: Inputs,
    start: Start,
    console: Console,
    say: Callable[[str], None],
) -> Programs:
    """Compile and try every program the run still needs, with smaller plans if memory runs out.

    Raises ConfigError if not even one row per device fits.
    """
    hp = plan.hp
    optimizer = optimizer_of(hp, mesh, plan.shard_params)
    init = make_init(hp.model, optimizer, mesh, plan.shard_params)
    fresh = partial(init, jax.random.key(hp.seed))

    def attempt(plan: Plan) -> Programs:
        stages = first_steps(plan, start)
        programs, seconds = compile_all(lowered(plan, mesh, optimizer, init, stages), console)
        train = {stage: programs["training step", stage] for stage in stages}
        validate = {stage: programs["validation", stage] for stage in stages}
        tried = {
            stage: seconds_of(
                train[stage], fresh, inputs.batch(plan, step), hp.schedule.rates(step)
            )
            for stage, step in stages.items()
        }
        return Programs(plan, inputs, init, train, validate, seconds, tried)

    def smaller(failed: Plan) -> Plan | None:
        less = failed.smaller()
        if less and less.batch_size < failed.batch_size:
            say(
                f"out of memory with micro-batches of {failed.batch_size} rows: now "
                f"{less.batch_size}, Ng = {less.shape(0)[0]}"
            )
        elif less:
            say("out of memory with one row: layers are now recomputed in the backward pass")
        return less

    return first_that_fits(attempt, plan, smaller)


def first_steps(plan: Plan, start: Start) -> dict[int, int]:
    """Return the remaining stages, each with its first remaining step."""
    first = [max(start.first_record, stage.first_step) for stage in plan.stages]
    return {n: step for n, step in enumerate(first) if step <= plan.stages[n].last_step}


def lowered(
    plan: Plan,
    mesh: Mesh,
    optimizer: optax.GradientTransformationExtraArgs,
    init: Init,
    stages: dict[int, int],
) -> dict[tuple[str, int], Lowered]:
    """Lower the training and evaluation step of each stage, ready to be compiled."""
    hp, programs, V = plan.hp, {}, plan.hp.model.padded_vocab_size
    state = jax.eval_shape(init, jax.random.key(0))
    impossible = jax.ShapeDtypeStruct((V, V // 8), jnp.uint8) if hp.canonical_masking else None
    for stage, step in stages.items():
        graph, (Ng, R) = graph_of(plan.stages[stage].model, plan.kernels), plan.shape(stage)
        used = graph_of(plan.stages[stage].used_model, plan.kernels)
        rates = jax.tree.map(
            lambda _: jax.ShapeDtypeStruct((), jnp.float32), hp.schedule.rates(step)
        )
        rows = jax.ShapeDtypeStruct((R, plan.stages[stage].row_length + 1), jnp.int32)
        batch = jax.ShapeDtypeStruct((Ng, *rows.shape), jnp.int32)
        tied = plan.stages[stage].tied_head
        train_step = make_train_step(
            graph, optimizer, mesh, hp.dtype, hp.skip_spikes, plan.shard_params, tied
        )
        eval_step = make_eval_step(used, mesh, hp.dtype, plan.shard_params)
        programs["training step", stage] = train_step.lower(
            state, shapes_on(mesh, BATCH, batch), rates
        )
        programs["validation", stage] = eval_step.lower(
            state.params, shapes_on(mesh, ROWS, rows), shapes_on(mesh, REPLICATED, impossible)
        )
    return programs


def seconds_of(
    train_step: Compiled, fresh: Callable[[], TrainState], batch: jax.Array, rates: Rates
) -> float:
    """Return the time of a step, after a first one that may be slow or run out of memory."""
    seconds = 0.0
    for _ in range(2):
        state = jax.block_until_ready(fresh())
        begun = time.perf_counter()
        jax.block_until_ready(train_step(state, batch, rates))
        seconds = time.perf_counter() - begun
    return seconds
