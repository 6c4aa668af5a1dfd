"""What a token costs, held against counting, and against the numbers of the speedrun's model."""

import jax
import numpy as np
import pytest

from nanogpt.config import GPTConfig
from nanogpt.hardware import activation_bytes, flops_per_token, largest_batch, utilization
from nanogpt.step import init_params


def test_the_speedruns_model_costs_741_mflop_in_matrices_and_57_in_attention():
    # 84.9 M weights in the blocks and 38.6 M in the head, six times; then 12 layers of full
    # attention over 1 ... 1024 keys, 512.5 on average.
    assert flops_per_token(GPTConfig(), 1024) / 1e6 == pytest.approx(741.4 + 56.7, abs=0.1)


@pytest.mark.parametrize("windows", [(), (4,), (3, 0), (1, 7, 100)])
def test_flops_equal_a_count_over_every_weight_and_every_visible_pair(windows):
    config = GPTConfig(
        vocab_size=100,
        num_layers=4,
        num_heads=2,
        width=24,
        mlp_width=40,
        windows=windows,
        value_embeddings=2,
        bigram_buckets=50,
    )
    T = 29
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    blocks = params["blocks"]
    matrices = [params["head"], *blocks["attention"].values(), *blocks["mlp"].values()]
    weights = sum(np.prod(m.shape) for m in matrices if m.shape[-1] > 2)  # value_mix is no matrix
    pairs = 0
    for layer in range(4):
        window = windows[layer % len(windows)] if windows else 0
        for query in range(T):
            for key in range(query + 1):
                pairs += not window or query - key < window
    # A multiplication and an addition, for the scores and the values; twice that backward.
    per_pair = 2 * 2 * config.width * 3
    assert flops_per_token(config, T) == pytest.approx(6 * weights + per_pair * pairs / T)


def test_utilization_is_the_share_of_the_peak_of_all_devices():
    # 600,000 tokens/s of 798.1 MFLOP are 479 TFLOP/s, of the 989.4 that an H100 is sold for.
    assert utilization(600e3, 798.1e6, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.484, abs=1e-3)
    assert utilization(600e3, 798.1e6, "NVIDIA H100 80GB HBM3", 8) == pytest.approx(
        0.0605, abs=1e-4
    )


def test_the_utilization_of_an_unknown_device_is_not_guessed():
    assert utilization(600e3, 798.1e6, "cpu", 1) is None


@pytest.mark.parametrize(
    ("rows", "memory", "batch_size"),
    [
        (512, 135e9, 128),  # an H200, of which JAX takes 90 %: four micro-batches
        (512, 77e9, 64),  # an H100 of 80 GB
        (512, 38e9, 32),  # an A100 of 40 GB
        (64, 135e9, 64),  # one of eight H200s has no more rows than these
        (512, 1e6, 1),
        (512, None, 1),  # a CPU does not say; small micro-batches are its fastest anyway
        (60, 38e9, 30),  # what divides the rows keeps Ng whole
    ],
)
def test_the_speedruns_micro_batch_fits_two_thirds_of_the_memory(rows, memory, batch_size):
    row_bytes = 1024 * activation_bytes(GPTConfig(), 1024, "bfloat16", flash=True)
    assert largest_batch(rows, row_bytes, memory) == batch_size


def test_the_scores_of_attention_count_only_where_they_are_stored():
    flash, stored = (activation_bytes(GPTConfig(), 1024, "bfloat16", flash) for flash in (1, 0))
    # 12 layers of 6 heads and 1,024 keys for each query, in float32 and in bfloat16.
    assert stored - flash == 12 * 6 * 1024 * (4 + 2)
