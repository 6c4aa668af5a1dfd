"""relu², which keeps only its result for the backward pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0)². Whoever reads the result keeps it, too; the input is not kept."""
    return jnp.square(jax.nn.relu(x))


relu_squared.defvjp(
    lambda x: (relu_squared(x),) * 2,
    lambda squared, gradient: (2 * jnp.sqrt(squared) * gradient,),
)
