"""What the hardware can do, what a token costs, and the ratio of the two."""

from typing import TYPE_CHECKING

import numpy as np

from nanogpt.config import GPTConfig

if TYPE_CHECKING:
    import jax

# Dense bfloat16 FLOP/s by the name the device gives itself, from the makers' data sheets.
# A device that is not here has no known peak: its utilisation is not shown, rather than guessed.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
# Bytes/s of the device's memory, likewise.
PEAK_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5p": 2.765e12,
    "TPU v6 lite": 1.64e12,
}


def flops_per_token(config: GPTConfig, sequence_length: int) -> float:
    """FLOPs to train on one token, forward and backward: what the mathematics needs, no more.

    Each weight of a matrix costs one multiplication and one addition forward and twice that
    backward; so does each pair of a query and a key it sees, per channel, for the scores and again
    for the values. Embeddings are looked up, which costs none. The padding of V is counted: it is
    multiplied. The gates are not: each reads a dozen channels. Paired heads are half as many, with
    rows and windows twice as long.
    """
    c = config
    weights = c.num_attentions * 4 * c.width**2 + c.num_layers * 2 * c.width * c.mlp_width
    weights += c.width * c.padded_vocab_size
    keys = 0.0
    for layer in set(range(c.num_layers)) - c.layers(c.mlp_only):
        times = 2 if layer in c.layers(c.paired_heads) else 1
        earlier = np.arange(1, times * sequence_length + 1)
        keys += np.minimum(earlier, times * (c.window(layer) or sequence_length)).mean()
    return float(6 * weights + 6 * 2 * c.width * keys)


def utilization(
    tokens_per_second: float, flops_per_token: float, device_kind: str, num_devices: int
) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al., arXiv:2204.02311), 0 to 1; None if unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return tokens_per_second * flops_per_token / (peak * num_devices) if peak else None


def activation_bytes(config: GPTConfig, sequence_length: int, dtype: str, flash: bool) -> float:
    """Bytes per token that a forward and backward pass needs beside the parameters, about.

    Per layer: 4 arrays of the stream's width and two of the MLP's; per attention 11 more of the
    stream's, and without flash attention the scores of all heads, in float32 and in `dtype`, twice
    as many of paired ones. At the end: the logits and their gradient. XLA's program for an H200
    needs 18 % less, as it writes that gradient over the logits, which not every product it may
    choose when it runs can do.
    """
    c = config
    itemsize = 4 if dtype == "float32" else 2
    numbers = c.num_layers * (4 * c.width + 2 * c.mlp_width) + c.num_attentions * 11 * c.width
    scores = 0
    if not flash:
        paired = c.layers(c.paired_heads) - c.layers(c.mlp_only)
        scores = (c.num_attentions + len(paired)) * c.num_heads * sequence_length
    return itemsize * (numbers + 2 * c.padded_vocab_size) + (4 + itemsize) * scores


def device_memory(device: "jax.Device") -> float | None:
    """Bytes of a device's memory that JAX may use; None where it does not say, as on CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def largest_batch(rows: int, bytes_per_row: float, memory: float | None) -> int:
    """The largest divisor of `rows` whose activations take at most two thirds of the memory.

    The other third is for parameters, gradients and the optimizer. 1 where memory is unknown.
    """
    room = 2 / 3 * (memory or 0)
    return max(
        b for b in range(1, rows + 1) if rows % b == 0 and (b == 1 or b * bytes_per_row <= room)
    )
