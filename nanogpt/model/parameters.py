"""A model's parameters, as they are stored and as they are used in computation.

They are stored in float32, with the layers stacked: each array of the attentions, or of the MLPs,
has a leading axis of layers, so that even a deep model has few arrays. The computation uses a copy
in the dtype of the run, with separate arrays for each layer.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from nanogpt.config import GPTConfig

Params = PyTree[Float[Array, "..."]]


def matrix(
    key: Key[Array, ""], shape: tuple[int, ...], spread: float = 0.5
) -> Float[Array, "*stack I O"]:
    """Sample uniform matrices with a standard deviation of spread / sqrt(I)."""
    bound = spread * (3 / shape[-2]) ** 0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def project(x: Float[Array, "*B I"], weight: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """Return x @ weight as one product of two matrices, the fastest form on XLA's CPU backend."""
    return (x.reshape(-1, weight.shape[0]) @ weight).reshape(*x.shape[:-1], weight.shape[1])


def is_table(path: tuple[jax.tree_util.DictKey, ...]) -> bool:
    """Return whether the parameter at this path is an embedding table, indexed by tokens."""
    return path[-1].key.endswith("embed")


def compute_copy(params: Params, dtype: str) -> Params:
    """Return a copy of a GPT's parameters in `dtype`, for the forward and backward pass.

    Tables stay float32: the gradient of a row is summed over all tokens that use it, thousands for
    a frequent one, and in bfloat16 such a sum stops growing after a few hundred.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p if is_table(path) else p.astype(dtype), params
    )


def stack(
    kind: Callable[..., nnx.Module], count: int, config: GPTConfig, key: Key[Array, ""]
) -> nnx.Module:
    """Create `count` modules of a kind as one, with a leading axis in each array."""
    make = nnx.vmap(lambda key: kind(config, rngs=nnx.Rngs(key)))
    return make(jax.random.split(key, count))


def unstack(stacked: nnx.Module, count: int) -> Iterator[nnx.Module]:
    """Yield the modules one by one, for unrolled loops in which layers may differ.

    It splits each stacked array once instead of slicing it per layer: the gradient is then one
    concatenation instead of a sum of zero-padded arrays.
    """
    if isinstance(stacked, nnx.List):  # already separate
        yield from stacked
        return
    graphdef, arrays = nnx.split(stacked)
    leaves, structure = jax.tree.flatten(arrays)
    rows = [jnp.split(leaf, count) for leaf in leaves]
    for layer in zip(*rows, strict=True):
        yield nnx.merge(graphdef, jax.tree.unflatten(structure, [row[0] for row in layer]))


def unrolled(model: Any) -> Any:
    """Replace the stacked layers of a GPT with lists of separate layers; return the model."""
    model.attention = nnx.List(unstack(model.attention, model.config.num_attentions))
    model.mlp = nnx.List(unstack(model.mlp, model.config.num_layers))
    return model


def layers_apart(graph: nnx.GraphDef, params: Params, dtype: str) -> tuple[nnx.GraphDef, Params]:
    """Return the model and its parameters in `dtype`, with separate layers.

    The barrier makes XLA, too, keep them separate: TPUs load a small matrix ahead of its use, but
    not a part of a stack.
    """
    graph, layers = nnx.split(unrolled(nnx.merge(graph, compute_copy(params, dtype))))
    return graph, jax.lax.optimization_barrier(nnx.to_pure_dict(layers))


def stacked(params: Params) -> Params:
    """Stack the numbered layers of an `unrolled` model's nested dict: undo `layers_apart`."""
    together = {
        name: jax.tree.map(lambda *layers: jnp.stack(layers), *params[name].values())
        for name in ("attention", "mlp")
    }
    return params | together
