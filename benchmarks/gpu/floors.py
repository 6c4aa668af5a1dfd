"""Where the time of a step goes, part by part, and the least that each part could take."""

import math
from dataclasses import fields
from functools import partial

import jax

from benchmarks.gpu.rows import Figures
from benchmarks.gpu.variants import Size, Variant, milliseconds
from nanogpt.config import AdamGroups, AttentionKernel, GPTConfig, LossKernel
from nanogpt.devices.hardware import PEAK_BANDWIDTH, PEAK_FLOPS, flops_per_token
from nanogpt.optim.groups import group
from nanogpt.optim.muon import POLAR_EXPRESS
from nanogpt.training.step import init_params
from train_gpt import Hyperparameters

DIRECTIONS = ("forward", "d-input", "d-weight")
ADAM = frozenset(each.name for each in fields(AdamGroups))  # groups; Muon's is "muon"


def loss_row(kernel: LossKernel, fp8: bool) -> str:
    return f"{kernel}" + ", FP8" * fp8


def attention_row(kernel: AttentionKernel, masked: bool, window: int, paired: bool) -> str:
    return f"{kernel}, window {window}" + ", paired" * paired + ", all documents" * (not masked)


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


def parameter_shapes(config: GPTConfig, groups: set[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of these groups of the optimizer, by name."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        if group(path, x) in groups
    }


def orthogonalization_flops(config: GPTConfig) -> float:
    """FLOPs of Muon's polynomials over all matrices of the layers."""
    total = 0
    for stack in parameter_shapes(config, {"muon"}).values():
        short, long = sorted(stack.shape[-2:])
        count = math.prod(stack.shape[:-2])
        total += count * (2 * short**2 * long + 2 * short**3 + 2 * short**2 * long)
    return float(len(POLAR_EXPRESS) * total)


def floors(hp: Hyperparameters, device_kind: str) -> dict[str, float | None]:
    """Milliseconds of each part of a step at the peaks of the device; None where not known.

    Muon reads weight, momentum and gradient, and writes the first two. Adam has one mean more; what
    it gathers in several steps is the first gradient, to which each later one is added.
    """
    c, tokens = hp.model, hp.total_batch_size
    flops, bandwidth = (peaks.get(device_kind, math.nan) for peaks in (PEAK_FLOPS, PEAK_BANDWIDTH))
    *of_layers, head = (6 * math.prod(shape_and_count) for shape_and_count in products(c).values())
    layers = sum(of_layers)
    muon, adam = (
        sum(x.size for x in parameter_shapes(c, groups).values()) for groups in ({"muon"}, ADAM)
    )
    # Of k steps the first copies the gradient, 2; each later one adds it, 3; the last reads and
    # writes a weight and two means, 6 more, but not the sum: 3 k + 4. Of one step, 7.
    each_adam = 3 + 4 / hp.adam_every
    update = 4 * (5 * muon + each_adam * adam) / bandwidth + orthogonalization_flops(c) / flops
    seconds = {
        "products of the layers": layers * tokens / flops,
        "products with the head": head * tokens / flops,
        "attention": (flops_per_token(c, hp.sequence_length) - layers - head) * tokens / flops,
        "loss": 2 * 2 * c.padded_vocab_size * tokens / bandwidth,
        "optimizer": update,
    }
    seconds["whole step"] = sum(seconds.values())
    return {part: None if math.isnan(s) else 1e3 * s for part, s in seconds.items()}


def part_times(size: Size, figures: Figures, base: Variant) -> dict[str, float]:
    """Milliseconds of each part of the base's step; NaN for what was not measured."""
    c, Ng = size.hp.model, size.Ng
    ms = partial(milliseconds, figures)
    *of_layers, head = (
        count * sum(ms("products", f"{name}, {way}") for way in DIRECTIONS)
        for name, (*_, count) in products(c).items()
    )
    attend = partial(attention_row, base.attention, base.document_mask)
    attended = [ms("attention", attend(*which)) for which in attentions(c)]
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
