"""Peak speeds of devices, FLOPs and memory of a model, and model FLOPs utilization."""

import os
from typing import TYPE_CHECKING

from nanogpt.checks import DoesNotFit
from nanogpt.config import GPTConfig
from nanogpt.schedule import Schedule

if TYPE_CHECKING:
    import jax

# The makers' peaks: dense bfloat16 TFLOP/s with float32 accumulation, and TB/s of memory bandwidth,
# by the device's name in JAX. Data sheets of Hopper and newer, and of the L4, state FLOP/s with
# sparsity, which are twice these. For devices that are not listed, including CPUs and those without
# bfloat16 (V100, T4), no utilization is shown rather than a guess.
PEAKS = {
    # NVIDIA A100 Tensor Core GPU, data sheet.
    "NVIDIA A100-SXM4-40GB": (312.0, 1.555),
    "NVIDIA A100-PCIE-40GB": (312.0, 1.555),
    "NVIDIA A100-SXM4-80GB": (312.0, 2.039),
    "NVIDIA A100 80GB PCIe": (312.0, 1.935),
    # NVIDIA H100 Tensor Core GPU, architecture white paper (SXM5 and PCIe) and data sheet (NVL).
    "NVIDIA H100 80GB HBM3": (989.4, 3.35),
    "NVIDIA H100 PCIe": (756.0, 2.0),
    "NVIDIA H100 NVL": (835.5, 3.9),
    # NVIDIA H200 Tensor Core GPU, data sheet; the same cores as the H100.
    "NVIDIA H200": (989.4, 4.8),
    "NVIDIA H200 NVL": (835.5, 4.8),
    # NVIDIA GH200 Grace Hopper Superchip, data sheet; the memory of the GPU, HBM3 or HBM3e.
    "NVIDIA GH200 480GB": (989.4, 4.0),
    "NVIDIA GH200 144G HBM3e": (989.4, 4.9),
    # NVIDIA DGX B200, DGX B300 and GB200 NVL72, data sheets, divided by their 8 or 72 GPUs.
    "NVIDIA B200": (2250.0, 8.0),
    "NVIDIA B300": (2250.0, 8.0),
    "NVIDIA GB200": (2500.0, 8.0),
    # NVIDIA A10, L4, L40 and L40S, data sheets; A10G: AWS's data sheet.
    "NVIDIA A10": (125.0, 0.6),
    "NVIDIA A10G": (70.0, 0.6),
    "NVIDIA L4": (121.0, 0.3),
    "NVIDIA L40": (181.05, 0.864),
    "NVIDIA L40S": (362.05, 0.864),
    # NVIDIA RTX Blackwell architecture white paper, table 3; Ampere GA102 white paper (A6000); RTX
    # PRO Blackwell white paper, table 4 (6000 Ada).
    "NVIDIA GeForce RTX 3090": (71.2, 0.936),
    "NVIDIA GeForce RTX 4090": (165.2, 1.008),
    "NVIDIA GeForce RTX 5090": (209.5, 1.792),
    "NVIDIA RTX A6000": (154.8, 0.768),
    "NVIDIA RTX 6000 Ada Generation": (364.0, 0.96),
    # Google Cloud's documentation, docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e and tpu7x.
    # JAX shows each half of a v3 or TPU7x chip as a device. v5p has two names.
    "TPU v3": (123 / 2, 0.9 / 2),
    "TPU v4": (275.0, 1.228),
    "TPU v5 lite": (197.0, 0.819),
    "TPU v5": (459.0, 2.765),
    "TPU v5p": (459.0, 2.765),
    "TPU v6 lite": (918.0, 1.64),
    "TPU7x": (2307 / 2, 7.38 / 2),
}
PEAK_FLOPS = {kind: 1e12 * flops for kind, (flops, _) in PEAKS.items()}  # FLOP/s
PEAK_BANDWIDTH = {kind: 1e12 * bandwidth for kind, (_, bandwidth) in PEAKS.items()}  # bytes/s


def flops_per_token(config: GPTConfig, sequence_length: int) -> float:
    """Return the FLOPs of one training token, forward and backward, without recomputation.

    Each weight of a matrix costs one multiplication and one addition forward and twice that
    backward; so does each pair of a query and a key it sees, per channel, for the scores and again
    for the values. Embedding lookups cost nothing. The padding of V is counted, as it takes part in
    the products. Gates, dynamic connections and composed heads are not counted: they are three
    thousandths of it. With paired heads there are half as many heads, with rows twice as long.
    """
    c = config
    weights = c.num_attentions * 4 * c.width**2 + c.num_layers * 2 * c.width * c.mlp_width
    weights += c.width * c.padded_vocab_size
    keys = 0.0
    for layer in set(range(c.num_layers)) - c.layers(c.mlp_only):
        T = sequence_length * (2 if layer in c.layers(c.paired_heads) else 1)
        w = min(c.window(layer) or T, T)
        keys += w - w * (w - 1) / 2 / T  # the mean over T queries: the first w - 1 see fewer than w
    return float(6 * weights + 6 * 2 * c.width * keys)


def training_flops(config: GPTConfig, schedule: Schedule, step: int) -> float:
    """Return the FLOPs of training a model up to and including this step of its schedule."""
    flops = 0.0
    for stage, end in enumerate(schedule.ends):
        steps = max(0, min(step, end) - schedule.first_step(stage) + 1)
        each = flops_per_token(schedule.model(config, stage), schedule.row_length(stage))
        flops += steps * schedule.tokens_per_step(stage) * each
    return flops


def check_size(config: GPTConfig, sequence_length: int, devices: int, memory: float | None) -> None:
    """Raise DoesNotFit if a model cannot fit on this number of devices in any way.

    The lower bound is 8 bytes per parameter, with one value of optimizer state, and one row's
    stream between layers. On CPUs, where `memory` is None, the machine's memory is used.
    """
    c, row = config, 2 * sequence_length * config.width * config.num_layers
    tables = (2 + c.value_embeddings) * c.padded_vocab_size
    layers = c.num_attentions * 4 * c.width + c.num_layers * 2 * c.mlp_width
    bigrams = c.bigram_buckets * (c.bigram_width or c.width)
    need = (c.width * (tables + layers) + bigrams) * 8 / devices + row
    have = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise DoesNotFit(
            f"The model, its optimizer and one row need at least {need / 1e9:,.0f} GB on each "
            f"device, which has {have / 1e9:,.0f} GB: use a smaller model, a shorter "
            "sequence_length, or more devices."
        )


def utilization(
    tokens_per_second: float, flops_per_token: float, device_kind: str, num_devices: int
) -> float | None:
    """Return the MFU (Chowdhery et al., arXiv:2204.02311), from 0 to 1; None if unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return tokens_per_second * flops_per_token / (peak * num_devices) if peak else None


def activation_bytes(
    config: GPTConfig, sequence_length: int, dtype: str, flash: bool, rematerialize: bool = False
) -> float:
    """Estimate the bytes per token of a forward and backward pass, without the parameters.

    Per layer: 4 arrays of the stream's width and two of the MLP's; per attention 11 more of the
    stream's, and without flash attention the scores of all heads, in float32 and in `dtype`, twice
    as many for paired heads. For each table in which tokens are looked up: the rows and their
    gradients. At the end: the logits and their gradient; XLA's program for an H200 may write the
    gradient over the logits, which not all matmul kernels that it may choose at run time allow.
    With `rematerialize`: all that for only one layer, plus the inputs of every attention and MLP
    and the stream between layers. (For GPUs and TPUs; XLA's CPU backend stores what it should
    recompute.)
    """
    c = config
    itemsize = 4 if dtype == "float32" else 2
    numbers = c.num_layers * (4 * c.width + 2 * c.mlp_width) + c.num_attentions * 11 * c.width
    if rematerialize:
        read = (2 * c.num_layers + c.num_attentions) * c.width
        numbers = read + 4 * c.width + 2 * c.mlp_width + 11 * c.width
    numbers += 2 * (1 + c.value_embeddings + bool(c.bigram_buckets)) * c.width
    scores = 0
    if not flash:
        paired = c.layers(c.paired_heads) - c.layers(c.mlp_only)
        attentions = 1 if rematerialize else c.num_attentions
        pairs = min(attentions, len(paired))
        scores = (attentions + pairs) * c.num_heads * sequence_length
    return itemsize * (numbers + 2 * c.padded_vocab_size) + (4 + itemsize) * scores


def device_memory(device: "jax.Device") -> float | None:
    """Return the bytes of a device's memory that JAX may use; None if unknown, as on CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def multiplies_bfloat16(device: "jax.Device") -> bool:
    """Return whether a device has bfloat16 matmuls: all but NVIDIA GPUs before Ampere do.

    Those (T4, V100) have a compute capability below 8.0, and XLA converts to float32 there.
    """
    major, dot, _ = str(getattr(device, "compute_capability", "")).partition(".")
    return not dot or int(major) >= 8  # AMD's names have no dot


def peak_memory(device: "jax.Device") -> float | None:
    """Return the peak memory of arrays and programs on a device so far, in bytes.

    None if JAX does not count it, as on CPUs: the peak memory of the process would include the
    compiler and the data.
    """
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def row_fits(bytes_per_row: float, room: float | None) -> bool:
    """Return whether the activations of one row fit; assumed if memory is unknown."""
    return room is None or bytes_per_row <= room


def largest_batch(rows: int, bytes_per_row: float, room: float | None) -> int:
    """Return the largest divisor of `rows` with activations that fit; 1 if memory is unknown."""
    return max(
        b
        for b in range(1, rows + 1)
        if rows % b == 0 and (b == 1 or b * bytes_per_row <= (room or 0))
    )


def fewer(rows: int) -> int:
    """Return the largest divisor of `rows` up to half of them."""
    return max(b for b in range(1, rows // 2 + 1) if rows % b == 0)
