"""The parts of a step, each timed separately."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from benchmarks.gpu.floors import (
    ADAM,
    DIRECTIONS,
    attention_row,
    attentions,
    loss_row,
    nested,
    orthogonalization_flops,
    parameter_shapes,
    products,
)
from benchmarks.gpu.loop import check_agreement, part_ms, random
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.variants import Rule, Size, random_tokens
from benchmarks.gpu.whole_step import make_rules
from nanogpt.config import AttentionKernel, LossKernel
from nanogpt.devices.hardware import PEAK_FLOPS
from nanogpt.model.attention import attention
from nanogpt.model.loss import Softcap, linear_cross_entropy
from nanogpt.optim.muon import scale_by_muon

Job = tuple[str, str, Callable[[], Figures]]  # section, row, and the function to measure it
# Kernel, and whether queries see only their own document.
ATTENTIONS = [("xla", True), ("pallas", True), ("cudnn", False), ("pallas", False)]
CHECKED = 4096  # keys per row when a kernel is checked, for which there is enough memory
LOSSES = [("xla", False), ("xla", True), ("pallas", False), ("pallas", True)]  # kernel, FP8


def part_jobs(size: Size, kernel: AttentionKernel) -> list[Job]:
    """Return all measurements of parts; `kernel` is that of the base."""
    c = size.hp.model
    product, loss = partial(measure_product, size), partial(measure_loss, size)
    attend, update = partial(measure_attention, size), partial(measure_update, size)
    return [
        *(
            ("products", f"{name}, {way}", partial(product, shape, way))
            for name, (*shape, _) in products(c).items()
            for way in DIRECTIONS
        ),
        *(("loss", loss_row(*which), partial(loss, *which)) for which in LOSSES),
        *(
            ("attention", attention_row(*how, *which), partial(attend, *how, *which))
            for how in dict.fromkeys([(kernel, True), *ATTENTIONS])
            for which in dict.fromkeys(attentions(c))
        ),
        ("optimizer", "Muon and Adam", partial(update, "NorMuon", {"muon", *ADAM})),
        ("optimizer", "Muon's part", partial(update, "NorMuon", {"muon"})),
        ("optimizer", "the same, plain", partial(update, "Muon", {"muon"})),
        ("optimizer", "orthogonalization in it", partial(measure_orthogonalization, size)),
        ("optimizer", "Adam's part", partial(update, "NorMuon", ADAM)),
    ]


def with_rate(ms: float, flops: float) -> Figures:
    """Return the time and the FLOP/s, also as a fraction of the peak."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    rate = flops / ms * 1e3
    return {"ms": ms, "tflops": rate / 1e12, "of_peak": peak and rate / peak}


def measure_product(size: Size, shape: tuple[int, int], way: str) -> Figures:
    """Time one matmul of a micro-batch."""
    inputs, outputs = shape
    x, dy, weight = (size.tokens, inputs), (size.tokens, outputs), (inputs, outputs)
    formula, a, b = {
        "forward": ("ni,io->no", x, weight),
        "d-input": ("no,io->ni", dy, weight),
        "d-weight": ("ni,no->io", x, dy),
    }[way]
    arguments = [random(*a), random(*b)]
    ms = part_ms(size, lambda _, a, b: jnp.einsum(formula, a, b), arguments)
    return with_rate(ms, 2 * size.tokens * inputs * outputs)


def measure_attention(
    size: Size,
    kernel: AttentionKernel,
    masked: bool,
    window: int,
    paired: bool,
    backward: bool = True,
) -> Figures:
    """Time one layer's attention for a micro-batch, with or without its gradients."""
    c, B, times = size.hp.model, size.hp.batch_size, 1 + paired
    T, N = times * size.hp.sequence_length, c.num_heads // times
    begins = random_tokens(c, (B, size.hp.sequence_length)) == c.document_separator
    numbers = jnp.cumsum(begins, axis=1, dtype=jnp.int32).repeat(times, axis=1)

    def work(_, q: Array, k: Array, v: Array, gradient: Array, kernel: str = kernel) -> tuple:
        documents = numbers[: len(q), : q.shape[1]] if masked else None
        how = {"scale": c.attention_scale, "window": window, "kernel": kernel}
        attend = partial(attention, documents=documents, **how)
        if not backward:
            return (attend(q, k, v),)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(gradient)

    arguments = list(jnp.unstack(random(B, T, 4, N, c.head_size), axis=2))
    if kernel != "xla":
        check_agreement(work, partial(work, kernel="xla"), [x[:1, :CHECKED] for x in arguments])
    keys = float(np.minimum(np.arange(1, T + 1), window).mean())
    flops = (6 if backward else 2) * 2 * c.width * keys * size.tokens
    return with_rate(part_ms(size, work, arguments), flops)


def measure_loss(size: Size, kernel: LossKernel, fp8: bool) -> Figures:
    """Time the head and the loss of a micro-batch, with the gradients of features and head."""
    c, N, weights = size.hp.model, size.tokens, size.hp.stages[0].target_weights
    cap = Softcap(c.softcap, c.softcap / c.logit_scale, c.logit_shift)

    def work(_, features: Array, head: Array, kernel: str = kernel, fp8: bool = fp8) -> tuple:
        ahead = jnp.arange(len(features))[:, None] + jnp.arange(len(weights))
        targets = ahead * 7919 % c.vocab_size

        def loss(features: Array, head: Array) -> Array:
            how = {"weights": weights, "kernel": kernel, "fp8": fp8}
            return linear_cross_entropy(features, head, targets, cap, **how)[0].mean()

        value, gradients = jax.value_and_grad(loss, (0, 1))(features, head)
        return *gradients, value

    arguments = [random(N, c.width), random(c.width, c.padded_vocab_size) * c.width**-0.5]
    if (kernel, fp8) != ("xla", False):
        few = [arguments[0][:1024], arguments[1]]
        check_agreement(work, partial(work, kernel="xla", fp8=False), few)
    return {"ms": part_ms(size, work, arguments)}


def measure_update(size: Size, rule: Rule, groups: set[str]) -> Figures:
    """Time the optimizer's update of these groups' parameters, including its addition to them."""
    shapes = parameter_shapes(size.hp.model, groups)
    draw = jax.jit(lambda: [random(1, *x.shape, dtype=x.dtype)[0] for x in shapes.values()])
    params, gradients = nested(dict(zip(shapes, draw(), strict=True))), draw()
    rules, first = make_rules(size.hp, rule), size.hp.schedule.rates(1)
    rates = {"rate": first.rate, "momentum": first.momentum}

    def work(last: tuple, *gradients: Array) -> tuple:
        params, state = last
        named = nested(dict(zip(shapes, gradients, strict=True)))
        updates, state = rules.update(named, state, params, **rates)
        return optax.apply_updates(params, updates), state

    return {"ms": part_ms(size, work, gradients, (params, jax.jit(rules.init)(params)))}


def measure_orthogonalization(size: Size) -> Figures:
    """Time plain Muon with new momentum in each round, so that this is only a constant factor."""
    shapes = parameter_shapes(size.hp.model, {"muon"})
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    rule = scale_by_muon(None, size.hp.head_groups, dtype)

    def work(_, *matrices: Array) -> tuple[Array, ...]:
        named = nested(dict(zip(shapes, matrices, strict=True)))
        return tuple(jax.tree.leaves(rule.update(named, rule.init(named), momentum=0.5)[0]))

    ms = part_ms(size, work, [random(*x.shape, dtype=x.dtype) for x in shapes.values()])
    return with_rate(ms, orthogonalization_flops(size.hp))
