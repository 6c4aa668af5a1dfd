"""Rotary positions (Su et al., arXiv:2104.09864), and their adaptation to wider windows.

Queries and keys are turned by angles that grow with their position, so that the product of two
depends on how far apart they stand. Shapes: B batch, T sequence, N heads, H head size.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nanogpt.config import GPTConfig


def rotation(config: GPTConfig) -> tuple[Float[np.ndarray, "pairs"], float]:
    """How far the pairs of a head turn per token, in radians, and the scale of q·k.

    The first `rope_fraction` of the pairs turn by base^0 ... base^-1; the others stand still and
    carry what has no position (modded-nanogpt, 2024-12-17).

    When the longest window grew from one stage of the run to the next, YaRN (Peng et al.,
    arXiv:2309.00071) slowed those pairs that turned less than 32 times in the old one, and those
    that turned less than once by the ratio of the windows, so that they meet no new angles; and
    the scale grew, as there are more keys to choose from (modded-nanogpt, 2025-09-10).
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
    """How far the pairs of a head are turned in places 0 to count - 1, in radians.

    A place is a number of a few digits, and the angle of each is looked up: a product in float32
    would be off by more the farther the place is, and a table of all places would be large.
    """
    base, digit = 256, 1
    angles = jnp.zeros((*places.shape, len(speed)), jnp.float32)
    while digit < count:
        of_digit = np.arange(base)[:, None] * digit * speed
        angles += jnp.float32(np.mod(of_digit, 2 * np.pi))[places // digit % base]
        digit *= base
    return angles


def rotary(x: Float[Array, "B T N H"], angle: Float[Array, "#B T H//2"]) -> Float[Array, "B T N H"]:
    """Turn the pairs (i, i + H/2) of each head by these angles, in radians."""
    angle = angle[:, :, None, None]
    cos = jnp.cos(angle).astype(x.dtype)
    sin = jnp.concatenate([jnp.sin(angle), -jnp.sin(angle)], axis=3).astype(x.dtype)
    pairs = x.reshape(*x.shape[:3], 2, -1)
    return (pairs * cos + pairs[:, :, :, ::-1] * sin).reshape(x.shape)
