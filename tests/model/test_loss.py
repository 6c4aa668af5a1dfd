"""The head and its cross-entropy, compared with float64 NumPy and finite differences."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from nanogpt.model import loss
from nanogpt.model.kernels import cross_entropy
from nanogpt.model.loss import linear_cross_entropy
from nanogpt.model.softcap import Softcap, softcap

CAP = Softcap(6.0, 6.0, 0.0)
TILTED = Softcap(5.0, 8.0, 2.0)
HIGHEST = Softcap(40.0, 32.0, -5.0)
ONE, THREE = (1.0,), (1.0, 0.5, 0.25)  # weights of the targets of a token
D, V = 16, 37
WAYS = [(kernel, fp8) for kernel in ("xla", "pallas") for fp8 in (False, True)]


@pytest.fixture(autouse=True)
def interpreted_kernel(monkeypatch):
    """Use the kernel itself, interpreted, with rows of V ids in blocks of 16, 16, 4 and 1."""
    monkeypatch.setattr(loss, "_two_passes", partial(cross_entropy.one_pass, interpret=True))
    monkeypatch.setattr(cross_entropy, "CHUNK", 16)


def numpy_losses(logits, targets, cap):
    """Return the loss of each target, [..., K]."""
    capped = cap.bound * np.tanh((np.asarray(logits, "f8") + cap.shift) / cap.width)
    log_p = capped - np.log(np.exp(capped).sum(axis=-1, keepdims=True))
    return np.where(targets < 0, 0.0, -np.take_along_axis(log_p, np.maximum(targets, 0), axis=-1))


def numpy_gradient(logits, targets, cap, weights, h=1e-5):
    """Differentiate each token's objective by its logits, all tokens at once: they do not mix."""
    logits = np.asarray(logits, "f8")

    def objective(logits):
        return numpy_losses(logits, targets, cap) @ np.array(weights)

    steps = h * np.eye(logits.shape[-1])
    rise = [objective(logits + step) - objective(logits - step) for step in steps]
    return np.stack(rise, axis=-1) / (2 * h)


def some_targets(shape, K, ids=V):
    targets = np.random.default_rng(1).integers(0, ids, (*shape, K))
    targets[0, 0] = 0  # the first id is an id, not a missing target
    targets[0, 1] = ids - 1
    targets[1, 2] = targets[2, 4] = -1
    targets[2, 0] = -100
    # Of several targets some may be missing, or equal.
    targets[0, 3, 1:] = targets[1, 0, :-1] = -1
    targets[1, 1, 1:] = targets[1, 1, 0]
    return targets


def some_inputs(dtype, spread=1.0, K=3):
    """Return features, a head and targets; bfloat16 represents the logits exactly."""
    rng = np.random.default_rng(0)
    features = rng.choice([-1.0, -0.5, 0.5, 1.0], (3, 5, D)).astype(dtype)
    head = (rng.integers(-5, 6, (D, V)) / 8 * spread).astype(dtype)
    return features, head, some_targets((3, 5), K)


@lru_cache
def expected(dtype, cap, spread, weights):
    """Return losses, and both gradients of the sum of objectives times `factors`, in float64."""
    features, head, targets = some_inputs(dtype, spread, len(weights))
    x, w = np.asarray(features, "f8"), np.asarray(head, "f8")
    dlogits = factors()[..., None] * numpy_gradient(x @ w, targets, cap, weights)
    dhead = x.reshape(-1, D).T @ dlogits.reshape(-1, V)
    return numpy_losses(x @ w, targets, cap), dlogits @ w.T, dhead


def factors():
    """Return factors on the gradients of the tokens' objectives."""
    return np.random.default_rng(2).uniform(0.5, 2.0, (3, 5)).astype("f4")


@partial(jax.jit, static_argnames=("cap", "kernel", "fp8"))
def program(features, head, targets, weights, factors, *, cap, **way):
    pair_of = partial(linear_cross_entropy, targets=targets, cap=cap, weights=weights, **way)
    (objective, loss), pullback = jax.vjp(pair_of, features, head)
    return objective, loss, *pullback((factors, 100 * jnp.ones_like(loss)))


def losses_and_gradients(features, head, targets, weights=THREE, factors=1.0, cap=CAP, **way):
    """Return objective, loss, and the gradients of the sum of objective * factors.

    The loss is only for the log: a gradient with respect to it must have no effect. The weights
    change from step to step, so they are an input of the program.
    """
    above = np.broadcast_to(np.float32(factors), targets.shape[:-1])
    return program(features, head, targets, weights, above, cap=cap, **way)


# What validation computes.
undifferentiated = jax.jit(linear_cross_entropy, static_argnames=("cap", "weights", "kernel"))


def assert_near(got, want, tolerance):
    """Assert that errors are small relative to the largest element, or to 1."""
    got, want = np.asarray(got, "f8"), np.asarray(want, "f8")
    assert got.shape == want.shape
    np.testing.assert_array_less(np.abs(got - want), tolerance * max(1.0, np.abs(want).max()))


def relative_error(got, want):
    got, want = np.asarray(got, "f8"), np.asarray(want, "f8")
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("kernel", ["xla", "pallas"])
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-6), ("bfloat16", 2**-7)])
@pytest.mark.parametrize(
    ("cap", "spread", "weights"),
    [(CAP, 1, ONE), (CAP, 1024, ONE), (HIGHEST, 1, THREE), (HIGHEST, 16, THREE)],
)
def test_losses_and_gradients_equal_float64_and_its_finite_differences(
    cap, spread, weights, dtype, rounding, kernel
):
    inputs = features, head, _ = some_inputs(dtype, spread, len(weights))
    objective, loss, dfeatures, dhead = losses_and_gradients(
        *inputs, weights, factors(), cap, kernel=kernel
    )

    want, want_dfeatures, want_dhead = expected(dtype, cap, spread, weights)
    dtypes = (jnp.float32, jnp.float32, features.dtype, head.dtype)
    assert (objective.dtype, loss.dtype, dfeatures.dtype, dhead.dtype) == dtypes
    # bfloat16 rounds gradients, but not the losses.
    others = undifferentiated(*inputs, cap=cap, weights=weights, kernel=kernel)
    for got_objective, got_loss in ((objective, loss), others):
        np.testing.assert_allclose(got_objective, want @ np.array(weights), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got_loss, want[..., 0], rtol=1e-5, atol=1e-5)
        assert weights != ONE or np.array_equal(got_objective, got_loss)
    assert_near(dfeatures / spread, want_dfeatures / spread, rounding)
    assert_near(dhead, want_dhead, rounding)


@pytest.mark.parametrize(("tokens", "ids"), [(7, 1), (7, 15), (1, 48)])
def test_the_kernel_reads_any_number_of_tokens_and_ids(tokens, ids):
    rng = np.random.default_rng(ids)
    x, w = rng.standard_normal((tokens, D), "f4"), rng.standard_normal((D, ids), "f4")
    targets = rng.integers(0, ids, (tokens, 3))
    objective, _, *gradients = losses_and_gradients(x, w, targets, cap=TILTED, kernel="pallas")
    x, w = x.astype("f8"), w.astype("f8")
    want = numpy_losses(x @ w, targets, TILTED) @ np.array(THREE)
    np.testing.assert_allclose(objective, want, rtol=1e-5, atol=1e-5)
    dlogits = numpy_gradient(x @ w, targets, TILTED, THREE)
    for got, exact in zip(gradients, (dlogits @ w.T, x.T @ dlogits), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "fp8"), WAYS)
def test_a_token_without_a_target_costs_nothing_and_teaches_nothing(kernel, fp8):
    features, head, targets = some_inputs("float32")
    run = partial(losses_and_gradients, kernel=kernel, fp8=fp8)
    objective, loss, dfeatures, dhead = map(np.asarray, run(features, head, targets))
    assert np.array_equal(loss == 0, targets[..., 0] < 0)
    without = np.all(targets < 0, axis=-1)
    assert without.sum() == 3
    assert not np.any(objective[without]) and not np.any(dfeatures[without])
    assert np.all(objective[~without]) and np.all(np.any(dfeatures[~without], axis=-1))
    features[without] = 0  # then they could not teach anything
    *_, dhead_of_the_others = run(features, head, targets)
    assert_near(dhead, dhead_of_the_others, 1e-6)


@pytest.mark.parametrize(("kernel", "fp8"), WAYS)
def test_targets_whose_weight_has_fallen_to_zero_are_as_if_they_were_not_there(kernel, fp8):
    features, head, targets = some_inputs("float32")
    targets[0, 2] = -1, -1, 5  # a token with no other target
    run = partial(losses_and_gradients, features, head, kernel=kernel, fp8=fp8)
    three = run(targets, (1.0, 0.5, 0.0))
    targets[..., 2] = -1
    two = run(targets, (1.0, 0.5, 0.0))
    for got, want in zip(three, two, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [ONE, (1.0, 0.5), (1.0, 0.5, 0.25, 0.125)])
def test_weights_that_do_not_fit_the_targets_are_refused(weights):
    with pytest.raises(ValueError, match=r"^weights must be 3 numbers, .* not \(1\.0,"):
        undifferentiated(*some_inputs("float32"), cap=CAP, weights=weights)


def test_a_softcap_can_be_the_sigmoid_of_the_speedrun():
    features, head, targets = some_inputs("float32", spread=16, K=1)
    logits = np.asarray(features, "f8") @ np.asarray(head, "f8")
    assert logits.min() < -30 and logits.max() > 30
    capped = 23 / (1 + np.exp(-(logits + 5) / 7.5))
    log_p = capped - np.log(np.exp(capped).sum(axis=-1, keepdims=True))
    want = -np.take_along_axis(log_p, np.maximum(targets, 0), axis=-1)
    _, loss = undifferentiated(features, head, targets, cap=Softcap(11.5, 15.0, 5.0))
    np.testing.assert_allclose(loss, np.where(targets < 0, 0.0, want)[..., 0], rtol=1e-5)


def test_impossible_ids_have_no_probability_whatever_their_logits():
    features, _, _ = some_inputs("float32")
    rng, ids = np.random.default_rng(3), 40
    head = rng.standard_normal((D, ids), "f4")
    targets = some_targets((3, 5), 3, ids)
    impossible = rng.random((3, 5, ids)) < 0.5
    np.put_along_axis(impossible, np.maximum(targets, 0), False, axis=-1)
    mask = np.packbits(impossible, axis=-1, bitorder="little")
    objective, loss = undifferentiated(
        features, head, targets, cap=CAP, weights=THREE, kernel="pallas", impossible=mask
    )
    logits = np.asarray(features, "f8") @ np.asarray(head, "f8")
    capped = np.where(impossible, -np.inf, CAP.bound * np.tanh(logits / CAP.width))
    log_p = capped - np.log(np.exp(capped).sum(axis=-1, keepdims=True))
    want = np.where(targets < 0, 0, -np.take_along_axis(log_p, np.maximum(targets, 0), axis=-1))
    np.testing.assert_allclose(objective, want @ np.array(THREE), rtol=1e-5)
    np.testing.assert_allclose(loss, want[..., 0], rtol=1e-5)


def test_8_bit_floats_err_by_their_rounding_and_no_more():
    # RMS-normalized features and a head as large as after training.
    rng, cap = np.random.default_rng(3), Softcap(11.5, 15.0, 5.0)
    features = rng.standard_normal((6, 32, 64))
    features /= np.sqrt(np.mean(features**2, axis=-1, keepdims=True))
    features = features.astype(jnp.bfloat16)
    head = (0.1 * rng.standard_normal((64, 100))).astype(jnp.bfloat16)
    targets = some_targets((6, 32), 3, 100)
    factors = rng.uniform(0, 1e-4, (6, 32)).astype("f4")

    x, w = features.astype("f8"), head.astype("f8")
    want = numpy_losses(x @ w, targets, cap)[..., 0]
    dlogits = factors[..., None] * numpy_gradient(x @ w, targets, cap, THREE)
    want_gradients = dlogits @ w.T, x.reshape(-1, 64).T @ dlogits.reshape(-1, 100)

    run = partial(losses_and_gradients, features, head, targets, factors=factors, cap=cap)
    _, plain, *plain_gradients = run(kernel="pallas")
    by_xla, by_pallas = (run(kernel=kernel, fp8=True)[1:] for kernel in ("xla", "pallas"))
    for losses, *gradients in (by_xla, by_pallas):
        assert np.abs(losses - want).max() < 0.1 and abs(np.mean(losses - want)) < 0.005
        assert np.abs(losses - want).max() > 4 * np.abs(plain - want).max()
        # e4m3 rounds by up to 2^-4 and e5m2 by up to 2^-3, about half as much on average.
        for got, unrounded, exact in zip(gradients, plain_gradients, want_gradients, strict=True):
            assert got.dtype == jnp.bfloat16
            assert 0.01 < relative_error(got, exact) < 0.08
            assert relative_error(unrounded, exact) < 0.005
    for got, same in zip(by_pallas[1:], by_xla[1:], strict=True):
        assert relative_error(got, same) < 0.003


def equations(jaxpr, name):
    """Return all equations of a primitive, in this jaxpr and nested ones."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner, name)


def training_jaxpr(kernel, fp8):
    def mean_objective(features, head, targets):
        objective, _ = linear_cross_entropy(
            features, head, targets, CAP, weights=THREE, kernel=kernel, fp8=fp8
        )
        return objective.mean()

    return jax.make_jaxpr(jax.grad(mean_objective, (0, 1)))(*some_inputs("bfloat16")).jaxpr


@pytest.mark.parametrize("kernel", ["xla", "pallas"])
def test_the_products_are_of_8_bit_floats_if_asked_and_only_then(kernel):
    def operands(fp8):
        dots = equations(training_jaxpr(kernel, fp8), "dot_general")
        return {
            (tuple(var.aval.dtype.name for var in eqn.invars), eqn.params["precision"])
            for eqn in dots
        }

    exact = (jax.lax.Precision.HIGHEST,) * 2
    assert operands(True) == {
        (("float8_e4m3fn", "float8_e4m3fn"), None),
        (("float8_e5m2", "float8_e4m3fn"), exact),
        (("float8_e4m3fn", "float8_e5m2"), exact),
    }
    assert operands(False) == {(("bfloat16", "bfloat16"), None)}


def test_too_large_weights_and_features_saturate_in_8_bits():
    features, head, targets = some_inputs("float32")
    head[3, 5], features[1, 1, 3] = 100.0, -1e6
    bounded = np.clip(features, -28.0, 28.0), np.clip(head, -1.75, 1.75), targets
    same = losses_and_gradients(*bounded, fp8=True)
    for got, want in zip(
        losses_and_gradients(features, head, targets, fp8=True), same, strict=True
    ):
        assert np.all(np.isfinite(got))
        np.testing.assert_array_equal(got, want)
    # Within the bounds there is no rounding: these few digits fit into 8 bits.
    np.testing.assert_allclose(same[0], losses_and_gradients(*bounded)[0], rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e9])
def test_8_bit_gradients_follow_the_size_of_what_comes_from_above(size):
    run = partial(losses_and_gradients, *some_inputs("float32"), THREE, fp8=True)
    _, _, *gradients = run(factors())
    _, _, *sized = run(size * factors())
    for got, one in zip(sized, gradients, strict=True):
        np.testing.assert_allclose(got, size * one, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("kernel", ["xla", "pallas"])
def test_8_bit_gradients_follow_the_size_of_the_weights(kernel):
    run = partial(losses_and_gradients, *some_inputs("float32"), kernel=kernel, fp8=True)
    _, _, *gradients = run(weights=THREE)
    _, _, *sized = run(weights=(8.0, 4.0, 2.0))
    for got, one in zip(sized, gradients, strict=True):
        np.testing.assert_allclose(got, 8 * one, rtol=1e-5, atol=1e-5)


def test_8_bit_gradients_of_too_many_ids_for_32_bit_addresses_are_made_in_parts(monkeypatch):
    inputs, way = some_inputs("float32"), {"kernel": "pallas", "fp8": True}
    whole = losses_and_gradients(*inputs, **way)
    limit = 8 * V
    monkeypatch.setattr(cross_entropy, "MAX_8BIT_ELEMENTS", limit)
    in_parts = jax.jit(partial(program.__wrapped__, cap=CAP, **way))
    for part, full in zip(in_parts(*inputs, THREE, np.ones((3, 5), "f4")), whole, strict=True):
        assert_near(part, full, 1e-6)

    calls = equations(training_jaxpr("pallas", True), "pallas_call")
    compiled = [call for call in calls if not call.params["interpret"]]
    sizes = [var.aval.size for call in compiled for var in call.outvars]
    assert sum(sizes) == 15 * V + 15 * 3 and max(sizes) <= limit


def kept_for_the_backward_pass(loss_of):
    """Return shapes and dtypes of a small head's residuals, stored for the backward pass."""
    shapes = [(64, 16), (16, 256), (64, 3)]
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, ("bfloat16", "bfloat16", "int32"), strict=True)
    ]

    def pullback_of(features, head, targets):
        return jax.vjp(lambda x, head: loss_of(x, head, targets), features, head)[1]

    pullback = jax.eval_shape(pullback_of, *args)
    return {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pullback)}


@pytest.mark.parametrize(("kernel", "fp8"), WAYS)
def test_no_float32_copy_of_the_logits_is_kept_for_the_backward_pass(kernel, fp8):
    ours = kept_for_the_backward_pass(
        lambda *args: linear_cross_entropy(*args, TILTED, weights=THREE, kernel=kernel, fp8=fp8)
    )
    of_that_size = {dtype for dtype, shape in ours if np.prod(shape) >= 64 * 256}
    assert of_that_size == {"float8_e5m2" if (kernel, fp8) == ("pallas", True) else "bfloat16"}


def test_a_float32_copy_of_the_logits_would_be_seen():
    def plain(features, head, targets):
        log_p = jax.nn.log_softmax(softcap(features @ head, CAP))
        return -jnp.take_along_axis(log_p, targets, axis=-1)

    assert ("float32", (64, 256)) in kept_for_the_backward_pass(plain)


def on_devices(mesh, kernel, fp8):
    """Return the mean objective and its gradients as in a training step, and sums over tokens.

    Features and targets are sharded over the devices, the head is not.
    """
    pair_of = partial(linear_cross_entropy, cap=TILTED, weights=THREE, kernel=kernel, fp8=fp8)

    def train(features, head, targets):
        head = jax.lax.pcast(head, "data", to="varying")
        mean_objective, (dfeatures, dhead) = jax.value_and_grad(
            lambda features, head: pair_of(features, head, targets)[0].mean(), (0, 1)
        )(features, head)
        return *jax.lax.pmean((mean_objective, dhead), "data"), dfeatures / mesh.size

    def evaluate(features, head, targets):
        objective, loss = pair_of(features, head, targets)
        return jax.lax.psum((objective.sum(), loss.sum()), "data")

    over = partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P("data")))
    return over(train, out_specs=(P(), P(), P("data"))), over(evaluate, out_specs=P())


@pytest.mark.parametrize(("kernel", "fp8"), WAYS)
def test_devices_that_share_the_tokens_get_the_gradients_of_one(kernel, fp8, monkeypatch):
    monkeypatch.undo()  # JAX cannot interpret a kernel inside shard_map; CPUs use XLA instead
    rng = np.random.default_rng(5)
    features = rng.standard_normal((16, 3, D), "f4")
    head = np.float32(0.3) * rng.standard_normal((D, V), "f4")
    args = features, head, rng.integers(-1, V, (16, 3, 3))
    runs = []
    for count in (1, 8):
        mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])
        train, evaluate = on_devices(mesh, kernel, fp8)
        both = jax.jit(lambda *args, t=train, e=evaluate: (*t(*args), *e(*args)))
        runs.append(both(*args))
    for one, many in zip(*runs, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7)
    mean_objective, _, _, total, _ = runs[0]
    np.testing.assert_allclose(total, 48 * mean_objective, rtol=1e-6)


@pytest.mark.parametrize("fp8", [False, True])
def test_nvidia_gpus_get_the_kernel_which_writes_over_the_logits_where_it_fits(fp8, monkeypatch):
    monkeypatch.undo()  # fewer, larger blocks of ids
    device = AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,), abstract_device=device)
    shapes = [(64, D), (D, 1152), (64, 3)]
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, ("bfloat16", "bfloat16", "int32"), strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        train, evaluate = (
            jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
            for function in on_devices(mesh, "pallas", fp8)
        )
    (call,) = [line for line in train.splitlines() if "gpu.triton" in line]
    results = f"(tensor<8x3xf32>, tensor<8x1152x{'f8E5M2' if fp8 else 'bf16'}>)"
    inputs = "(tensor<8x1152xbf16>, tensor<8x3xi32>, tensor<3xf32>)"
    assert call.endswith(f"{inputs} -> {results}")
    assert ("output_tuple_indices = [1], operand_index = 0" in call) == (not fp8)
    assert "gpu.triton" not in evaluate


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="runs the compiled kernel (JAX_PLATFORMS=cuda)"
)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("weights", [ONE, THREE])
def test_on_a_gpu_the_compiled_kernel_computes_the_losses_and_gradients_of_two_passes(
    weights, fp8, monkeypatch
):
    monkeypatch.undo()  # the kernel as the device runs it
    rng, N, ids = np.random.default_rng(7), 256, 50304
    features = jnp.asarray(rng.standard_normal((N, 128)), "bfloat16")
    head = jnp.asarray(0.3 * rng.standard_normal((128, ids)), "bfloat16")
    targets = jnp.asarray(rng.integers(-1, ids, (N, len(weights))))

    @partial(jax.jit, static_argnames="kernel")
    def losses_and_gradients(kernel):
        def objective(features, head):
            how = {"weights": weights, "kernel": kernel, "fp8": fp8}
            each, _ = linear_cross_entropy(features, head, targets, CAP, **how)
            return each.mean(), each

        (_, each), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(features, head)
        return each, *gradients

    for got, expected in zip(*map(losses_and_gradients, ("pallas", "xla")), strict=True):
        got, expected = np.asarray(got, "f4"), np.asarray(expected, "f4")
        assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)
