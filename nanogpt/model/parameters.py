"""How a model's parameters are kept, and how they are computed with.

They are kept in float32, with the layers stacked: each array of the attentions, or of the MLPs, has
a leading axis of layers, so that a model has few arrays however deep it is. They are computed with
in the dtype of a run, and layer by layer, each an array of its own.
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
    """Matrices of uniform numbers with a standard deviation of spread / sqrt(I)."""
    bound = spread * (3 / shape[-2]) ** 0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def is_table(path: tuple[jax.tree_util.DictKey, ...]) -> bool:
    """Whether the parameter at this path of the nested dict is a table that tokens index."""
    return path[-1].key.endswith("embed")


def compute_copy(params: Params, dtype: str) -> Params:
    """The parameters of a GPT, to compute with in `dtype`.

    Tables stay float32: the gradient of a row is the sum over all tokens that share it, thousands
    for a frequent one, and in bfloat16 such a sum stops growing after some hundreds.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p if is_table(path) else p.astype(dtype), params
    )


def stack(
    kind: Callable[..., nnx.Module], count: int, config: GPTConfig, key: Key[Array, ""]
) -> nnx.Module:
    """`count` modules of a kind as one, whose arrays have a leading axis."""
    make = nnx.vmap(lambda key: kind(config, rngs=nnx.Rngs(key)))
    return make(jax.random.split(key, count))


def unstack(stacked: nnx.Module, count: int) -> Iterator[nnx.Module]:
    """The modules one by one: loops over them are unrolled, so each may differ from the next.

    One split of each stacked array, rather than a slice per layer, has one concatenation as its
    gradient instead of a sum of zero-padded arrays.
    """
    if isinstance(stacked, nnx.List):  # they are apart already
        yield from stacked
        return
    graphdef, arrays = nnx.split(stacked)
    leaves, structure = jax.tree.flatten(arrays)
    rows = [jnp.split(leaf, count) for leaf in leaves]
    for layer in zip(*rows, strict=True):
        yield nnx.merge(graphdef, jax.tree.unflatten(structure, [row[0] for row in layer]))


def unrolled(model: Any) -> Any:
    """The GPT with its layers apart, as whoever treats them one by one wants them."""
    model.attention = nnx.List(unstack(model.attention, model.config.num_attentions))
    model.mlp = nnx.List(unstack(model.mlp, model.config.num_layers))
    return model


def layers_apart(graph: nnx.GraphDef, params: Params, dtype: str) -> tuple[nnx.GraphDef, Params]:
    """The model with its layers apart, and its parameters, to compute with in `dtype`."""
    graph, layers = nnx.split(unrolled(nnx.merge(graph, compute_copy(params, dtype))))
    return graph, nnx.to_pure_dict(layers)


def stacked(params: Params) -> Params:
    """The nested dict of a model from that of an `unrolled` one, whose layers have numbers."""
    together = {
        name: jax.tree.map(lambda *layers: jnp.stack(layers), *params[name].values())
        for name in ("attention", "mlp")
    }
    return params | together
