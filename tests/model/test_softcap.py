"""The soft cap, compared with float64 NumPy."""

import jax
import numpy as np

from nanogpt.model.softcap import Softcap, softcap


def test_softcap_bounds_logits_and_leaves_small_ones_alone():
    logits = np.array([-1e9, -0.01, 0.0, 0.01, 6.0, 1e9], "bfloat16")
    capped = jax.jit(lambda logits: softcap(logits, Softcap(6.0, 6.0, 0.0)))(logits)
    assert capped.dtype == "float32"
    exact = 6 * np.tanh(logits.astype("f8") / 6)
    np.testing.assert_allclose(capped, exact, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(capped)[[0, -1]], [-6, 6])
