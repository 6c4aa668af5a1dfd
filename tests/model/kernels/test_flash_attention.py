"""Flash attention: its interpreted kernels, compared with float64 NumPy, also in gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from nanogpt.devices.mesh import make_mesh
from nanogpt.model.attention import reference_attention
from nanogpt.model.kernels.flash_attention import flash_attention

NAMES = ("out", "dq", "dk", "dv")


def some_inputs(B=2, T=48, N=2, H=16, dtype="float32"):
    """Return q, k, v and the gradient of the output."""
    x = np.random.default_rng(0).standard_normal((4, B, T, N, H))
    return [*x.astype(dtype)]


def some_documents(B, T, longest=20):
    """Return documents of random lengths; ids increase, but not always by one."""
    rng = np.random.default_rng(1)
    rows = [np.repeat(np.arange(T) * 3, rng.integers(1, longest, T))[:T] for _ in range(B)]
    return np.stack(rows).astype("int32")


def numpy_attention(q, k, v, dout, documents=None, *, scale, window=None):
    """Compute the output and the gradients of q, k and v, query by query."""
    q, k, v, dout = (np.asarray(x, "f8") for x in (q, k, v, dout))
    out, dq, dk, dv = (np.zeros_like(q) for _ in NAMES)
    for b, t, n in np.ndindex(q.shape[:3]):
        sees = [
            s
            for s in range(t + 1)
            if (window is None or t - s < window)
            and (documents is None or documents[b, s] == documents[b, t])
        ]
        scores = scale * k[b, sees, n] @ q[b, t, n]
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, t, n] = weights @ v[b, sees, n]
        dv[b, sees, n] += weights[:, None] * dout[b, t, n]
        dweights = v[b, sees, n] @ dout[b, t, n]
        dscores = scale * weights * (dweights - weights @ dweights)
        dq[b, t, n] = dscores @ k[b, sees, n]
        dk[b, sees, n] += dscores[:, None] * q[b, t, n]
    return out, dq, dk, dv


def output_and_gradients(q, k, v, dout, documents=None, *, attend=flash_attention, **how):
    """Output and gradients of q, k and v."""
    out, pullback = jax.vjp(lambda *qkv: attend(*qkv, documents, **how), q, k, v)
    return out, *pullback(dout)


# Most of the time is spent compiling, so it is done with little optimization, and tests have the
# same shapes, window and scale where they can: they then share a program.
quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
flash = quickly(output_and_gradients, static_argnames=("scale", "window", "block"))
flash_of_any_window = quickly(output_and_gradients, static_argnames=("scale", "block"))


def assert_close(got, expected, atol):
    for name, a, b in zip(NAMES, got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, "f8"), np.asarray(b, "f8"), atol=atol, err_msg=name
        )


@pytest.mark.parametrize("window", [None, 1, 17])
def test_output_and_gradients_are_those_of_the_softmax_over_the_visible_keys(window):
    inputs = some_inputs()
    got = flash(*inputs, scale=0.3, window=window, block=16)
    assert_close(got, numpy_attention(*inputs, scale=0.3, window=window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 17, 1000])
def test_with_documents_the_window_may_be_an_input_of_the_program(window):
    inputs, documents = some_inputs(), some_documents(2, 48)
    got = flash_of_any_window(*inputs, documents, scale=0.3, window=window, block=16)
    assert_close(got, numpy_attention(*inputs, documents, scale=0.3, window=window), atol=1e-5)


@pytest.mark.parametrize("T", [1, 63])
def test_the_sequence_may_end_within_a_block(T):
    inputs = some_inputs(T=T)
    got = flash(*inputs, scale=0.3, window=20, block=32)
    assert [x.shape for x in got] == [x.shape for x in inputs]
    assert_close(got, numpy_attention(*inputs, scale=0.3, window=20), atol=1e-5)


def test_a_head_size_of_the_models_with_the_blocks_of_a_gpu_of_which_the_last_is_partial():
    inputs, documents = some_inputs(B=1, T=130, N=1, H=128), some_documents(1, 130, longest=120)
    got = flash(*inputs, documents, scale=128**-0.5, window=90)
    assert_close(got, numpy_attention(*inputs, documents, scale=128**-0.5, window=90), atol=1e-5)


def test_bfloat16_stays_bfloat16_and_close():
    inputs, documents = some_inputs(T=64, dtype="bfloat16"), some_documents(2, 64)
    got = flash(*inputs, documents, scale=0.3, window=40, block=16)
    assert [x.dtype for x in got] == ["bfloat16"] * 4
    assert_close(got, numpy_attention(*inputs, documents, scale=0.3, window=40), atol=0.05)


def test_it_computes_what_the_reference_does():
    inputs, how = some_inputs(), {"scale": 0.3, "window": 17}
    reference = jax.jit(partial(output_and_gradients, attend=reference_attention, **how))
    assert_close(flash(*inputs, **how, block=16), reference(*inputs), atol=1e-5)


def test_large_scores_do_not_overflow():
    q, k, v, dout = some_inputs()
    inputs = 200 * q, 200 * k, v, dout
    got = flash(*inputs, scale=0.3, window=17, block=16)
    expected = numpy_attention(*inputs, scale=0.3, window=17)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(got[3], expected[3], atol=1e-4)
    assert all(np.isfinite(x).all() for x in got)


def test_one_document_does_not_change_another():
    inputs, changed, how = some_inputs(), some_inputs(), {"scale": 0.3, "window": None, "block": 16}
    documents = np.repeat([[0, 1, 2]] * 2, [7, 22, 19], axis=1).astype("int32")
    for x in changed:
        x[:, 7:29] *= -1
    both = (flash_of_any_window(*x, documents, **how) for x in (inputs, changed))
    for name, a, b in zip(NAMES, *both, strict=True):
        same = np.asarray(a == b).all(axis=(0, 2, 3))
        assert same[:7].all() and same[29:].all(), name
        assert not same[8:29].any(), name


# Each poisons one block of 16 tokens that the last one may not read.
@pytest.mark.parametrize(("window", "lengths"), [(17, None), (None, [24, 8, 16]), (17, [33, 15])])
def test_blocks_that_are_not_seen_are_not_computed(window, lengths):
    how, documents, attend = {"scale": 0.3, "window": window, "block": 16}, None, flash
    if lengths:
        documents = np.repeat([[0, 1, 2][: len(lengths)]] * 2, lengths, axis=1).astype("int32")
        attend = flash_of_any_window
    inputs, poisoned = some_inputs(), some_inputs()
    # If a block were computed and masked, zero times NaN would reveal it.
    for x in poisoned:
        x[:, :16] = np.nan
    both = (attend(*x, documents, **how) for x in (inputs, poisoned))
    for name, a, b in zip(NAMES, *both, strict=True):
        np.testing.assert_array_equal(a[:, 32:], b[:, 32:], err_msg=name)
        assert np.isnan(b[:, :16]).all(), name


def test_the_future_is_not_computed():
    inputs, poisoned = some_inputs(), some_inputs()
    for x in poisoned:
        x[:, 32:] = np.nan
    clean, got = (flash(*x, scale=0.3, window=None, block=16) for x in (inputs, poisoned))
    for name, a, b in zip(NAMES[:2], clean, got, strict=False):  # dk and dv come from the future
        np.testing.assert_array_equal(a[:, :32], b[:, :32], err_msg=name)
        assert np.isnan(b[:, 32:]).all(), name


def test_nothing_of_size_T_squared_is_kept_for_the_backward_pass():
    q, k, v, _ = some_inputs(B=1, T=64, N=2)
    attend = partial(flash_attention, scale=0.3, block=16)
    _, pullback = jax.eval_shape(partial(jax.vjp, attend), q, k, v)
    kept = sorted(x.shape for x in jax.tree.leaves(pullback))
    assert kept == [(1, 2, 64)] + 4 * [(1, 64, 2, 16)]  # log-sum-exp, and q, k, v and the output


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_a_sharded_training_step_are_those_without_one(packed):
    q, k, v, _ = some_inputs(B=16, T=32, N=1)
    documents = some_documents(16, 32) if packed else None
    weight = np.eye(16, dtype="f4") + np.float32(0.1)

    def loss(attend, weight, q, k, v, documents):
        return (attend(q @ weight, k @ weight, v @ weight, documents) ** 2).mean()

    def gradient(attend, weight, q, k, v, documents):
        """As in training/step.py: devices accumulate over their micro-batches, then average."""
        weight = jax.lax.pcast(weight, "data", to="varying")

        def accumulate(total, batch):
            return total + jax.grad(partial(loss, attend))(weight, *batch), None

        halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), (q, k, v, documents))
        zeros = jax.lax.pcast(jnp.zeros(weight.shape), "data", to="varying")
        total, _ = jax.lax.scan(accumulate, zeros, halves)
        return jax.lax.pmean(total / 2, "data")

    attend = partial(flash_attention, scale=0.3, window=20, block=16)
    rows = P("data")
    sharded = jax.shard_map(
        partial(gradient, attend),
        mesh=make_mesh(),
        in_specs=(P(), rows, rows, rows, rows),
        out_specs=P(),
    )
    got = jax.jit(sharded)(weight, q, k, v, documents)
    seen = np.tri(32, dtype=bool) & ~np.tri(32, k=-20, dtype=bool)
    if packed:
        seen = seen & (documents[:, :, None] == documents[:, None, :])[:, None]

    def plain(q, k, v, documents):
        scores = jnp.where(seen, 0.3 * jnp.einsum("bqnh,bknh->bnqk", q, k), -jnp.inf)
        return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)

    expected = jax.jit(jax.grad(partial(loss, plain)))(weight, q, k, v, documents)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("H", [8, 24, 96])
def test_a_head_size_that_is_no_power_of_two_from_16_is_refused(H):
    q, k, v, _ = some_inputs(T=4, H=H)
    with pytest.raises(ValueError, match=rf"head size of 16, 32, 64, \.\.\., not {H}"):
        flash_attention(q, k, v, scale=1.0)


def test_a_scale_that_is_not_positive_is_refused():
    q, k, v, _ = some_inputs(T=4)
    with pytest.raises(ValueError, match="positive scale, not -1"):
        flash_attention(q, k, v, scale=-1)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_backward_pass_are_three_kernels_on_a_gpu(packed):
    shapes = [jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)] * 4
    documents = jax.ShapeDtypeStruct((2, 256), jnp.int32) if packed else None
    gpu = AbstractDevice("NVIDIA H100", 132, "cuda")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):  # no GPU is needed to lower for one
        traced = flash.trace(*shapes, documents, scale=0.1, window=100)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("xla.gpu.triton") == 3
    assert "stablehlo.dot_general" not in program
    for name in ("_flash_forward", "_flash_dq", "_flash_dkv"):
        assert program.count(f'name = "{name}"') == 1


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="runs the compiled kernels (JAX_PLATFORMS=cuda)"
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 48, 200])
@pytest.mark.parametrize("H", [64, 128])
def test_on_a_gpu_the_compiled_kernels_compute_what_the_interpreted_ones_do(H, window, packed):
    inputs = some_inputs(B=2, T=330, N=2, H=H, dtype="bfloat16")
    documents = some_documents(2, 330, longest=150) if packed else None
    got = flash(*inputs, documents, scale=H**-0.5, window=window)
    expected = numpy_attention(*inputs, documents, scale=H**-0.5, window=window)
    assert_close(got, expected, atol=0.05)
