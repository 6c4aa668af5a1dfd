"""What benchmarks/scaling.py reads from a program, and what it makes of it."""

import jax
import pytest
from test_sharding import compiled

from benchmarks.h200 import Program
from benchmarks.scaling import NVLINK, muon_flops, predicted, sent, tables, wire_bytes

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_step_sends_its_gradients_once_however_many_micro_batches_there_are():
    program, state, _ = compiled(4, micro_batches=2)
    found = sent(Program(program), 4, 2)
    reduced = [x for x in found if x.kind == "all-reduce"]
    assert {x.devices for x in reduced} == {4}
    assert sum(x.bytes for x in reduced) == bytes_of(state.params) + 4  # and a loss


def test_parameters_in_parts_are_sent_whole_once_in_either_direction():
    program, state, _ = compiled(4, 1, True, micro_batches=2)
    by_kind = {x.kind: x for x in sent(Program(program), 4, 2)}
    large = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size > 1000]
    assert by_kind["all-gather"].bytes == by_kind["reduce-scatter"].bytes == bytes_of(large)


def test_what_devices_that_share_rows_send_counts_for_each_micro_batch():
    program, _, _ = compiled(1, 4, micro_batches=2)
    once, twice = (
        sum(x.bytes for x in sent(Program(program), 4, passes) if x.kind == "all-reduce")
        for passes in (1, 2)
    )
    stream = 4 * 16 * 32 * 4  # rows, tokens, width, bytes
    # Two attentions and three MLPs, forward and backward, and the features to score.
    assert twice - once == 11 * stream


def test_rings_send_what_nccl_counts():
    # nccl-tests, doc/PERFORMANCE.md: bus over algorithm bandwidth, by kind, on 8 devices.
    for kind, factor in {"all-reduce": 1.75, "all-gather": 0.875, "reduce-scatter": 0.875}.items():
        assert wire_bytes(kind, 8, 1000) == pytest.approx(1000 * factor)
    # There the size of an all-to-all is that of one device, of which one part of eight stays.
    assert wire_bytes("all-to-all", 8, 8 * 1000) == pytest.approx(875)


def test_muons_work_is_that_of_its_groups():
    # 12 layers of 768: 48 square matrices are 6 groups of 8, 24 of 768 x 3072 are 3.
    square, wide = 6 * 768**3, 4 * 768**2 * 3072 + 2 * 768**3
    assert muon_flops("124M", 1) == 5 * 8 * (6 * square + 3 * wide)
    assert muon_flops("124M", 2) == 5 * 8 * (3 * square + 2 * wide)
    assert muon_flops("124M", 64) == 5 * 8 * (square + wide)


def test_a_prediction_lies_between_all_that_is_sent_hidden_and_nothing():
    gradients = {"kind": "all-reduce", "devices": 8, "count": 1, "bytes": 450_000_000}
    muon = {"kind": "all-gather", "devices": 8, "count": 1, "bytes": 90_000_000}
    case = {
        "size": "124M",
        "devices": 8,
        "model": 1,
        "shard_params": False,
        "state_GB": 1.0,
        "memory_GB": 2.0,
        "sent": [gradients, muon],
    }
    step = predicted(case, 65_536)
    seconds = [1.75 * 450e6 / NVLINK, 0.875 * 90e6 / NVLINK]
    assert step["sending"] == pytest.approx(sum(seconds))
    assert step["none_hidden"] == pytest.approx(step["computing"] + sum(seconds))
    assert step["all_hidden"] == pytest.approx(step["computing"] + seconds[1])
    # With next to nothing to compute, next to nothing hides.
    alone = predicted(case, 1)
    assert alone["all_hidden"] == pytest.approx(alone["none_hidden"], rel=0.01)

    table = tables([case, case | {"devices": 64}])
    assert "| 124M | data | 8 | 0.87 | 1 all-gather, 1 all-reduce | 1.00 | 2.0 |" in table
    assert "| 124M | data | 8 |" in table.split("efficiency")[-1]
    assert "100%" in table
