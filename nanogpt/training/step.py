"""One optimizer step, and one evaluation step, over all devices of a mesh.

    batch [Ng, R, T1]      Ng micro-batches of R rows, sharded over the devices; T1 = T + 1 tokens
      each device:   gradients of its own rows, accumulated over micro-batches in float32
      all devices:   one mean over the devices
      each device:   the same optimizer update, or the update of its shard of the parameters

Gradients are reduced once per optimizer step, however many micro-batches it has. By default the
compiler would reduce them for every micro-batch; inside `jax.shard_map` the program decides when.
This is what `jax.pmap` did for a flat list of devices, in a form that also supports many hosts and
sharded parameters. With `check_vma=False` gradients stay local until they are reduced explicitly;
it also allows kernels that do not declare which values vary over devices (TPU kernels do not).

Layers are kept separate in the forward and backward pass, so that each sharded layer is gathered on
its own, and the reduction of its gradient overlaps with the backward pass of earlier layers.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Wrapped
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from nanogpt.config import GPTConfig, Kernels
from nanogpt.devices.mesh import BATCH, REPLICATED, ROWS
from nanogpt.devices.sharding import gathered, reduced, shardings, specs, sum_over_model
from nanogpt.model.gpt import GPT, XLA
from nanogpt.model.parameters import Params, layers_apart, stacked
from nanogpt.schedule import Rates
from nanogpt.training.spikes import spike_and_moments


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes."""

    step: Int[Array, ""]  # number of batches seen
    params: Params  # float32, a nested dict
    opt_state: optax.OptState
    loss_mean: Float[Array, ""]  # of recent losses: see spikes.py
    loss_variance: Float[Array, ""]


@cache
def graph_of(config: GPTConfig, kernels: Kernels = XLA) -> nnx.GraphDef:
    """Return the model without its arrays; `nnx.merge(graph, params)` is the whole model."""
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, kernels, rngs=nnx.Rngs(0))))


def init_params(config: GPTConfig, key: Key[Array, ""]) -> Params:
    """Return the initial parameters of a model, float32, as a nested dict."""
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(key))))
    return optax.tree.cast(params, jnp.float32)  # not weakly typed, like those after any step


@cache
def param_shapes(config: GPTConfig) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a model's parameters; all callers share them."""
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


def make_init(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shard_params: bool = False,
) -> Wrapped:
    """Build `init(key) -> state`, jitted: the state before the first step, placed on the mesh.

    Raises ConfigError if the mesh cannot shard it.
    """

    def init(key: Key[Array, ""]) -> TrainState:
        params, zero = init_params(config, key), jnp.zeros([])
        return TrainState(jnp.int32(0), params, optimizer.init(params), zero, zero)

    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.jit(init, out_shardings=shardings(shapes, mesh, shard_params))


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    dtype: str,
    skip_spikes: float = 0.0,
    shard_params: bool = False,
    tied_head: bool = False,
) -> Wrapped:
    """Build `train_step(state, batch, rates) -> (state, metrics)`, jitted; it donates its state.

    It minimizes the cross-entropies of the next tokens, with the target weights in `rates`. Rates
    are inputs of the program, so that it serves schedules of any kind and length.

    With `tied_head`, embedding and head start with equal values and both get the sum of their
    gradients, so they stay equal, as do their states in Adam.

    A batch with a loss or gradient that is not finite changes neither parameters nor optimizer
    state. Nor does one with a loss more than `skip_spikes` standard deviations above recent ones,
    unless `skip_spikes` is 0. `dtype` is that of the forward and backward pass.

    Metrics are scalars: `loss`, the batch's mean in nats per token before the update, `grad_norm`,
    `spike`, standard deviations from recent losses (0 at first), and `applied`: was it updated?
    """

    def train_step(
        state: TrainState, batch: Int[Array, "Ng R T1"], rates: Rates
    ) -> tuple[TrainState, dict[str, Array]]:
        apart, layers = layers_apart(graph, state.params, dtype)
        placed = specs(layers, mesh, shard_params)
        loss, gradients = jax.shard_map(
            partial(_loss_and_gradients, apart, placed, dtype),
            mesh=mesh,
            in_specs=(placed, BATCH, REPLICATED),
            out_specs=(REPLICATED, placed),
            check_vma=False,
        )(layers, batch, rates.target_weights)
        gradients = stacked(gradients)
        if tied_head:
            both = gradients["embed"] + gradients["head"].T
            gradients |= {"embed": both, "head": both.T}
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike, mean, variance = spike_and_moments(
            loss, state.loss_mean, state.loss_variance, state.step, finite
        )
        applied = finite & (spike <= skip_spikes) if skip_spikes else finite

        # Gradients of sums, not means, so that larger batches weigh more in the running means.
        tokens = batch.size // batch.shape[-1] * (batch.shape[-1] - 1)
        updates, opt_state = optimizer.update(
            jax.tree.map(lambda g: tokens * g, gradients),
            state.opt_state,
            state.params,
            rate=rates.rate,
            momentum=rates.momentum,
        )
        new = optax.apply_updates(state.params, updates), opt_state
        old = state.params, state.opt_state
        params, opt_state = jax.tree.map(partial(jnp.where, applied), new, old)
        placed = shardings((params, opt_state), mesh, shard_params)
        params, opt_state = jax.lax.with_sharding_constraint((params, opt_state), placed)
        metrics = {"loss": loss, "grad_norm": grad_norm, "spike": spike, "applied": applied}
        return TrainState(state.step + 1, params, opt_state, mean, variance), metrics

    return jax.jit(train_step, donate_argnums=0)


def _loss_and_gradients(
    graph: nnx.GraphDef,
    placed: PyTree,
    dtype: str,
    parts: Params,
    batch: Int[Array, "Ng R T1"],
    target_weights: tuple[float | Float[Array, ""], ...],
) -> tuple[Float[Array, ""], Params]:
    """Return the mean loss, and the gradients, of which each device keeps its shard.

    Call it in `jax.shard_map`.
    """
    params = gathered(parts, placed, dtype)

    def losses_of(params: Params, rows: Int[Array, "R T1"]) -> tuple[Array, Array]:
        """Return the means over the rows, or this device's terms of them (tensor parallelism)."""
        inputs, targets = rows[:, :-1], rows[:, 1:]
        objective, losses = nnx.merge(graph, params).loss(inputs, targets, target_weights)
        return objective.sum() / targets.size, losses.sum() / targets.size

    def accumulate(total, rows):
        (_, loss), gradients = jax.value_and_grad(losses_of, has_aux=True)(params, rows)
        return jax.tree.map(lambda t, n: t + n.astype(jnp.float32), total, (loss, gradients)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p)), (0.0, params))
    (loss, gradients), _ = jax.lax.scan(accumulate, zeros, batch)
    loss = jax.lax.pmean(sum_over_model(loss), "data")
    # Divided after the reduction, when each device has only its shard.
    return jax.tree.map(lambda t: t / len(batch), (loss, reduced(gradients, placed)))


def make_eval_step(
    graph: nnx.GraphDef, mesh: Mesh, dtype: str, shard_params: bool = False
) -> Wrapped:
    """Build `eval_step(params, rows, impossible)`, jitted: the summed loss of all targets, in nats.

    A negative token, ~t, is read as t, but is not a target. `impossible` has a bit for each id that
    gets no probability after an id (nanogpt/data/canonical.py), or is None.
    """

    def summed_loss(
        graph: nnx.GraphDef,
        placed: PyTree,
        parts: Params,
        rows: Int[Array, "R T1"],
        impossible: UInt8[Array, "V V8"] | None,
    ) -> Float[Array, ""]:
        model = nnx.merge(graph, gathered(parts, placed, dtype))
        inputs = jnp.where(rows < 0, ~rows, rows)[:, :-1]
        masks = None if impossible is None else impossible[inputs]
        _, losses = model.loss(inputs, rows[:, 1:], impossible=masks)
        return jax.lax.psum(sum_over_model(losses.sum()), "data")

    def eval_step(
        params: Params, rows: Int[Array, "R T1"], impossible: UInt8[Array, "V V8"] | None = None
    ) -> Float[Array, ""]:
        apart, layers = layers_apart(graph, params, dtype)
        placed = specs(layers, mesh, shard_params)
        return jax.shard_map(
            partial(summed_loss, apart, placed),
            mesh=mesh,
            in_specs=(placed, ROWS, REPLICATED),
            out_specs=REPLICATED,
            check_vma=False,
        )(layers, rows, impossible)

    return jax.jit(eval_step)
