"""Rows and signs of token pairs, compared with hashes of plain integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.model.bigrams import bigram_bucket, bigram_embeddings, bigram_signs

V = 50257  # GPT-2's
WORDS = 2**32
buckets_of_pairs = jax.jit(bigram_bucket, static_argnums=2)
signs_of_pairs = jax.jit(bigram_signs, static_argnums=2)
embeddings_of_pairs = jax.jit(bigram_embeddings, static_argnums=(3, 4, 5))


def finalized(h):
    """MurmurHash3's finalizer for 32 bits, fmix32."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % WORDS
    h ^= h >> 13
    h = h * 0xC2B2AE35 % WORDS
    return h ^ h >> 16


def pair_of(token, before):
    """Return the 32 bits that stand for a pair, with the first two primes of xxHash."""
    return (token * 2654435761 % WORDS) ^ (before * 2246822519 % WORDS)


def bucket_of(token, before, buckets):
    """Return the row of a pair."""
    mixed = pair_of(token, before)
    return (mixed ^ mixed >> 15) % buckets


def signs_of(token, before, channels):
    """Return the signs of a pair: 1 where the last bit of a hash is 0, one hash per channel.

    The channels are a golden ratio of 32 bits apart.
    """
    golden = int(WORDS * (5**0.5 - 1) / 2)
    hashes = [finalized((pair_of(token, before) + n * golden) % WORDS) for n in range(channels)]
    return [1 - 2 * (h % 2) for h in hashes]


def some_pairs(count, seed=0):
    """Return random pairs of tokens, and those of the first and last ids, [1, T] twice."""
    random = np.random.default_rng(seed).integers(0, V, (2, 1, count))
    edges = np.array([[[0, 0, V - 1, V - 1, 65535]], [[0, V - 1, 0, V - 1, 65535]]])
    return np.concatenate([random, edges], axis=2)


def of_each(function, pairs, number):
    tokens, before = pairs[:, 0].tolist()
    return np.array([function(*pair, number) for pair in zip(tokens, before, strict=True)])


@pytest.mark.parametrize(
    # The hashes of the empty text with these seeds, on which the finalizer alone works.
    ("seed", "published"),
    [(0, 0), (1, 0x514E28B7), (0xFFFFFFFF, 0x81F16F39)],
)
def test_the_finalizer_that_signs_are_compared_with_is_the_published_one(seed, published):
    assert finalized(seed) == published


@pytest.mark.parametrize("channels", [1, 7, 192])
def test_signs_are_last_bits_of_murmurhash3s_finalizer(channels):
    pairs = some_pairs(40)
    found = signs_of_pairs(*pairs, channels)
    np.testing.assert_array_equal(found[0], of_each(signs_of, pairs, channels))


@pytest.mark.parametrize("buckets", [1, 61, 15 * 50304])
def test_rows_are_those_of_a_hash_in_plain_integers(buckets):
    pairs = some_pairs(200)
    found = buckets_of_pairs(*pairs, buckets)
    np.testing.assert_array_equal(found[0], of_each(bucket_of, pairs, buckets))


def test_the_two_tokens_of_a_pair_have_an_order():
    pairs = some_pairs(50)[..., :50]  # the last ones are of equal tokens
    rows, turned = (np.asarray(buckets_of_pairs(*each, 10**6)) for each in (pairs, pairs[::-1]))
    assert (rows != turned).mean() > 0.9
    signs, turned = (np.asarray(signs_of_pairs(*each, 64)) for each in (pairs, pairs[::-1]))
    assert 0.45 < (signs == turned).mean() < 0.55


def test_signs_are_balanced_in_every_channel_and_do_not_go_along_with_another_channels():
    pairs = np.random.default_rng(0).integers(0, V, (2, 1, 4000))
    signs = np.asarray(signs_of_pairs(*pairs, 32))[0]
    assert {*np.unique(signs)} == {-1, 1}
    # The mean of 4000 independent signs has a standard deviation of 0.016.
    together = signs.T @ signs / len(signs)
    assert abs(signs.mean(axis=0)).max() < 5 * 0.016
    assert abs(together - np.eye(32)).max() < 5 * 0.016


def test_pairs_that_share_a_row_have_unlike_signs_so_that_they_cancel_in_the_mean():
    pairs = np.random.default_rng(1).integers(0, V, (2, 1, 2000))
    rows = np.asarray(buckets_of_pairs(*pairs, 50))[0]
    signs = np.asarray(signs_of_pairs(*pairs, 192))[0]
    shared = [signs[rows == row] for row in range(50)]
    agreement = np.concatenate(  # of every pair with every other in its row
        [(each @ each.T / 192)[np.triu_indices(len(each), 1)] for each in shared]
    )
    assert len(agreement) > 30_000
    # One of 192 independent signs has a standard deviation of 0.072.
    assert abs(agreement.mean()) < 0.002
    assert agreement.std() == pytest.approx(192**-0.5, rel=0.05)
    assert abs(agreement).max() < 6 * 0.072


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("channels", [3, 8])
def test_embeddings_fill_the_first_channels_with_or_without_signs(channels, signs, dtype):
    table = np.random.default_rng(0).standard_normal((5, channels), "f4")
    pairs = some_pairs(9)
    found = embeddings_of_pairs(table, *pairs, 8, signs, dtype)
    assert (found.shape, found.dtype) == ((1, 14, 8), dtype)
    expected = np.zeros((14, 8), "f4")
    expected[:, :channels] = table[of_each(bucket_of, pairs, 5)]
    if signs:
        expected[:, :channels] *= of_each(signs_of, pairs, channels)
    np.testing.assert_array_equal(found, expected[None].astype(dtype))


def test_a_row_learns_from_each_of_its_pairs_with_their_signs():
    pairs, above = some_pairs(20), np.random.default_rng(2).standard_normal((25, 6), "f4")
    _, pullback = jax.vjp(
        lambda table: embeddings_of_pairs(table, *pairs, 6, True, "float32"), np.zeros((3, 4), "f4")
    )
    expected = np.zeros((3, 4))
    rows, signs = of_each(bucket_of, pairs, 3), of_each(signs_of, pairs, 4)
    for row, sign, gradient in zip(rows, signs, above, strict=True):
        expected[row] += sign * gradient[:4]
    np.testing.assert_allclose(*pullback(jnp.asarray(above[None])), expected, atol=1e-5)
