"""How long one optimizer step takes on this device: by variant, by part, and what it could take.

    .venv/bin/python -m benchmarks.gpu_step
    .venv/bin/python -m benchmarks.gpu_step --stage 1 --trace FOLDER

One run of some minutes, with a stage of the `speedrun` preset on random tokens, measures

    steps       the whole step of train_gpt.py, and the same with one thing changed: the kernel of
                attention or loss, the precision of the head, the rows of a micro-batch, the rule
                of the matrices, one target where the stage has several; then the fastest of each
                together, and the first one again, so that a drift of the device shows
    products    every product of two matrices of a micro-batch, forward and backward
    attention   one layer of a micro-batch, forward and backward: by kernel and window
    loss        head and loss of a micro-batch, forward and backward
    optimizer   the update, and what it is made of: a mean over steps with and without Adam
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
    optimizer             weights, momenta and what Adam gathers read and written, and gradients
                          read, 4 bytes each, then the FLOPs of Muon's polynomials
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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.stages import Compiled
from jaxtyping import Array, PyTree

from benchmarks.results import save
from nanogpt.config import AttentionKernel, GPTConfig, Kernels, LossKernel
from nanogpt.devices.compilation import use_compilation_cache
from nanogpt.devices.hardware import PEAK_BANDWIDTH, PEAK_FLOPS, flops_per_token, utilization
from nanogpt.devices.mesh import BATCH, REPLICATED, make_mesh, put, shapes_on
from nanogpt.model.attention import attention, choose_attention
from nanogpt.model.loss import Softcap, linear_cross_entropy
from nanogpt.optim.groups import group
from nanogpt.optim.muon import POLAR_EXPRESS, scale_by_muon
from nanogpt.schedule import Stage
from nanogpt.training.plan import optimizer_of
from nanogpt.training.step import graph_of, init_params, make_init, make_train_step
from train_gpt import PRESETS, Hyperparameters

Figures = dict[str, Any]  # of one row, as they are saved
Job = tuple[str, str, Callable[[], Figures]]  # section, row, and what measures it
Work = Callable[..., PyTree]  # (last result, *arguments) to the next result
Rule = Literal["NorMuon", "Muon", "Adam"]  # of the matrices; Adam is then that of all parameters
WARM_UP = 3  # calls, or steps, before the clock starts
TOLERANCE = 0.1  # relative error: bfloat16 makes 1 %, 8-bit floats 3 %, mistakes about 100 %
LOSS_TOLERANCE = 0.5  # nats, after some steps that differ in rounding
DIRECTIONS = ("forward", "d-input", "d-weight")
LOSSES = [("xla", False), ("xla", True), ("pallas", False), ("pallas", True)]  # kernel, FP8
ADAM = frozenset({"embedding", "head", "scalar"})  # groups of parameters; Muon's is "muon"


@dataclass(frozen=True)
class Options:
    """Time the optimizer step of the speedrun preset, its variants and its parts."""

    stage: Literal[1, 2, 3, 4] = 3
    """Which stage of the preset; the third has the largest batch."""
    trace: Path | None = None
    """Folder for a profile of three steps, to look at with XProf or Perfetto."""
    tiny: bool = False
    """Everything so small that a CPU takes seconds: a test of this script, not of the speed."""


@dataclass(frozen=True)
class Size:
    """What is measured, and how often."""

    hp: Hyperparameters  # its batch_size is that of the base
    rounds: int  # of a part in one call
    calls: int  # or steps, between two looks at the clock; even, as Adam rests in every second
    repeats: int  # of which the median counts

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.hp.batch_size * self.hp.sequence_length

    @property
    def Ng(self) -> int:
        """Micro-batches of a step."""
        return self.hp.total_batch_size // self.tokens


def stage_alone(hp: Hyperparameters, stage: int) -> Hyperparameters:
    """A run that has this stage only, counted from 0, and as many tokens in a micro-batch."""
    T, weights = hp.schedule.row_length(stage), hp.stages[stage].target_weights
    return replace(
        hp,
        batch_size=hp.batch_size * hp.sequence_length // T,
        sequence_length=T,
        total_batch_size=hp.schedule.tokens_per_step(stage),
        stages=(Stage(target_weights=weights),),
        model=hp.schedule.model(hp.model, stage),
    )


SPEEDRUN = PRESETS["speedrun"]
FULL = Size(replace(SPEEDRUN, batch_size=32), rounds=20, calls=4, repeats=5)
TINY_MODEL = replace(
    SPEEDRUN.model,
    **{"vocab_size": 256, "num_layers": 3, "num_heads": 2, "width": 64, "mlp_width": 256},
    **{"mlp_only": (1,), "key_offset": (2,), "paired_heads": (2,), "backout": 1},
    **{"value_embeddings": 1, "bigram_buckets": 128},
)
TINY_STAGES = tuple(replace(stage, windows=(16, 16, 48)) for stage in SPEEDRUN.stages)
TINY_BATCH = {"batch_size": 2, "sequence_length": 64, "total_batch_size": 768}
TINY = Size(replace(SPEEDRUN, stages=TINY_STAGES, model=TINY_MODEL, **TINY_BATCH), 2, 2, 2)


@dataclass(frozen=True)
class Variant:
    """How a step is computed."""

    attention: AttentionKernel
    batch_size: int
    target_weights: tuple[float, ...] = (1.0,)
    loss: LossKernel = "xla"
    fp8_head: bool = False
    rule: Rule = "NorMuon"


class Unmeasured(Exception):
    """Why there are no figures: a sentence."""


def main(arguments: list[str] | None = None) -> int:
    """Measure everything, print tables, save the figures, and return the exit status."""
    options = tyro.cli(Options, args=arguments)
    use_compilation_cache()
    size = TINY if options.tiny else FULL
    measure_all(replace(size, hp=stage_alone(size.hp, options.stage - 1)), options)
    return 0


def measure_all(size: Size, options: Options) -> None:
    """The whole run."""
    hp, device = size.hp, jax.devices()[0].device_kind
    kernel, why = choose_attention([hp.model], hp.sequence_length, hp.dtype)
    base = Variant(kernel, hp.batch_size, hp.stages[0].target_weights)
    shape = f"{hp.total_batch_size:,} tokens per step, in rows of {hp.sequence_length:,}"
    print(f"{device} | {why} | stage {options.stage}: {shape}")
    figures = defaultdict(dict) | {"device": device, "attention_of_base": why, "of_stage": shape}
    name, lower = f"gpu_step_stage_{options.stage}" + "_tiny" * options.tiny, floors(hp, device)

    def record(section: str, row: str, measure: Callable[[], Figures]) -> None:
        figures[section][row] = found = attempt(measure)
        print(f"{section} | {row} | {found.get('failed') or '{ms:,.3f} ms'.format(**found)}")
        figures["parts"] = parts_of_step(size, figures, base, lower)
        with redirect_stdout(StringIO()):
            save(name, figures)

    step, variants = partial(measure_step, size, figures["steps"]), variants_of(base)
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


def variants_of(base: Variant) -> dict[str, Variant]:
    """The base, and what differs from it in one thing."""
    R = base.batch_size
    others = {
        **{f"{rows} rows": replace(base, batch_size=rows) for rows in (R // 2, 2 * R)},
        "Adam for all": replace(base, rule="Adam"),
        "plain Muon": replace(base, rule="Muon"),
        "one target": replace(base, target_weights=(1.0,)),
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


def make_rules(hp: Hyperparameters, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The optimizer of train_gpt.py, with or without NorMuon, or Adam for all parameters."""
    if rule == "Adam":
        return optax.with_extra_args_support(optax.adam(hp.head_learning_rate, *hp.adam_betas))
    neuron_decay = hp.neuron_decay if rule == "NorMuon" else None
    return optimizer_of(replace(hp, neuron_decay=neuron_decay), make_mesh(1))


@cache  # for the base that is measured again
def compile_step(size: Size, variant: Variant) -> tuple[Callable, Compiled, float]:
    """What makes the first state, the compiled step, and the seconds to compile that."""
    hp, mesh = size.hp, make_mesh(1)
    rules = make_rules(hp, variant.rule)
    init = make_init(hp.model, rules, mesh)
    graph = graph_of(hp.model, Kernels(variant.attention, variant.loss, variant.fp8_head))
    step = make_train_step(graph, rules, mesh, hp.dtype, target_weights=variant.target_weights)
    state = shapes_on(mesh, REPLICATED, jax.eval_shape(init, jax.random.key(0)))
    batch = shapes_on(mesh, BATCH, jax.ShapeDtypeStruct(batch_shape(hp, variant), jnp.int32))
    start = time.perf_counter()
    compiled = step.lower(state, batch, hp.schedule.rates(1)).compile()
    return init, compiled, time.perf_counter() - start


def batch_shape(hp: Hyperparameters, variant: Variant) -> tuple[int, int, int]:
    """Micro-batches, rows, and tokens of a row with the target of the last."""
    R, T = variant.batch_size, hp.sequence_length
    return hp.total_batch_size // (R * T), R, T + 1


def start_training(size: Size, variant: Variant) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """`advance` and `carry`, the state and the metrics after some steps from the same start."""
    init, step, _ = compile_step(size, variant)
    shape, rates = batch_shape(size.hp, variant), size.hp.schedule.rates(1)
    tokens = np.random.default_rng(0).integers(size.hp.model.vocab_size, size=shape)
    batch = put(make_mesh(1), BATCH, shape, tokens.astype(np.int32).__getitem__)

    def advance(carry: PyTree) -> PyTree:
        return step(carry[0], batch, rates)

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
    if variant.rule != "Adam" and not abs(loss - expected) < LOSS_TOLERANCE:  # as NaN is not
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
            ("attention", attention_row(kernel, *which), partial(attend, kernel, *which))
            for kernel in dict.fromkeys([kernel, "cudnn", "xla", "pallas"])
            for which in dict.fromkeys(attentions(c))
        ),
        ("optimizer", "Muon and Adam", partial(update, "NorMuon", {"muon", *ADAM})),
        ("optimizer", "Muon's part", partial(update, "NorMuon", {"muon"})),
        ("optimizer", "the same, plain", partial(update, "Muon", {"muon"})),
        ("optimizer", "orthogonalisation in it", partial(measure_orthogonalisation, size)),
        ("optimizer", "Adam's part", partial(update, "NorMuon", ADAM)),
    ]


def loss_row(kernel: LossKernel, fp8: bool) -> str:
    return f"{kernel}" + ", FP8" * fp8


def attention_row(kernel: AttentionKernel, window: int, paired: bool) -> str:
    return f"{kernel}, window {window}" + ", paired" * paired


def attentions(config: GPTConfig) -> list[tuple[int, bool]]:
    """The window of every attention, and whether its heads are paired."""
    layers = set(range(config.num_layers)) - config.layers(config.mlp_only)
    paired = config.layers(config.paired_heads)
    return [(config.window(layer), layer in paired) for layer in sorted(layers)]


def products(config: GPTConfig) -> dict[str, tuple[int, int, int]]:
    """Inputs and outputs of each kind of matrix, and how many there are; the head is the last."""
    D, F, V = config.width, config.mlp_width, config.padded_vocab_size
    L, attentions = config.num_layers, config.num_attentions
    of_attention = {"qkv": (D, 3 * D, attentions), "out": (D, D, attentions)}
    return of_attention | {"up": (D, F, L), "down": (F, D, L), "head": (D, V, 1)}


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


def with_rate(ms: float, flops: float) -> Figures:
    """The time and the FLOP/s, also as a share of the peak."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
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


def measure_product(size: Size, shape: tuple[int, int], way: str) -> Figures:
    """One product of a micro-batch."""
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


def measure_attention(size: Size, kernel: AttentionKernel, window: int, paired: bool) -> Figures:
    """Attention and its gradients, of one layer and the tokens of a micro-batch."""
    c, B, times = size.hp.model, size.hp.batch_size, 1 + paired
    T, N, window = times * size.hp.sequence_length, c.num_heads // times, times * window

    def work(_, q: Array, k: Array, v: Array, gradient: Array, kernel: str = kernel) -> tuple:
        attend = partial(attention, scale=c.attention_scale, window=window, kernel=kernel)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(gradient)

    arguments = list(jnp.unstack(random(B, T, 4, N, c.head_size), axis=2))
    if kernel != "xla":
        check_agreement(work, partial(work, kernel="xla"), [x[:1] for x in arguments])
    keys = float(np.minimum(np.arange(1, T + 1), window).mean())
    return with_rate(part_ms(size, work, arguments), 6 * 2 * c.width * keys * size.tokens)


def measure_loss(size: Size, kernel: LossKernel, fp8: bool) -> Figures:
    """The head and the loss of a micro-batch, and the gradients of features and head."""
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


def parameter_shapes(config: GPTConfig, groups: set[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of these groups of the optimizer, by name."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        if group(path, x) in groups
    }


def measure_update(size: Size, rule: Rule, groups: set[str]) -> Figures:
    """The optimizer's update of these groups' parameters, and its addition to them."""
    shapes = parameter_shapes(size.hp.model, groups)
    params = {name: random(1, *x.shape, dtype=x.dtype)[0] for name, x in shapes.items()}
    gradients = jax.tree.map(jnp.copy, list(params.values()))
    rules, rates = make_rules(size.hp, rule), size.hp.schedule.rates(1)

    def work(last: tuple, *gradients: Array) -> tuple:
        params, state = last
        named = dict(zip(shapes, gradients, strict=True))
        updates, state = rules.update(named, state, params, **rates._asdict())
        return optax.apply_updates(params, updates), state

    first = params, rules.init(params)
    return {"ms": part_ms(size, work, gradients, first)}


def measure_orthogonalisation(size: Size) -> Figures:
    """Plain Muon without its momentum: one that starts in each round is only a factor."""
    shapes = parameter_shapes(size.hp.model, {"muon"})
    rule = scale_by_muon(None, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)

    def work(_, *matrices: Array) -> tuple[Array, ...]:
        return rule.update(matrices, rule.init(matrices), momentum=0.5)[0]

    ms = part_ms(size, work, [random(*x.shape, dtype=x.dtype) for x in shapes.values()])
    return with_rate(ms, orthogonalisation_flops(size.hp.model))


# Where the time of a step goes, and where it must go.


def orthogonalisation_flops(config: GPTConfig) -> float:
    """FLOPs of Muon's polynomials over all matrices of the layers."""
    total = 0
    for stack in parameter_shapes(config, {"muon"}).values():
        short, long = sorted(stack.shape[-2:])
        count = math.prod(stack.shape[:-2])
        total += count * (2 * short**2 * long + 2 * short**3 + 2 * short**2 * long)
    return float(len(POLAR_EXPRESS) * total)


def floors(hp: Hyperparameters, device_kind: str) -> dict[str, float | None]:
    """Milliseconds of each part of a step at the peaks of the device; None where not known.

    Muon reads weight, momentum and gradient, and writes the first two. Adam has one mean more.
    """
    c, tokens = hp.model, hp.total_batch_size
    flops, bandwidth = (peaks.get(device_kind, math.nan) for peaks in (PEAK_FLOPS, PEAK_BANDWIDTH))
    *of_layers, head = (6 * math.prod(shape_and_count) for shape_and_count in products(c).values())
    layers = sum(of_layers)
    muon, adam = (
        sum(x.size for x in parameter_shapes(c, groups).values()) for groups in ({"muon"}, ADAM)
    )
    update = 4 * (5 * muon + 7 * adam) / bandwidth + orthogonalisation_flops(c) / flops
    seconds = {
        "products of the layers": layers * tokens / flops,
        "products with the head": head * tokens / flops,
        "attention": (flops_per_token(c, hp.sequence_length) - layers - head) * tokens / flops,
        "loss": 2 * 2 * c.padded_vocab_size * tokens / bandwidth,
        "optimizer": update,
    }
    seconds["whole step"] = sum(seconds.values())
    return {part: None if math.isnan(s) else 1e3 * s for part, s in seconds.items()}


def milliseconds(figures: Figures, section: str, row: str) -> float:
    """The time in a row; NaN if it was not measured."""
    return figures[section].get(row, {}).get("ms", math.nan)


def part_times(size: Size, figures: Figures, base: Variant) -> dict[str, float]:
    """Milliseconds of each part of the base's step; NaN for what was not measured."""
    c, Ng = size.hp.model, size.Ng
    ms = partial(milliseconds, figures)
    *of_layers, head = (
        count * sum(ms("products", f"{name}, {way}") for way in DIRECTIONS)
        for name, (*_, count) in products(c).items()
    )
    attended = [ms("attention", attention_row(base.attention, *which)) for which in attentions(c)]
    return {
        "products of the layers": Ng * sum(of_layers),
        "products with the head": Ng * head,
        "attention": Ng * sum(attended),
        "loss": Ng * (ms("loss", loss_row(base.loss, base.fp8_head)) - head),
        "optimizer": ms("optimizer", "Muon and Adam"),
    }


def parts_of_step(
    size: Size, figures: Figures, base: Variant, lower: dict[str, float | None]
) -> dict[str, Figures]:
    """The parts of the base's step with their floors."""
    step, times = milliseconds(figures, "steps", "base"), part_times(size, figures, base)
    rows = times | {"rest": step - sum(times.values()), "whole step": step}
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
