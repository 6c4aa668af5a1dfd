"""Attention, held against a softmax over each query's own keys in float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanogpt.attention
from nanogpt.attention import attention, choose_backend, reference_attention


def some_qkv(B=2, T=11, N=3, H=8, dtype="float32"):
    x = np.random.default_rng(0).standard_normal((3, B, T, N, H))
    return [jnp.asarray(part, dtype) for part in x]


def numpy_attention(q, k, v, scale, window):
    q, k, v = (np.asarray(x, "f8") for x in (q, k, v))
    out = np.zeros_like(v)
    for b, t, n in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        weights = np.exp(scale * k[b, first : t + 1, n] @ q[b, t, n])
        out[b, t, n] = weights / weights.sum() @ v[b, first : t + 1, n]
    return out


@pytest.mark.parametrize("window", [None, 2, 5, 11, 100])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_attention_is_the_softmax_of_scores_over_the_visible_keys(window, dtype, atol):
    q, k, v = some_qkv(dtype=dtype)
    out = attention(q, k, v, scale=0.7, window=window)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, "f8"), numpy_attention(q, k, v, 0.7, window), atol=atol
    )


def test_a_window_of_one_returns_the_values():
    q, k, v = some_qkv()
    np.testing.assert_array_equal(attention(q, k, v, scale=0.7, window=1), v)


def test_large_scores_do_not_overflow():
    q, k, v = some_qkv()
    out = attention(1e3 * q, 1e3 * k, v, scale=1.0)
    # The softmax is then the choice of the best key.
    scores = np.einsum("bqnh,bknh->bnqk", q, k)
    best = np.where(np.tri(11, dtype=bool), scores, -np.inf).argmax(axis=-1)
    chosen = np.take_along_axis(np.asarray(v), best.swapaxes(1, 2)[..., None], axis=1)
    np.testing.assert_allclose(out, chosen, atol=1e-5)


# Which backend runs


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what happens on a CPU")
on_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs only (JAX_PLATFORMS=cuda)"
)


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_gets_xla_and_is_told_why(dtype):
    assert choose_backend(dtype, 64) == ("xla", "XLA attention (cpu)")


@on_cpu
def test_a_float32_run_on_a_gpu_gets_xla_and_is_told_why(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    backend, reason = choose_backend("float32", 64)
    assert backend == "xla"
    assert "needs bfloat16" in reason and "float32" in reason


def as_this_machine_has_it(q, k, v, **how):
    # There is no cuDNN on a CPU: what JAX raises here is what it would with a broken driver.
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def with_a_long_complaint(q, k, v, **how):
    raise RuntimeError("No engine fits.\nThe stack follows.\n" + 99 * "line\n")


@on_cpu
@pytest.mark.parametrize("cudnn", [as_this_machine_has_it, with_a_long_complaint])
def test_a_cudnn_that_fails_is_replaced_and_the_reason_is_one_line(monkeypatch, cudnn):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(nanogpt.attention, "attention", lambda *qkv, backend, **how: cudnn(*qkv))
    backend, reason = choose_backend("bfloat16", 64)
    assert backend == "xla"
    assert "cuDNN failed its probe (" in reason and "\n" not in reason


def off_by_a_tenth(q, k, v, **how):
    return 1.1 * reference_attention(q, k, v, **how).astype(v.dtype)


def not_a_number(q, k, v, **how):
    return jnp.nan * (q + k + v)


def with_a_gradient_that_is_not_a_number(q, k, v, **how):
    return reference_attention(q, k, v + jnp.sqrt(0 * v), **how)  # infinity times zero


def without_the_window(q, k, v, *, window, **how):
    return reference_attention(q, k, v, **how)


def with_a_wrong_gradient(q, k, v, **how):
    return reference_attention(q, jax.lax.stop_gradient(k), v, **how)


def as_the_reference(q, k, v, **how):
    return reference_attention(q, k, v, **how)


@on_cpu
@pytest.mark.parametrize(
    ("cudnn", "chosen"),
    [
        (off_by_a_tenth, "xla"),
        (not_a_number, "xla"),
        (with_a_gradient_that_is_not_a_number, "xla"),
        (without_the_window, "xla"),
        (with_a_wrong_gradient, "xla"),
        (as_the_reference, "cudnn"),
    ],
)
def test_a_fast_backend_is_chosen_only_if_it_computes_what_the_reference_does(
    monkeypatch, cudnn, chosen
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        nanogpt.attention, "attention", lambda *qkv, backend, **how: cudnn(*qkv, **how)
    )
    backend, reason = choose_backend("bfloat16", 16)
    assert backend == chosen
    assert ("differs from the reference" in reason) == (chosen == "xla")


@on_gpu
@pytest.mark.parametrize("window", [None, 1, 48, 200])
@pytest.mark.parametrize("head_size", [64, 128])
def test_cudnn_and_its_gradients_equal_the_reference(head_size, window):
    q, k, v = some_qkv(B=2, T=256, N=2, H=head_size, dtype="bfloat16")
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(v.shape), "float32")

    def output_and_gradients(backend, *qkv):
        attend = partial(attention, scale=0.12, window=window, backend=backend)
        out, pullback = jax.vjp(attend, *qkv)
        return out, *pullback(weights.astype(out.dtype))

    fast = jax.jit(partial(output_and_gradients, "cudnn"))(q, k, v)
    exact = output_and_gradients("xla", *(x.astype("float32") for x in (q, k, v)))
    for name, got, expected in zip(("out", "dq", "dk", "dv"), fast, exact, strict=True):
        got, expected = np.asarray(got, "f4"), np.asarray(expected)
        # A window of one leaves the softmax nothing to learn: its gradients are zero.
        error, size = np.abs(got - expected).max(), max(1.0, np.abs(expected).max())
        assert error / size < 0.03, name
