"""The cost of a token, compared with counting and with figures for GPT-2 small."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config import GPTConfig, Kernels
from nanogpt.devices.hardware import (
    PEAK_BANDWIDTH,
    PEAK_FLOPS,
    activation_bytes,
    fewer,
    flops_per_token,
    largest_batch,
    multiplies_bfloat16,
    peak_memory,
    row_fits,
    utilization,
)
from nanogpt.training.step import graph_of, param_shapes
from train_gpt import PRESETS


def test_a_model_of_gpt2_smalls_size_costs_741_mflop_in_matrices_and_57_in_attention():
    # 84.9 M weights in the blocks and 38.6 M in the head, six times; then 12 layers of full
    # attention over 1 ... 1024 keys, 512.5 on average.
    assert flops_per_token(GPTConfig(), 1024) / 1e6 == pytest.approx(741.4 + 56.7, abs=0.1)


@pytest.mark.parametrize(
    ("windows", "mlp_only", "paired"),
    [
        ((), (), ()),
        ((4,), (1, 2), ()),
        ((3, 0), (0,), (2,)),
        ((1, 7, 100), (), (1, 2, 3)),
        ((8, 40), (), (0, 1)),  # the second window is longer than T, and shorter than 2 T
        ((5,), (3,), (0, 3)),  # of paired heads that a layer does not have
    ],
)
def test_flops_equal_a_count_over_every_weight_and_every_visible_pair(windows, mlp_only, paired):
    config = GPTConfig(
        vocab_size=100,
        num_layers=4,
        num_heads=2,
        width=24,
        mlp_width=40,
        windows=windows,
        mlp_only=mlp_only,
        paired_heads=paired,
        value_embeddings=2,
        bigram_buckets=50,
    )
    T = 29
    params = param_shapes(config)
    names = [("attention", "qkv"), ("attention", "out"), ("mlp", "up"), ("mlp", "down")]
    matrices = [params["head"], *(params[kind][name] for kind, name in names)]
    weights = sum(np.prod(m.shape) for m in matrices)
    pairs = 0  # of a query and a key, in all heads
    for layer in set(range(4)) - set(mlp_only):
        heads, rows = (1, 2 * T) if layer in paired else (2, T)
        window = (windows[layer % len(windows)] if windows else 0) or rows
        for query in range(rows):
            for key in range(query + 1):
                pairs += heads * (query - key < window)
    # A multiplication and an addition, for the scores and for the values; twice that backward.
    per_pair = 2 * 2 * config.head_size * 3
    assert flops_per_token(config, T) == pytest.approx(6 * weights + per_pair * pairs / T)


@pytest.mark.parametrize(
    "shape",
    [
        # GPT-2 small's, with fewer layers.
        {"num_layers": 2, "value_embeddings": 0, "smear": False, "attention_gate": False},
        # With the speedrun's tricks.
        {"num_layers": 3, "num_heads": 8, "width": 1024, "mlp_width": 2048, "vocab_size": 1000}
        | {"mlp_only": (1,), "paired_heads": (0,), "key_offset": (2,), "skips": ((0, 1),)}
        | {"backout": 1},
    ],
)
def test_flops_are_those_that_xla_counts_in_the_loss_and_its_gradient(shape):
    config, B, T = GPTConfig(bigram_buckets=1000, **shape), 2, 1024
    graph = graph_of(config)

    def loss(params, rows):
        return nnx.merge(graph, params).loss(rows[:, :-1], rows[:, 1:])[0].mean()

    params = param_shapes(config)
    rows = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, rows)
    counted = lowered.cost_analysis()["flops"] / (B * T)
    # XLA also computes masked products: of the keys in a row, all but (1 + row) / 2.
    mlp_only, paired = config.layers(config.mlp_only), config.layers(config.paired_heads)
    rows_of = [2 * T if layer in paired else T for layer in {*range(config.num_layers)} - mlp_only]
    hidden = sum(row - (1 + row) / 2 for row in rows_of)
    needed = flops_per_token(config, T) + 6 * 2 * config.width * hidden
    # It also counts elementwise operations: softmax, norms, rotations, tanh, and so on.
    assert needed < counted < 1.004 * needed


def test_utilization_is_the_share_of_the_peak_of_all_devices():
    # 600,000 tokens/s of 798.1 MFLOP are 479 TFLOP/s, of the 989.4 that an H100 is sold for.
    assert utilization(600e3, 798.1e6, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.484, abs=1e-3)
    assert utilization(600e3, 798.1e6, "NVIDIA H100 80GB HBM3", 8) == pytest.approx(
        0.0605, abs=1e-4
    )


@pytest.mark.parametrize(
    "kind", ["cpu", "Tesla V100-SXM2-16GB", "NVIDIA H100", "NVIDIA H200 MIG 1g.18gb", "TPU v9"]
)
def test_the_utilization_of_an_unknown_device_is_not_guessed(kind):
    assert utilization(600e3, 798.1e6, kind, 1) is None


@pytest.mark.parametrize(
    ("kind", "units", "per_unit", "gigahertz"),
    [  # multiprocessors, FMAs of each per cycle, and the boost clock
        ("NVIDIA A100-SXM4-80GB", 108, 1024, 1.41),
        ("NVIDIA A100 80GB PCIe", 108, 1024, 1.41),
        ("NVIDIA A100-PCIE-40GB", 108, 1024, 1.41),
        ("NVIDIA H100 80GB HBM3", 132, 2048, 1.83),
        ("NVIDIA H200", 132, 2048, 1.83),
        ("NVIDIA GH200 480GB", 132, 2048, 1.83),
        ("NVIDIA H100 PCIe", 114, 2048, 1.62),
        ("NVIDIA A10", 72, 512, 1.695),
        ("NVIDIA A10G", 80, 256, 1.71),
        ("NVIDIA L4", 58, 512, 2.04),
        ("NVIDIA L40", 142, 256, 2.49),
        ("NVIDIA L40S", 142, 512, 2.49),
        ("NVIDIA GeForce RTX 3090", 82, 256, 1.695),
        ("NVIDIA GeForce RTX 4090", 128, 256, 2.52),
        ("NVIDIA GeForce RTX 5090", 170, 256, 2.407),
        ("NVIDIA RTX A6000", 84, 512, 1.8),
        ("NVIDIA RTX 6000 Ada Generation", 142, 512, 2.505),
        # Matrix units of a device, and their cells.
        ("TPU v3", 2, 128**2, 0.94),
        ("TPU v4", 8, 128**2, 1.05),
        ("TPU v5 lite", 4, 128**2, 1.5),
        ("TPU v5p", 8, 128**2, 1.75),
        ("TPU v6 lite", 4, 256**2, 1.75),
    ],
)
def test_a_peak_is_what_the_multipliers_of_the_device_do_at_their_clock(
    kind, units, per_unit, gigahertz
):
    assert PEAK_FLOPS[kind] == pytest.approx(2 * units * per_unit * gigahertz * 1e9, rel=0.005)


@pytest.mark.parametrize(
    ("kind", "wires", "gigabits"),
    [
        ("NVIDIA A100-SXM4-40GB", 5120, 2.43),
        ("NVIDIA A100-PCIE-40GB", 5120, 2.43),
        ("NVIDIA A100-SXM4-80GB", 5120, 3.186),
        ("NVIDIA A100 80GB PCIe", 5120, 3.024),
        ("NVIDIA A10", 384, 12.5),
        ("NVIDIA L4", 192, 12.5),
        ("NVIDIA L40S", 384, 18.0),
        ("NVIDIA GeForce RTX 3090", 384, 19.5),
        ("NVIDIA GeForce RTX 4090", 384, 21.0),
        ("NVIDIA GeForce RTX 5090", 512, 28.0),
        ("NVIDIA RTX A6000", 384, 16.0),
        ("NVIDIA RTX 6000 Ada Generation", 384, 20.0),
    ],
)
def test_a_bandwidth_is_what_the_wires_to_the_memory_carry(kind, wires, gigabits):
    assert PEAK_BANDWIDTH[kind] == pytest.approx(wires * gigabits * 1e9 / 8, rel=0.005)


def test_the_peak_of_memory_is_what_the_device_counted_and_a_cpu_counts_none():
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    stats = {"bytes_in_use": 1, "peak_bytes_in_use": 3e9, "bytes_limit": 8e9}
    assert peak_memory(Device(stats)) == 3e9
    assert peak_memory(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize(
    ("rows", "room", "batch_size"),
    [
        (64, 80e9, 64),
        (64, 51e9, 32),
        (8, 135e9, 8),  # one of eight devices has no more rows than these
        (64, 1e6, 1),
        (64, -1e9, 1),  # the state alone is too large
        (64, None, 1),  # a CPU does not report it; small micro-batches are fastest there
        (60, 26e9, 20),  # divisors of the rows keep Ng whole
    ],
)
def test_the_micro_batch_is_the_largest_that_fits_the_room(rows, room, batch_size):
    model = PRESETS["speedrun"].model
    row_bytes = 2048 * activation_bytes(model, 2048, "bfloat16", flash=True)
    assert row_bytes == pytest.approx(1.22e9, rel=0.01)
    assert largest_batch(rows, row_bytes, room) == batch_size


def test_half_of_the_rows_is_what_divides_them():
    assert [fewer(rows) for rows in (64, 12, 9, 7)] == [32, 6, 3, 1]


def test_the_scores_of_attention_count_only_where_they_are_stored():
    config = GPTConfig(mlp_only=(0, 7), paired_heads=(0, 5))
    flash, stored = (activation_bytes(config, 1024, "bfloat16", flash) for flash in (1, 0))
    # 10 attentions of 6 heads and 1,024 keys for each query, in float32 and in bfloat16; in one of
    # them, whose heads are paired, 3 heads of 2,048 queries and as many keys.
    assert stored - flash == (9 * 6 * 1024 + 3 * 2 * 2048) * (4 + 2)


def test_a_layer_without_attention_needs_memory_for_its_mlp_only():
    def needed(**shape):
        return activation_bytes(GPTConfig(**shape), 1024, "bfloat16", flash=True)

    of_attention = needed() - needed(mlp_only=(3,))
    of_mlp = needed() - needed(num_layers=11) - of_attention
    assert 0 < of_attention < 2 * 16 * 768
    assert of_mlp == 2 * (4 * 768 + 2 * 3072)


@pytest.mark.parametrize("change", [{}, {"mlp_only": (1,)}, {"value_embeddings": 2}])
def test_layers_computed_again_keep_what_is_reckoned_and_no_more(change):
    """The estimate, compared with what JAX stores for the backward pass, layer by layer."""
    T, B = 64, 4

    def kept(num_layers):
        config = replace(
            PRESETS["gpt2-xl"].model,
            vocab_size=128,
            num_layers=num_layers,
            num_heads=2,
            width=64,
            mlp_width=256,
            **change,
        )
        graph = graph_of(config, Kernels(rematerialize=True))
        params = param_shapes(config)
        rows = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)

        def pullback(params, rows):
            def loss(params):
                return nnx.merge(graph, params).loss(rows[:, :-1], rows[:, 1:])[0].sum()

            return jax.vjp(loss, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, params, rows))
        shapes = [leaf.shape for leaf in leaves]
        assert not [
            s for s in shapes if s[-1:] == (256,) and np.prod(s) == B * T * 256
        ]  # of an MLP
        of_stream = sum(leaf.size * 4 for leaf in leaves if leaf.shape == (B, T, 64))
        return of_stream / (B * T), activation_bytes(config, T, "float32", False, True)

    more, reckoned = np.array(kept(5)) - np.array(kept(3))
    assert more == pytest.approx(reckoned, rel=0.01)


@pytest.mark.parametrize(
    ("name", "T", "flash", "room", "fits"),
    [
        # 48 layers keep 23 arrays of 1,600 numbers for each token, of 2 bytes: 3.7 GB with logits.
        ("gpt2-xl", 1024, True, 48e9, True),
        ("gpt2-xl", 1024, True, 3.6e9, False),
        ("gpt2-xl", 1024, True, 4.0e9, True),
        # Without flash attention also 25 heads' scores in 4 and 2 bytes: 7.5 GB more.
        ("gpt2-xl", 1024, False, 11e9, False),
        ("gpt2-xl", 1024, False, 12e9, True),
        ("gpt2-xl", 16_384, True, 48e9, False),
        ("baseline", 1024, True, 11e9, True),
        ("gpt2-xl", 1024, True, None, True),  # a CPU does not say
    ],
)
def test_a_row_fits_if_there_is_room_for_its_activations(name, T, flash, room, fits):
    config = PRESETS[name].model
    assert row_fits(T * activation_bytes(config, T, "bfloat16", flash), room) is fits
    # Layers that are recomputed need a fraction of it.
    again = activation_bytes(config, T, "bfloat16", flash, rematerialize=True)
    assert again < 0.6 * activation_bytes(config, T, "bfloat16", flash)
    assert row_fits(T * again, room)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.0", False), ("7.5", False), ("8.0", True), ("10.0", True), ("gfx90a", True)],
)
def test_gpus_before_ampere_do_not_multiply_bfloat16(capability, expected):
    assert multiplies_bfloat16(SimpleNamespace(compute_capability=capability)) == expected
    assert multiplies_bfloat16(jax.devices("cpu")[0])
