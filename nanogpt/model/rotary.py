"""Rotary positions (Su et al., arXiv:2104.09864), and their adaptation to wider windows.

Queries and keys are rotated by angles proportional to their position, so that their product depends
on the distance between them. Shapes: B batch, T sequence, N heads, H head size.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nanogpt.config import GPTConfig


def rotation(config: GPTConfig) -> tuple[Float[np.ndarray, "pairs"], float]:
    """Return the rotation of each pair of a head per token, in radians, and the scale of q·k.

    The first `rope_fraction` of the pairs rotate by base^0 ... base^-1; the others do not rotate
    and carry position-independent features (modded-nanogpt, 2024-12-17).

    Whenever the longest window grows from one stage to the next, YaRN (Peng et al.,
    arXiv:2309.00071) slows the pairs that turn less than 32 times within the old window, those that
    turn less than once by the ratio of the windows, so that they never reach new angles. The scale
    also grows, because there are more keys to choose from (modded-nanogpt, 2025-09-10).
    """
    pairs = config.head_size // 2
    turning = round(config.rope_fraction * pairs)
    speed = np.pad(config.rope_base ** -np.linspace(0, 1, turning), (0, pairs - turning))
    scale = config.attention_scale
    for old, new in pairwise(config.rotary_windows):
        turns = old * speed / (2 * np.pi)
        kept = np.clip((turns - 1) / (32 - 1), 0, 1)
        speed = speed * (kept + (1 - kept) * old / new)
        scale *= 1 + 0.2 * np.log(new / old)
    return speed, float(scale)


def turned(
    places: Int[Array, "B T"], count: int, speed: Float[np.ndarray, "pairs"]
) -> Float[Array, "B T pairs"]:
    """Return the rotary angles of a head's pairs at positions from 0 to count - 1, in radians.

    Each base-256 digit of a position has its angle in a small table, and the angles are summed: the
    error of a float32 product would grow with the position, and a table of all would be large.
    """
    base, digit = 256, 1
    angles = jnp.zeros((*places.shape, len(speed)), jnp.float32)
    while digit < count:
        of_digit = np.arange(base)[:, None] * digit * speed
        angles += jnp.float32(np.mod(of_digit, 2 * np.pi))[places // digit % base]
        digit *= base
    return angles


def rotary(
    x: Float[Array, "B T N H"], angle: Float[Array, "#B T places H//2"], tpu: bool = False
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of each head by these angles, in radians.

    If a token has several places, its heads take them in turn. For a TPU, the result is computed
    without arrays of half a head, which would leave half of each register empty.
    """
    places, (N, H) = angle.shape[2], x.shape[2:]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    if tpu:
        swap = jnp.asarray(np.roll(np.eye(H), H // 2, axis=0), x.dtype)  # exchanges the halves
        cos, sin = jnp.tile(cos, 2), jnp.concatenate([sin, -sin], axis=-1)
        cos, sin = (jnp.tile(of_places, (1, 1, N // places, 1)) for of_places in (cos, sin))
        return x * cos + (x @ swap) * sin
    pairs = x.reshape(*x.shape[:2], N // places, places, 2, H // 2)
    cos, sin = cos[:, :, None, :, None], jnp.stack([sin, -sin], axis=3)[:, :, None]
    return (pairs * cos + pairs[:, :, :, :, ::-1] * sin).reshape(x.shape)
