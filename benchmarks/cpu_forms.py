"""The same attention layer, written in several ways, on this CPU: which does XLA run fastest?

    .venv/bin/python -m benchmarks.cpu_forms

Every form computes one layer (queries, keys and values from the stream, norm, rotation, causal
attention, projection back) and all its gradients, to the same numbers. Forms are timed in turn, so
that another process slows all alike; the table gives the best of many rounds of each, in ms and as
a ratio to the form that `nanogpt/model/gpt.py` uses.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.results import save
from nanogpt.config import GPTConfig
from nanogpt.model.attention import reference_attention, visible
from nanogpt.model.gpt import norm, project
from nanogpt.model.rotary import rotary, rotation

B, T, N, H = 4, 128, 2, 64  # a micro-batch of the laptop preset
D = N * H
ROUNDS = 300
SPEED, SCALE = rotation(GPTConfig(width=D, num_heads=N))


def rotary_by_concatenation(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """The textbook form: split each head in halves, turn, concatenate."""
    angle = np.arange(T)[:, None, None] * SPEED
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos + right * sin, right * cos - left * sin], axis=-1)


def attention_heads_last(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Attention without moving the heads before the sequence."""
    scores = jnp.where(visible(T, None), scale * jnp.einsum("bqnh,bknh->bnqk", q, k), -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)


def qkv_flat(x: Array, w: Array) -> list[Array]:
    """One product of two matrices for queries, keys and values."""
    return jnp.unstack(project(x, w.reshape(D, 3 * D)).reshape(B, T, 3, N, H), axis=2)


def qkv_einsum(x: Array, w: Array) -> Array:
    """One einsum over a batch of rows, heads named."""
    return jnp.einsum("btd,dcnh->cbtnh", x, w.reshape(D, 3, N, H))


def rotary_by_reversal(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """The model's form: the two halves change places along an axis of their own."""
    return rotary(x, SPEED)


def layer(
    x: Array,
    w: Array,
    out: Array,
    qkv: Callable = qkv_flat,
    rotate: Callable = rotary_by_reversal,
    attend: Callable = reference_attention,
) -> Array:
    """The layer; the defaults are the forms that the model uses."""
    q, k, v = qkv(x, w)
    y = attend(rotate(norm(q)), rotate(norm(k)), v, scale=SCALE)
    return project(y.reshape(B, T, D), out)


FORMS = {
    "as in the model": layer,
    "q, k, v by an einsum over [B, T, D]": partial(layer, qkv=qkv_einsum),
    "rotary by concatenation": partial(layer, rotate=rotary_by_concatenation),
    "attention with heads after the sequence": partial(layer, attend=attention_heads_last),
}


def main() -> None:
    """Check that the forms agree, time them, print a table, and save the figures."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, out = (
        jax.random.normal(key, shape) * shape[-2] ** -0.5 * scale
        for key, shape, scale in zip(
            keys, [(B, T, D), (D, 3 * D), (D, D)], [T**0.5, 1.0, 1.0], strict=True
        )
    )
    steps = {
        name: jax.jit(jax.value_and_grad(lambda *a, f=form: jnp.sum(f(*a) ** 2), (0, 1, 2)))
        for name, form in FORMS.items()
    }
    expected = jax.tree.leaves(steps["as in the model"](x, w, out))
    best = dict.fromkeys(steps, float("inf"))
    for name, step in steps.items():
        for got, want in zip(jax.tree.leaves(step(x, w, out)), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-2, err_msg=name)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(x, w, out))
            best[name] = min(best[name], time.perf_counter() - start)

    base = best["as in the model"]
    print(f"one attention layer, B {B}, T {T}, N {N}, H {H}, forward and backward, float32")
    for name, seconds in best.items():
        print(f"{name:42}{1e3 * seconds:8.2f} ms{seconds / base:7.2f}")
    save("cpu_forms", {"ms": {name: round(1e3 * seconds, 3) for name, seconds in best.items()}})


if __name__ == "__main__":
    main()
