"""Attention, compared with a softmax over each query's visible keys in float64 NumPy.

The kernel in nanogpt/model/kernels/flash_attention.py has its own tests.
"""

from dataclasses import asdict
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanogpt.model.attention
from nanogpt.config import GPTConfig
from nanogpt.model.attention import (
    attention,
    choose_attention,
    heads,
    pair,
    part,
    reference_attention,
)
from nanogpt.model.kernels.splash_attention import band, block, blocks


def some_qkv(B=2, T=11, N=3, H=8, dtype="float32"):
    x = np.random.default_rng(0).standard_normal((3, B, T, N, H))
    return [*x.astype(dtype)]


def numpy_attention(q, k, v, scale, window, documents=None):
    q, k, v = (np.asarray(x, "f8") for x in (q, k, v))
    out = np.zeros_like(v)
    for b, t, n in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        if documents is not None:
            first = max(first, list(documents[b]).index(documents[b][t]))
        weights = np.exp(scale * k[b, first : t + 1, n] @ q[b, t, n])
        out[b, t, n] = weights / weights.sum() @ v[b, first : t + 1, n]
    return out


attend = jax.jit(partial(attention, scale=0.7))  # a window may be an input of the program


@pytest.mark.parametrize("window", [None, 2, 5, 11, 100])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_attention_is_the_softmax_of_scores_over_the_visible_keys(window, dtype, atol):
    q, k, v = some_qkv(dtype=dtype)
    out = attend(q, k, v, window=window)
    assert out.dtype == dtype
    expected = numpy_attention(q, k, v, 0.7, window)
    np.testing.assert_allclose(np.asarray(out, "f8"), expected, atol=atol)


@pytest.mark.parametrize("window", [None, 3])
def test_a_query_sees_the_keys_of_its_own_document_only(window):
    q, k, v = some_qkv()
    documents = np.array([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 6, 6, 7, 8]])
    out = attend(q, k, v, documents, window=window)
    np.testing.assert_allclose(out, numpy_attention(q, k, v, 0.7, window, documents), atol=1e-5)


def test_a_window_of_one_returns_the_values():
    q, k, v = some_qkv()
    np.testing.assert_array_equal(attend(q, k, v, window=1), v)


def test_large_scores_do_not_overflow():
    q, k, v = some_qkv()
    out = attend(1e3 * q, 1e3 * k, v, window=None)
    # The softmax is then the choice of the best key.
    scores = np.einsum("bqnh,bknh->bnqk", q, k)
    best = np.where(np.tri(11, dtype=bool), scores, -np.inf).argmax(axis=-1)
    chosen = np.take_along_axis(v, best.swapaxes(1, 2)[..., None], axis=1)
    np.testing.assert_allclose(out, chosen, atol=1e-5)


# Paired heads


def turns(T, group):
    """Return token and head, the first or second of a pair, at each place of their sequence."""
    return [(t, mate) for g in range(0, T, group) for mate in (0, 1) for t in range(g, g + group)]


@pytest.mark.parametrize("group", [1, 4])
def test_heads_are_paired_by_taking_tokens_of_each_in_turn_and_parted_again(group):
    x = np.random.default_rng(0).standard_normal((2, 8, 6, 3)).astype("f4")
    paired, parted = jax.jit(lambda x: ((both := pair(x, group)), part(both, group)))(x)
    assert paired.shape == (2, 16, 3, 3)
    for (place, (t, mate)), head in product(enumerate(turns(8, group)), range(3)):
        np.testing.assert_array_equal(paired[:, place, head], x[:, t, 2 * head + mate])
    np.testing.assert_array_equal(parted, x)


# Splash attention, which JAX interprets on a CPU


@pytest.mark.parametrize("how", [{}, {"window": 48, "paired": True}])
def test_splash_attention_and_its_gradients_equal_the_reference(how):
    q, k, v = some_qkv(B=1, T=384, N=2, H=128)
    documents = np.cumsum(np.arange(384)[None] % 90 == 50, axis=1) if how else None
    weights = np.random.default_rng(1).standard_normal(v.shape, "f4")

    @partial(jax.jit, static_argnums=0)
    def output_and_gradients(kernel, documents, *qkv):
        attend = partial(attention, scale=0.12, kernel=kernel, **how)
        out, pullback = jax.vjp(lambda *x: attend(*x, documents), *qkv)
        return out, *pullback(weights)

    both = (output_and_gradients(kernel, documents, q, k, v) for kernel in ("splash", "xla"))
    for got, expected in zip(*both, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("T", "window", "group", "size"),
    [
        (16_384, 384, 1, 512),
        (16_384, 128, 1, 256),
        (32_768, 128, 256, 512),
        (1024, None, 1, 512),
        (1280, None, 1, 256),
        (384, 384, 1, 128),
    ],
)
def test_splash_attention_takes_blocks_that_suit_row_and_window(T, window, group, size):
    assert block(T, window, group) == size
    sizes = blocks(size)
    assert sizes.has_backward_blocks and not sizes.use_fused_bwd_kernel
    assert {n for name, n in asdict(sizes).items() if name.startswith("block_")} == {size}


def assert_seen(mask, positions, window, size):
    """Assert that a mask has, block by block, what queries at these positions see of keys there."""
    distance = np.subtract.outer(positions, positions)
    expected = (distance >= 0) & (distance < (window or 64))
    parts = [slice(at, at + size) for at in range(0, 64, size)]
    for q, kv in product(parts, parts):
        np.testing.assert_array_equal(mask[q, kv], expected[q, kv])


@pytest.mark.parametrize("window", [None, 1, 5, 24, 100])
def test_splash_attention_sees_the_keys_of_the_window_block_by_block(window):
    assert_seen(band(64, window), range(64), window, 8)


@pytest.mark.parametrize("window", [None, 5, 24])
@pytest.mark.parametrize("group", [4, 8])
def test_splash_attention_of_pairs_sees_by_position_whatever_the_order(window, group):
    positions = [2 * t + mate for t, mate in turns(32, group)]
    assert_seen(band(64, window, group), positions, window, 16)


def test_queries_keys_and_values_for_tpus_are_the_same_products():
    x, *matrices = np.random.default_rng(0).standard_normal((4, 24, 24), "f4")
    expected = np.stack([x @ matrix for matrix in matrices]).reshape(3, 1, 24, 3, 8)
    for kernel in ("xla", "splash"):
        found = jax.jit(partial(heads, head_size=8, kernel=kernel))(x[None], matrices)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("paired", [False, True])
def test_splash_attention_lowers_for_tpus(paired):
    qkv = [jax.ShapeDtypeStruct((2, 1024, 6, 128), "bfloat16")] * 3
    attend = partial(attention, scale=0.12, window=384, kernel="splash", paired=paired)
    lowered = jax.jit(attend).trace(*qkv).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


# Which kernel runs


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what happens on a CPU")
on_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs only (JAX_PLATFORMS=cuda)"
)


def some_model(H=64, windows=(48,), **how):
    return GPTConfig(vocab_size=100, num_layers=2, num_heads=2, width=2 * H, windows=windows, **how)


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_gets_xla_and_is_told_why(dtype):
    assert choose_attention([some_model()], 128, dtype) == ("xla", "XLA attention (cpu)")


@on_cpu
def test_a_float32_run_on_a_gpu_gets_xla_and_is_told_why(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernel, reason = choose_attention([some_model()], 128, "float32")
    assert kernel == "xla"
    assert "needs bfloat16" in reason and "float32" in reason


def as_this_machine_has_it(q, k, v, documents, **how):
    # There is no cuDNN on a CPU: JAX raises the same error as with a broken driver.
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def with_a_long_complaint(q, k, v, documents, **how):
    raise RuntimeError("No engine fits.\nThe stack follows.\n" + 99 * "line\n")


def off_by_a_tenth(*qkv, **how):
    return 1.1 * reference_attention(*qkv, **how).astype(qkv[2].dtype)


def not_a_number(q, k, v, documents, **how):
    return jnp.nan * (q + k + v)


def with_a_gradient_that_is_not_a_number(q, k, v, documents, **how):
    return reference_attention(q, k, v + jnp.sqrt(0 * v), documents, **how)  # infinity times zero


def without_the_window(*qkv, window, **how):
    return reference_attention(*qkv, **how)


def that_looks_too_far_with_a_window_of_20(*qkv, window, **how):
    return reference_attention(*qkv, window=21 if window == 20 else window, **how)


def without_the_documents(q, k, v, documents, **how):
    return reference_attention(q, k, v, **how)


def with_a_wrong_gradient(q, k, v, documents, **how):
    return reference_attention(q, jax.lax.stop_gradient(k), v, documents, **how)


def as_the_reference(*qkv, **how):
    return reference_attention(*qkv, **how)


WRONG = [
    off_by_a_tenth,
    not_a_number,
    with_a_gradient_that_is_not_a_number,
    without_the_window,
    with_a_wrong_gradient,
]


def choice_on_a_gpu(monkeypatch, *models, **kernels):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name, kernel in kernels.items():
        monkeypatch.setitem(nanogpt.model.attention.KERNELS, name, kernel)
    kernel, line = choose_attention(models or [some_model()], 64, "bfloat16")
    assert "\n" not in line
    return kernel, line


@on_cpu
def test_a_gpu_gets_cudnn_if_it_computes_what_the_reference_does(monkeypatch):
    chosen = choice_on_a_gpu(monkeypatch, some_model(windows=(48, 0)), cudnn=as_the_reference)
    assert chosen == ("cudnn", "cuDNN flash attention")


@on_cpu
@pytest.mark.parametrize("cudnn", [as_this_machine_has_it, off_by_a_tenth])
def test_a_cudnn_that_fails_or_is_wrong_is_replaced_by_the_pallas_kernel(monkeypatch, cudnn):
    kernel, line = choice_on_a_gpu(monkeypatch, cudnn=cudnn, pallas=as_the_reference)
    assert kernel == "pallas"
    told = "differs from the reference by" if cudnn in WRONG else "failed its probe ("
    assert line.startswith("Pallas flash attention, because cuDNN flash attention " + told)


@on_cpu
@pytest.mark.parametrize(("later_window", "chosen"), [(30, "cudnn"), (20, "xla")])
def test_a_kernel_must_be_right_for_the_windows_of_every_stage(monkeypatch, later_window, chosen):
    kernels = {"cudnn": that_looks_too_far_with_a_window_of_20, "pallas": with_a_long_complaint}
    stages = [some_model(windows=windows) for windows in ((48,), (later_window,))]
    kernel, _ = choice_on_a_gpu(monkeypatch, *stages, **kernels)
    assert kernel == chosen


@on_cpu
@pytest.mark.parametrize(("window", "chosen"), [(10, "cudnn"), (20, "xla")])
def test_a_kernel_must_be_right_for_the_window_of_paired_heads(monkeypatch, window, chosen):
    # Their keys count separately: a window of 10 is not one of 20.
    kernels = {"cudnn": that_looks_too_far_with_a_window_of_20, "pallas": with_a_long_complaint}
    model = some_model(windows=(48, window), paired_heads=(1,))
    kernel, _ = choice_on_a_gpu(monkeypatch, model, **kernels)
    assert kernel == chosen


@on_cpu
@pytest.mark.parametrize("pallas", [with_a_long_complaint, *WRONG])
def test_without_a_kernel_that_works_the_run_is_told_that_it_will_be_slow(monkeypatch, pallas):
    kernel, line = choice_on_a_gpu(monkeypatch, cudnn=with_a_long_complaint, pallas=pallas)
    assert kernel == "xla"
    assert line.startswith("XLA attention, SLOW: cuDNN flash attention failed its probe (No engine")
    told = "differs from the reference by" if pallas in WRONG else "failed its probe ("
    assert "; Pallas flash attention " + told in line


@on_cpu
@pytest.mark.parametrize(
    ("pallas", "chosen"), [(as_the_reference, "pallas"), (without_the_documents, "xla")]
)
def test_a_document_mask_needs_a_kernel_that_has_one(monkeypatch, pallas, chosen):
    model = some_model(document_separator=0)
    kernel, line = choice_on_a_gpu(monkeypatch, model, pallas=pallas)
    assert kernel == chosen
    assert "cuDNN attention has no document mask" in line


@on_cpu
def test_the_pallas_kernel_passes_the_probe(monkeypatch):
    model = some_model(H=16, windows=(48, 0), document_separator=0)
    kernel, _ = choice_on_a_gpu(monkeypatch, model)
    assert kernel == "pallas"


@on_gpu
@pytest.mark.parametrize("window", [None, 1, 48, 200])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kernel", ["cudnn", "pallas"])
def test_on_a_gpu_kernels_and_their_gradients_equal_the_reference(kernel, head_size, window):
    q, k, v = some_qkv(B=2, T=256, N=2, H=head_size, dtype="bfloat16")
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(v.shape), "float32")

    def output_and_gradients(kernel, *qkv):
        attend = partial(attention, scale=0.12, window=window, kernel=kernel)
        out, pullback = jax.vjp(attend, *qkv)
        return out, *pullback(weights.astype(out.dtype))

    fast = jax.jit(partial(output_and_gradients, kernel))(q, k, v)
    exact = output_and_gradients("xla", *(x.astype("float32") for x in (q, k, v)))
    for name, got, expected in zip(("out", "dq", "dk", "dv"), fast, exact, strict=True):
        got, expected = np.asarray(got, "f4"), np.asarray(expected)
        # With a window of one the softmax is constant: its gradients are zero.
        error, size = np.abs(got - expected).max(), max(1.0, np.abs(expected).max())
        assert error / size < 0.03, name
