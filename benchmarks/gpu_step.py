"""How long one optimizer step takes on this device: by variant, by part, and what it could take.

    .venv/bin/python -m benchmarks.gpu_step
    .venv/bin/python -m benchmarks.gpu_step --trace FOLDER

One run of some minutes, with the `speedrun` preset on random tokens, measures

    steps       the whole step of train_gpt.py, and the same with one thing changed: the kernel of
                attention or loss, the precision of the head, the rows of a micro-batch, Adam in
                place of Muon; then the fastest of each together, and the first one again, so that
                a drift of the device shows
    products    every product of two matrices of a micro-batch, forward and backward
    attention   one layer of a micro-batch, forward and backward: by kernel, sequence and window
    loss        head and loss of a micro-batch, forward and backward
    optimizer   the update, and what it is made of
    parts       from these: where the time of the step goes, and the floor of each part

What fails, or disagrees with XLA's results, says so in its row, and the rest goes on. The figures
are saved after every row.

What is timed alone runs in a loop on the device, which adds two or three kernels of some
microseconds to each round: up to some percent of the smallest product. Of the parts, "loss" is the
section of that name minus the products with the head, because the project has them in one function,
and "rest" (norms, residuals, embeddings, gaps) is the step minus all other parts.

The floor of a part is what it must compute or move, at the peak of the device's data sheet:

    products, attention   2 FLOPs per multiplication that the mathematics needs; backward twice what
                          is needed forward; of the attention only the half that is visible
    loss                  the logits read once and their gradient written once, 2 bytes each
    optimizer             weights and momenta read and written and gradients read, 4 bytes each,
                          then the FLOPs of Muon's iteration
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # as train_gpt.py does

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.stages import Compiled
from jaxtyping import Array, PyTree

from benchmarks.results import save
from nanogpt.attention import attention, choose_attention
from nanogpt.compilation import use_compilation_cache
from nanogpt.config import AttentionKernel, GPTConfig, Kernels, LossKernel
from nanogpt.hardware import PEAK_BANDWIDTH, PEAK_FLOPS, flops_per_token, utilization
from nanogpt.loss import linear_cross_entropy
from nanogpt.mesh import BATCH, REPLICATED, make_mesh, put, shapes_on
from nanogpt.muon import NEWTON_SCHULZ_STEPS, scale_by_muon
from nanogpt.optimizer import group
from nanogpt.step import graph_of, init_params, make_init, make_train_step
from train_gpt import PRESETS, Hyperparameters, optimizer_of

Figures = dict[str, Any]  # of one row, as they are saved
Job = tuple[str, str, Callable[[], Figures]]  # section, row, and what measures it
Work = Callable[..., PyTree]  # (last result, *arguments) to the next result
WARM_UP = 3  # calls, or steps, before the clock starts
TOLERANCE = 0.1  # relative error: bfloat16 makes 1 %, 8-bit floats 3 %, mistakes about 100 %
LOSS_TOLERANCE = 0.5  # nats, after some steps that differ in rounding
DIRECTIONS = ("forward", "d-input", "d-weight")
LOSSES = [("xla", False), ("xla", True), ("pallas", False), ("pallas", True)]  # kernel, FP8
ADAM = frozenset({"embedding", "head", "scalar"})  # groups of parameters; Muon's is "muon"


@dataclass(frozen=True)
class Options:
    """Time the optimizer step of the speedrun preset, its variants and its parts."""

    trace: Path | None = None
    """Folder for a profile of three steps, to look at with XProf or Perfetto."""
    tiny: bool = False
    """Everything so small that a CPU takes seconds: a test of this script, not of the speed."""


@dataclass(frozen=True)
class Size:
    """What is measured, and how often."""

    hp: Hyperparameters  # its batch_size is that of the base
    other_batch_sizes: tuple[int, ...]
    rounds: int  # of a part in one call
    calls: int  # or steps, between two looks at the clock
    repeats: int  # of which the median counts

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.hp.batch_size * self.hp.sequence_length

    @property
    def Ng(self) -> int:
        """Micro-batches of a step."""
        return self.hp.total_batch_size // self.tokens


SPEEDRUN = PRESETS["speedrun"]
FULL = Size(replace(SPEEDRUN, batch_size=64), (32, 128), rounds=20, calls=3, repeats=5)
TINY_MODEL = GPTConfig(256, num_layers=2, num_heads=2, width=64, mlp_width=256, value_embeddings=1)
TINY = Size(
    replace(SPEEDRUN, batch_size=2, sequence_length=64, total_batch_size=256, model=TINY_MODEL),
    *((1,), 2, 1, 2),
)


@dataclass(frozen=True)
class Variant:
    """How a step is computed."""

    attention: AttentionKernel
    batch_size: int
    loss: LossKernel = "xla"
    fp8_head: bool = False
    muon: bool = True


class Unmeasured(Exception):
    """Why there are no figures: a sentence."""


def main(arguments: list[str] | None = None) -> int:
    """Measure everything, print tables, save the figures, and return the exit status."""
    options = tyro.cli(Options, args=arguments)
    use_compilation_cache()
    measure_all(TINY if options.tiny else FULL, options)
    return 0


def measure_all(size: Size, options: Options) -> None:
    """The whole run."""
    hp, device = size.hp, jax.devices()[0].device_kind
    kernel, why = choose_attention(hp.model, hp.sequence_length, hp.dtype)
    base = Variant(kernel, hp.batch_size)
    print(f"{device} | {why} | {hp.total_batch_size:,} tokens per step")
    figures = defaultdict(dict) | {"device": device, "attention_of_base": why}
    name, lower = "gpu_step" + "_tiny" * options.tiny, floors(hp, device)

    def record(section: str, row: str, measure: Callable[[], Figures]) -> None:
        figures[section][row] = found = attempt(measure)
        print(f"{section} | {row} | {found.get('failed') or '{ms:,.3f} ms'.format(**found)}")
        figures["parts"] = parts_of_step(size, figures, base, lower)
        with redirect_stdout(StringIO()):
            save(name, figures)

    step, variants = partial(measure_step, size, figures["steps"]), variants_of(size, base)
    jobs = [("steps", row, partial(step, variant)) for row, variant in variants.items()]
    jobs += part_jobs(size, kernel)
    # The project's own kernels last: one that reads a wrong address spoils the device for the rest
    # of the process.
    for job in sorted(jobs, key=lambda job: "pallas" in job[1]):
        record(*job)
    record("steps", "fastest of each", lambda: step(fastest_of_each(base, variants, figures)))
    record("steps", "base again", partial(step, base))
    if options.trace:
        record("steps", "base, traced", partial(trace_steps, size, base, options.trace))

    print_tables(figures)
    save(name, figures)


def attempt(measure: Callable[[], Figures]) -> Figures:
    """What `measure` returns, or why it failed, in a sentence; its memory is free again."""
    try:
        return measure()
    except Unmeasured as reason:
        return {"failed": str(reason)}
    except Exception as failure:  # whatever the driver, the library or the compiler says
        first_line = (str(failure).strip().splitlines() or ["no message"])[0][:200]
        return {"failed": f"It failed with {type(failure).__name__}: {first_line}"}
    finally:
        gc.collect()


# Whole steps.


def variants_of(size: Size, base: Variant) -> dict[str, Variant]:
    """The base, and what differs from it in one thing."""
    others = {
        **{f"{rows} rows": replace(base, batch_size=rows) for rows in size.other_batch_sizes},
        "Adam for all": replace(base, muon=False),
        "FP8 head": replace(base, fp8_head=True),
        **{f"{k} attention": replace(base, attention=k) for k in ("cudnn", "xla", "pallas")},
        "pallas loss": replace(base, loss="pallas"),
    }
    return {"base": base} | {row: other for row, other in others.items() if other != base}


def fastest_of_each(base: Variant, variants: dict[str, Variant], figures: Figures) -> Variant:
    """The base with the fastest attention, loss, head and micro-batch that were measured."""
    best = base
    for thing in ("attention", "loss", "fp8_head", "batch_size"):
        found = {
            getattr(variant, thing): milliseconds(figures, "steps", row)
            for row, variant in variants.items()
            if replace(variant, **{thing: getattr(base, thing)}) == base
        }
        measured = [value for value in found if not math.isnan(found[value])]
        if measured:
            best = replace(best, **{thing: min(measured, key=found.get)})
    return best


def make_rules(hp: Hyperparameters, muon: bool) -> Any:
    """The optimizer of train_gpt.py, or Adam for all parameters."""
    if not muon:
        return optax.adam(hp.head_learning_rate, *hp.adam_betas)
    return optimizer_of(hp, make_mesh(1))


def newton_schulz_dtype() -> Any:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


@cache  # for the base that is measured again
def compile_step(size: Size, variant: Variant) -> tuple[Callable, Compiled, float]:
    """What makes the first state, the compiled step, and the seconds to compile that."""
    hp, mesh = size.hp, make_mesh(1)
    rules = make_rules(hp, variant.muon)
    init = make_init(hp.model, rules, mesh)
    kernels = Kernels(variant.attention, variant.loss, variant.fp8_head)
    step = make_train_step(graph_of(hp.model, kernels), rules, mesh, hp.dtype)
    state = shapes_on(mesh, REPLICATED, jax.eval_shape(init, jax.random.key(0)))
    batch = jax.ShapeDtypeStruct(batch_shape(hp, variant), jnp.int32)
    start = time.perf_counter()
    compiled = step.lower(state, shapes_on(mesh, BATCH, batch)).compile()
    return init, compiled, time.perf_counter() - start


def batch_shape(hp: Hyperparameters, variant: Variant) -> tuple[int, int, int]:
    """Micro-batches, rows, and tokens of a row with the target of the last."""
    R, T = variant.batch_size, hp.sequence_length
    return hp.total_batch_size // (R * T), R, T + 1


def start_training(size: Size, variant: Variant) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """`advance` and `carry`, the state and the metrics after some steps from the same start."""
    init, step, _ = compile_step(size, variant)
    shape = batch_shape(size.hp, variant)
    tokens = np.random.default_rng(0).integers(size.hp.model.vocab_size, size=shape)
    batch = put(make_mesh(1), BATCH, shape, tokens.astype(np.int32).__getitem__)

    def advance(carry: PyTree) -> PyTree:
        return step(carry[0], batch)

    carry = (init(jax.random.key(0)), None)
    for _ in range(WARM_UP):
        carry = advance(carry)
    return advance, carry


def measure_step(size: Size, steps: Figures, variant: Variant) -> Figures:
    """Time and memory of a step; Unmeasured if its loss is not that of the base in `steps`.

    `memory_GB` is what the compiler plans for this step. `peak_GB` is the most that the process
    has had in use so far, where the device tells.
    """
    hp, base = size.hp, steps.get("base", {})
    advance, carry = start_training(size, variant)
    loss = float(carry[1]["loss"])
    expected = base.get("last_loss", loss)
    if variant.muon and not abs(loss - expected) < LOSS_TOLERANCE:  # NaN, too, is no agreement
        raise Unmeasured(
            f"After {WARM_UP} steps its loss is {loss:.2f}, the base's {expected:.2f}."
        )
    ms = median_ms(size, advance, carry)

    _, compiled, seconds = compile_step(size, variant)
    planned, device = compiled.memory_analysis(), jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    rate, flops = hp.total_batch_size / ms * 1e3, flops_per_token(hp.model, hp.sequence_length)
    return {
        "ms": ms,
        "tokens_per_s": rate,
        "mfu": utilization(rate, flops, device.device_kind, 1),
        "ratio": ms / base.get("ms", ms),
        "compile_s": seconds,  # or to read it, if an earlier run compiled it
        "memory_GB": (planned.temp_size_in_bytes + planned.argument_size_in_bytes) / 1e9,
        "peak_GB": peak and peak / 1e9,
        "last_loss": loss,
        "variant": asdict(variant),
    }


def median_ms(size: Size, advance: Callable[[PyTree], PyTree], carry: PyTree) -> float:
    """Milliseconds of one `carry = advance(carry)`; the host sends off many before it waits."""
    jax.block_until_ready(carry)
    times = []
    for _ in range(size.repeats):
        start = time.perf_counter()
        for _ in range(size.calls):
            carry = advance(carry)
        jax.block_until_ready(carry)
        times.append(1e3 * (time.perf_counter() - start) / size.calls)
    return statistics.median(times)


def trace_steps(size: Size, variant: Variant, folder: Path) -> Figures:
    """A profile of three steps."""
    advance, carry = start_training(size, variant)
    with jax.profiler.trace(str(folder)):
        return {"ms": median_ms(replace(size, calls=3, repeats=1), advance, carry)}


# Parts, timed alone.


def part_jobs(size: Size, kernel: AttentionKernel) -> list[Job]:
    """Everything that is timed alone; `kernel` is that of the base."""
    c, T = size.hp.model, size.hp.sequence_length
    of_model = [(T, window) for window in windows(c)]
    elsewhere = [(T, 3 * T // 8), (2 * T, None), (2 * T, 3 * T // 8)]
    places = {"cudnn": of_model + elsewhere, "pallas": of_model + elsewhere}
    kernels = dict.fromkeys([kernel, "cudnn", "xla", "pallas"])
    product, loss = partial(measure_product, size), partial(measure_loss, size)
    attend, update = partial(measure_attention, size), partial(measure_update, size)
    return [
        *(
            ("products", product_row(name, way, fp8), partial(product, shape, way, fp8))
            for name, shape in product_shapes(c).items()
            for fp8 in ([False, True] if name == "head" else [False])
            for way in DIRECTIONS
        ),
        *(("loss", loss_row(*which), partial(loss, *which)) for which in LOSSES),
        *(
            ("attention", attention_row(kernel, *place), partial(attend, kernel, *place))
            for kernel in kernels
            for place in dict.fromkeys(places.get(kernel, of_model))
        ),
        ("optimizer", "Muon and Adam", partial(update, True, {"muon", *ADAM})),
        ("optimizer", "Muon's part", partial(update, True, {"muon"})),
        ("optimizer", "orthogonalisation in it", partial(measure_orthogonalisation, size)),
        ("optimizer", "Adam's part", partial(update, True, ADAM)),
        ("optimizer", "Adam for all", partial(update, False, {"muon", *ADAM})),
    ]


def product_row(name: str, way: str, fp8: bool) -> str:
    return f"{name}, {way}" + ", FP8" * fp8


def loss_row(kernel: LossKernel, fp8: bool) -> str:
    return f"{kernel}" + ", FP8" * fp8


def attention_row(kernel: AttentionKernel, T: int, window: int | None) -> str:
    return f"{kernel}, T {T}" + (f", window {window}" if window else "")


def windows(config: GPTConfig) -> list[int | None]:
    """The window of every layer."""
    return [config.window(layer) for layer in range(config.num_layers)]


def product_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the four matrices of a block, and of the head."""
    D, F, V = config.width, config.mlp_width, config.padded_vocab_size
    return {"qkv": (D, 3 * D), "out": (D, D), "up": (D, F), "down": (F, D), "head": (D, V)}


def looped(work: Work, rounds: int) -> Callable[[tuple], tuple]:
    """Jitted `carry -> carry` that makes `result = work(result, *arguments)` so many times.

    The carry is (result, arguments), and is consumed. In each round one number of every argument is
    replaced by one that depends on the last result. So nothing can be computed once for all rounds;
    and as the results are carried and returned, nothing can be left out.
    """

    def again(_, carry: tuple) -> tuple:
        result, arguments = carry
        first = jax.tree.leaves(result)[0]
        number = jnp.tanh(first[(0,) * first.ndim].astype(jnp.float32))
        nudged = [x.at[(0,) * x.ndim].set(number.astype(x.dtype)) for x in arguments]
        return work(result, *nudged), nudged

    return jax.jit(lambda carry: jax.lax.fori_loop(0, rounds, again, carry), donate_argnums=0)


def part_ms(size: Size, work: Work, arguments: list[Array], result: PyTree = None) -> float:
    """Milliseconds of one `work`; the arguments, and the first result if given, are consumed."""
    if result is None:
        shapes = jax.eval_shape(work, None, *arguments)
        result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    advance, carry = looped(work, size.rounds), (result, arguments)
    for _ in range(WARM_UP):
        carry = advance(carry)
    return median_ms(size, advance, carry) / size.rounds


def with_rate(ms: float, flops: float, bf16: bool = True) -> Figures:
    """The time and the FLOP/s, also as a share of the peak, which is known for bfloat16 only."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind) if bf16 else None
    rate = flops / ms * 1e3
    return {"ms": ms, "tflops": rate / 1e12, "of_peak": peak and rate / peak}


def check_agreement(work: Work, reference: Work, arguments: list[Array]) -> None:
    """Raise Unmeasured if results differ from the reference's by more than rounding."""
    results = [jax.tree.leaves(jax.jit(each)(None, *arguments)) for each in (work, reference)]
    errors = [
        jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b.astype(jnp.float32))
        for a, b in zip(*results, strict=True)
    ]
    worst = float(np.max(errors))
    if not worst < TOLERANCE:  # NaN, too, is no agreement
        raise Unmeasured(f"It differs from XLA's results in bfloat16 by {worst:.0%}.")


def random(*shape: int, dtype: Any = jnp.bfloat16) -> Array:
    """Normal numbers, whose rows repeat: to draw gigabytes takes long and much memory."""
    rows = math.gcd(shape[0], 1024)
    drawn = jax.random.normal(jax.random.key(0), (rows, *shape[1:])).astype(dtype)
    return jnp.tile(drawn, (shape[0] // rows, *[1] * (len(shape) - 1)))


def measure_product(size: Size, shape: tuple[int, int], way: str, fp8: bool) -> Figures:
    """One product of a micro-batch; in 8 bits with the types and sums of nanogpt/loss.py."""
    inputs, outputs = shape
    values, gradients = (jnp.float8_e4m3fn, jnp.float8_e5m2) if fp8 else (jnp.bfloat16,) * 2
    x, dy = (size.tokens, inputs, values), (size.tokens, outputs, gradients)
    weight = (inputs, outputs, values)
    a, b, axis_of_a, axis_of_b = {
        "forward": (x, weight, 1, 0),
        "d-input": (dy, weight, 1, 1),
        "d-weight": (x, dy, 0, 0),
    }[way]
    how = {"preferred_element_type": jnp.bfloat16}
    if fp8 and way != "forward":
        how = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}

    def work(_, a: Array, b: Array) -> Array:
        summed = (((axis_of_a,), (axis_of_b,)), ((), ()))
        return jax.lax.dot_general(a, b, summed, **how).astype(jnp.bfloat16)

    arguments = [random(*sizes, dtype=dtype) for *sizes, dtype in (a, b)]
    return with_rate(part_ms(size, work, arguments), 2 * size.tokens * inputs * outputs, not fp8)


def measure_attention(size: Size, kernel: AttentionKernel, T: int, window: int | None) -> Figures:
    """Attention and its gradients, of one layer and the tokens of a micro-batch."""
    c = size.hp.model

    def work(_, q: Array, k: Array, v: Array, gradient: Array, kernel: str = kernel) -> tuple:
        attend = partial(attention, scale=c.attention_scale, window=window, kernel=kernel)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(gradient)

    arguments = list(jnp.unstack(random(size.tokens // T, T, 4, c.num_heads, c.head_size), axis=2))
    if kernel != "xla":
        check_agreement(work, partial(work, kernel="xla"), [x[:1] for x in arguments])
    keys = float(np.minimum(np.arange(1, T + 1), window or T).mean())
    return with_rate(part_ms(size, work, arguments), 6 * 2 * c.width * keys * size.tokens)


def measure_loss(size: Size, kernel: LossKernel, fp8: bool) -> Figures:
    """The head and the loss of a micro-batch, and the gradients of features and head."""
    c, N = size.hp.model, size.tokens

    def work(_, features: Array, head: Array, kernel: str = kernel, fp8: bool = fp8) -> tuple:
        targets = jnp.arange(len(features)) * 7919 % c.vocab_size

        def loss(features: Array, head: Array) -> Array:
            each = linear_cross_entropy(features, head, targets, c.softcap, kernel=kernel, fp8=fp8)
            return each.mean()

        value, gradients = jax.value_and_grad(loss, (0, 1))(features, head)
        return *gradients, value

    arguments = [random(N, c.width), random(c.width, c.padded_vocab_size) * c.width**-0.5]
    if (kernel, fp8) != ("xla", False):
        few = [arguments[0][:1024], arguments[1]]
        check_agreement(work, partial(work, kernel="xla", fp8=False), few)
    return {"ms": part_ms(size, work, arguments)}


def parameter_shapes(config: GPTConfig, groups: set[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of these groups of the optimizer, by name."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        if group(path, x) in groups
    }


def measure_update(size: Size, muon: bool, groups: set[str]) -> Figures:
    """The optimizer's update of these groups' parameters, and its addition to them."""
    shapes = parameter_shapes(size.hp.model, groups)
    params, gradients = (
        {name: random(*x.shape, dtype=x.dtype) for name, x in shapes.items()} for _ in range(2)
    )
    rules = make_rules(size.hp, muon)

    def work(last: tuple, *gradients: Array) -> tuple:
        params, state = last
        updates, state = rules.update(dict(zip(shapes, gradients, strict=True)), state, params)
        return optax.apply_updates(params, updates), state

    first = params, rules.init(params)
    return {"ms": part_ms(size, work, list(gradients.values()), first)}


def measure_orthogonalisation(size: Size) -> Figures:
    """Muon without its momentum: one that starts in each round is only a factor."""
    shapes = parameter_shapes(size.hp.model, {"muon"})
    dtype = newton_schulz_dtype()

    def work(_, *matrices: Array) -> list[Array]:
        rule = scale_by_muon(lambda step: 0.5, dtype)
        return rule.update(list(matrices), rule.init(list(matrices)))[0]

    ms = part_ms(size, work, [random(*x.shape, dtype=x.dtype) for x in shapes.values()])
    return with_rate(ms, newton_schulz_flops(size.hp.model), dtype == jnp.bfloat16)


# Where the time of a step goes, and where it must go.


def newton_schulz_flops(config: GPTConfig) -> float:
    """FLOPs of Muon's iteration over all matrices of the blocks."""
    total = 0
    for stack in parameter_shapes(config, {"muon"}).values():
        short, long = sorted(stack.shape[-2:])
        count = math.prod(stack.shape[:-2])
        total += count * (2 * short**2 * long + 2 * short**3 + 2 * short**2 * long)
    return float(NEWTON_SCHULZ_STEPS * total)


def floors(hp: Hyperparameters, device_kind: str) -> dict[str, float | None]:
    """Milliseconds of each part of a step at the peaks of the device; None where not known.

    Muon reads weight, momentum and gradient, and writes the first two; Adam has one mean more.
    """
    c, tokens = hp.model, hp.total_batch_size
    flops, bandwidth = (peaks.get(device_kind, math.nan) for peaks in (PEAK_FLOPS, PEAK_BANDWIDTH))
    *of_block, head = (6 * inputs * outputs for inputs, outputs in product_shapes(c).values())
    blocks = c.num_layers * sum(of_block)
    muon, adam = (
        sum(x.size for x in parameter_shapes(c, groups).values()) for groups in ({"muon"}, ADAM)
    )
    update = 4 * (5 * muon + 7 * adam) / bandwidth + newton_schulz_flops(c) / flops
    seconds = {
        "products of the blocks": blocks * tokens / flops,
        "products with the head": head * tokens / flops,
        "attention": (flops_per_token(c, hp.sequence_length) - blocks - head) * tokens / flops,
        "loss": 2 * 2 * c.padded_vocab_size * tokens / bandwidth,
        "optimizer": update,
    }
    seconds["whole step"] = sum(seconds.values())
    return {part: None if math.isnan(s) else 1e3 * s for part, s in seconds.items()}


def milliseconds(figures: Figures, section: str, row: str) -> float:
    """The time in a row; NaN if it was not measured."""
    return figures[section].get(row, {}).get("ms", math.nan)


def part_times(size: Size, figures: Figures, variant: Variant) -> dict[str, float]:
    """Milliseconds of each part of a step; NaN for what was not measured."""
    c, Ng = size.hp.model, size.Ng
    ms = partial(milliseconds, figures)

    def products(name: str, fp8: bool = False) -> float:
        return sum(ms("products", product_row(name, way, fp8)) for way in DIRECTIONS)

    *of_block, head = product_shapes(c)
    head_ms = Ng * products(head, variant.fp8_head)
    layers = [attention_row(variant.attention, size.hp.sequence_length, w) for w in windows(c)]
    return {
        "products of the blocks": Ng * c.num_layers * sum(map(products, of_block)),
        "products with the head": head_ms,
        "attention": Ng * sum(ms("attention", layer) for layer in layers),
        "loss": Ng * ms("loss", loss_row(variant.loss, variant.fp8_head)) - head_ms,
        "optimizer": ms("optimizer", "Muon and Adam"),
    }


def parts_of_step(
    size: Size, figures: Figures, base: Variant, lower: dict[str, float | None]
) -> dict[str, Figures]:
    """The parts of the base's step with their floors; then, in brackets, what others take."""
    step, times = milliseconds(figures, "steps", "base"), part_times(size, figures, base)
    rows = times | {"rest": step - sum(times.values()), "whole step": step}
    for kernel in ("cudnn", "xla", "pallas"):
        other = part_times(size, figures, replace(base, attention=kernel))
        rows[f"(attention: {kernel})"] = other["attention"]
    for kernel, fp8 in LOSSES:
        other = part_times(size, figures, replace(base, loss=kernel, fp8_head=fp8))
        rows[f"(loss: {loss_row(kernel, fp8)})"] = other["loss"]
        rows[f"(products with the head{': FP8' * fp8})"] = other["products with the head"]
    without = milliseconds(figures, "steps", "Adam for all")
    rows["(Muon's cost: by whole steps)"] = step - without
    without = milliseconds(figures, "optimizer", "Adam for all")
    rows["(Muon's cost: by updates)"] = times["optimizer"] - without
    return {
        row: {"failed": "Not all that it takes was measured."}
        if math.isnan(ms)
        else {"ms": ms, "of_step": None if math.isnan(step) else ms / step}
        | ({"floor_ms": lower[row]} if row in lower else {})
        for row, ms in rows.items()
    }


RATES = {"ms": ",.3f", "tflops": ",.1f", "of_peak": ".1%"}
STEPS = {"ms": ",.1f", "tokens_per_s": ",.0f", "mfu": ".1%", "ratio": ".3f"}
COLUMNS = {  # of each table, and how they are written
    "steps": STEPS | {"compile_s": ".1f", "memory_GB": ".1f", "peak_GB": ".1f"},
    "products": RATES,
    "attention": RATES,
    "loss": {"ms": ",.3f"},
    "optimizer": RATES,
    "parts": {"ms": ",.1f", "floor_ms": ",.1f", "of_step": ".1%"},
}


def print_tables(figures: Figures) -> None:
    """All sections; "unknown" is what the device, or its data sheet, does not tell."""

    def cell(found: Figures, column: str, style: str) -> str:
        if column not in found:
            return ""
        return "unknown" if found[column] is None else format(found[column], style)

    for section, columns in COLUMNS.items():
        print(f"\n{section:32}" + "".join(f"{column:>14}" for column in columns))
        for row, found in figures[section].items():
            cells = "".join(f"{cell(found, *column):>14}" for column in columns.items())
            print(f"{row:32}{found.get('failed') or cells}")


if __name__ == "__main__":
    main()
