"""How the time of a step divides into parts, and a lower bound for each part."""

import math
from dataclasses import fields
from functools import partial
from typing import Any

import jax
from flax import traverse_util

from benchmarks.gpu.rows import Figures
from benchmarks.gpu.variants import Size, Variant, milliseconds
from nanogpt.adam import AdamGroups
from nanogpt.config import AttentionKernel, GPTConfig, LossKernel
from nanogpt.devices.hardware import PEAK_BANDWIDTH, PEAK_FLOPS, flops_per_token
from nanogpt.optim.groups import group
from nanogpt.optim.heads import apart
from nanogpt.optim.muon import POLAR_EXPRESS
from nanogpt.training.step import param_shapes
from train_gpt import Hyperparameters

DIRECTIONS = ("forward", "d-input", "d-weight")
ADAM = frozenset(each.name for each in fields(AdamGroups))  # groups; Muon's is "muon"


def loss_row(kernel: LossKernel, fp8: bool) -> str:
    return f"{kernel}" + ", FP8" * fp8


def attention_row(kernel: AttentionKernel, masked: bool, window: int, paired: bool) -> str:
    return f"{kernel}, window {window}" + ", paired" * paired + ", all documents" * (not masked)


def attentions(config: GPTConfig) -> list[tuple[int, bool]]:
    """Return the window of each attention, and whether its heads are paired."""
    layers = set(range(config.num_layers)) - config.layers(config.mlp_only)
    paired = config.layers(config.paired_heads)
    return [(config.window(layer), layer in paired) for layer in sorted(layers)]


def products(config: GPTConfig) -> dict[str, tuple[int, int, int]]:
    """Return inputs, outputs and number of each kind of matrix; the head is the last."""
    D, F, V = config.width, config.mlp_width, config.padded_vocab_size
    L, attentions = config.num_layers, config.num_attentions
    of_attention = {"qkv": (D, 3 * D, attentions), "out": (D, D, attentions)}
    return of_attention | {"up": (D, F, L), "down": (F, D, L), "head": (D, V, 1)}


def parameter_shapes(config: GPTConfig, groups: set[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the parameters in these optimizer groups, by name."""
    shapes = param_shapes(config)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        if group(path, x) in groups
    }


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return arrays by name as nested dicts, as the optimizer knows them."""
    return traverse_util.unflatten_dict(arrays, sep=".")


def orthogonalization_flops(hp: Hyperparameters) -> float:
    """Return the FLOPs of Muon's orthogonalization of all matrices of the layers."""
    total = 0
    matrices = nested(parameter_shapes(hp.model, {"muon"}))
    for stack in jax.tree.leaves(jax.eval_shape(partial(apart, groups=hp.head_groups), matrices)):
        short, long = sorted(stack.shape[-2:])
        count = math.prod(stack.shape[:-2])
        total += count * (2 * short**2 * long + 2 * short**3 + 2 * short**2 * long)
    return float(len(POLAR_EXPRESS) * total)


def floors(hp: Hyperparameters, device_kind: str) -> dict[str, float | None]:
    """Return the milliseconds of each part of a step at the device's peaks; None if not known.

    Muon reads weight, momentum and gradient, and writes weight and momentum. Adam has a second
    moment as well; if it accumulates gradients over several steps, the first is copied and the
    later ones are added to it.
    """
    c, tokens = hp.model, hp.total_batch_size
    flops, bandwidth = (peaks.get(device_kind, math.nan) for peaks in (PEAK_FLOPS, PEAK_BANDWIDTH))
    *of_layers, head = (6 * math.prod(shape_and_count) for shape_and_count in products(c).values())
    layers = sum(of_layers)
    muon, adam = (
        sum(x.size for x in parameter_shapes(c, groups).values()) for groups in ({"muon"}, ADAM)
    )
    # Accesses in k steps: the first copies the gradient, 2; each later one adds it, 3; the last
    # also reads and writes the weight and two moments, 6, but need not write the sum: 3 k + 4.
    # With k = 1 it is 7.
    each_adam = 3 + 4 / hp.adam_every
    update = 4 * (5 * muon + each_adam * adam) / bandwidth + orthogonalization_flops(hp) / flops
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
    """Return the milliseconds of each part of the base's step; NaN if not measured."""
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
    """Return the parts of the base's step with their floors."""
    step, times = milliseconds(figures, "steps", "base"), part_times(size, figures, base)
    rows = times | {"rest": step - sum(times.values()), "whole step": step}
    return {
        row: {"failed": "Not all of its components were measured."}
        if math.isnan(ms)
        else {"ms": ms, "of_step": None if math.isnan(step) else ms / step}
        | ({"floor_ms": lower[row]} if row in lower else {})
        for row, ms in rows.items()
    }
