"""Hashed token pairs: which row of the bigram embedding a pair uses, and with which signs.

Pairs that share a row read it with different signs, so that what one of them learns is noise of
mean zero to the others (modded-nanogpt, 2026-05-20; feature hashing: Weinberger et al.,
arXiv:0902.2206).
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32


def bigram_embeddings(
    table: Float[Array, "buckets C"],
    tokens: Int[Array, "B T"],
    before: Int[Array, "B T"],
    width: int,
    signs: bool,
    dtype: DTypeLike,
) -> Float[Array, "B T {width}"]:
    """Return the embedding of each token with the one before it, with or without signs, in `dtype`.

    If the table is narrower than `width`, the other channels are zero.
    """
    buckets, channels = table.shape
    found = table[bigram_bucket(tokens, before, buckets)].astype(dtype)
    if signs:
        found = found * bigram_signs(tokens, before, channels).astype(dtype)
    return jnp.pad(found, ((0, 0), (0, 0), (0, width - channels)))


def _mixed(tokens: Int[Array, "B T"], before: Int[Array, "B T"]) -> UInt32[Array, "B T"]:
    # Two odd constants (2³² over the golden ratio, a prime of xxHash) spread the pairs mod 2³².
    mixed = tokens.astype(jnp.uint32) * np.uint32(0x9E3779B1)
    return mixed ^ before.astype(jnp.uint32) * np.uint32(0x85EBCA77)


def bigram_bucket(
    tokens: Int[Array, "B T"], before: Int[Array, "B T"], buckets: int
) -> Int[Array, "B T"]:
    """Hash each pair of a token and the one before it to a bucket."""
    mixed = _mixed(tokens, before)
    return ((mixed ^ (mixed >> 15)) % np.uint32(buckets)).astype(jnp.int32)


def bigram_signs(
    tokens: Int[Array, "B T"], before: Int[Array, "B T"], width: int
) -> Float[Array, "B T {width}"]:
    """Hash each pair to `width` signs, 1 or -1, with the finalizer of MurmurHash3."""
    mixed = _mixed(tokens, before)[..., None]
    mixed = mixed + np.arange(width, dtype=np.uint32) * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return 1.0 - 2.0 * (mixed & 1)
