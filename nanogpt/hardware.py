"""What the hardware can do, what a token costs, and the ratio of the two."""

import numpy as np

from nanogpt.config import GPTConfig

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


def flops_per_token(config: GPTConfig, sequence_length: int) -> float:
    """FLOPs to train on one token, forward and backward: what the mathematics needs, no more.

    Each weight of a matrix costs one multiplication and one addition forward and twice that
    backward; so does each pair of a query and a key it sees, per channel, for the scores and again
    for the values. Embeddings are looked up, which costs none. The padding of V is counted: it is
    multiplied.
    """
    c = config
    weights = c.num_layers * (4 * c.width**2 + 2 * c.width * c.mlp_width)
    weights += c.width * c.padded_vocab_size
    earlier = np.arange(1, sequence_length + 1)
    keys = sum(
        np.minimum(earlier, c.window(layer) or sequence_length).mean()
        for layer in range(c.num_layers)
    )
    return float(6 * weights + 6 * 2 * c.width * keys)


def utilization(
    tokens_per_second: float, flops_per_token: float, device_kind: str, num_devices: int
) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al., arXiv:2204.02311), 0 to 1; None if unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return tokens_per_second * flops_per_token / (peak * num_devices) if peak else None
