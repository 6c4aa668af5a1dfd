"""What benchmarks/compiled/scaling.py reads from a program, and its predictions."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import pytest

from benchmarks import results
from benchmarks.compiled import scaling
from benchmarks.compiled.collectives import Sent, first_group, sent, wire_bytes
from benchmarks.compiled.prediction import H200, V5P, muon_flops, predicted, seconds_of
from benchmarks.compiled.program import Instruction, Program
from benchmarks.compiled.scaling_tables import span, table_of_sent, table_of_times
from nanogpt.config import GPTConfig
from tests.devices.test_sharding import compiled

SHAPE = {"num_layers": 2, "num_heads": 4, "width": 32, "mlp_width": 64, "mlp_only": (0,)}
SMALL = GPTConfig(100, **SHAPE, value_embeddings=0, bigram_buckets=0, skips=(), smear=False)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_step_sends_its_gradients_once_however_many_micro_batches_there_are():
    program, state, _ = compiled(4, 1, False, 2, SMALL)
    found = sent(Program(program), 4, 2)
    reduced = [x for x in found if x.kind in ("all-reduce", "reduce-scatter")]
    assert {x.devices for x in reduced} == {4}
    # And a loss, and two terms of a norm.
    assert sum(x.bytes for x in reduced) == bytes_of(state.params) + 4 * (1 + 2)


def test_parameters_in_parts_are_sent_whole_once_in_either_direction():
    program, state, _ = compiled(4, 1, True, 2, SMALL)
    by_kind = {x.kind: x for x in sent(Program(program), 4, 2)}
    large = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size > 1000]
    assert by_kind["all-gather"].bytes == by_kind["reduce-scatter"].bytes == bytes_of(large)


def test_devices_that_exchange_something_are_read_however_xla_names_them():
    def read(text, num_devices=8):
        attributes = f", channel_id=1, replica_groups={text}, dimensions={{1}}"
        return first_group(Instruction("", "", "f32[]", "all-reduce", "", attributes), num_devices)

    # Four rows of two on a mesh: those of a column are every other, those of a row neighbours.
    column, row = [0, 2, 4, 6], [0, 1]
    assert read("{{0,2,4,6},{1,3,5,7}}") == read("[2,4]<=[4,2]T(1,0)") == column
    assert read("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}") == column
    assert (
        read("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}")
        == column
    )
    assert (
        read("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}") == row
    )
    assert read("{{0,1},{2,3},{4,5},{6,7}}") == read("[4,2]<=[8]") == row
    assert read("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}") == column
    assert read("{}") == list(range(8))
    with pytest.raises(ValueError, match="Unknown notation"):
        read("<something new>")


def test_what_devices_that_share_rows_send_counts_for_each_micro_batch():
    program, _, _ = compiled(1, 4, False, 2, SMALL)
    once, twice = (
        sum(x.bytes for x in sent(Program(program), 4, passes) if x.kind == "all-reduce")
        for passes in (1, 2)
    )
    stream = 4 * 16 * 32 * 4  # rows, tokens, width, bytes
    # An attention and two MLPs, forward and backward, and the features to score.
    assert twice - once == 7 * stream


def test_a_reduce_scatter_that_xla_writes_as_a_fusion_for_tpus_counts_as_one():
    text = """HloModule step

%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.2 = f32[64,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %constant = u32[] constant(0)
  ROOT %slice = f32[16,8]{1,0} dynamic-slice(%all-reduce.2, %constant, %constant)
}

ENTRY %main (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8]{1,0} parameter(0)
  ROOT %fusion.3 = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    program = Program(SimpleNamespace(as_text=lambda: text))
    assert sent(program, 4, 1) == [Sent("reduce-scatter", 4, 4, 1, 64 * 8 * 4)]


def test_rings_send_what_nccl_counts():
    # nccl-tests, doc/PERFORMANCE.md: bus over algorithm bandwidth, by kind, on 8 devices.
    for kind, factor in {"all-reduce": 1.75, "all-gather": 0.875, "reduce-scatter": 0.875}.items():
        assert wire_bytes(kind, 8, 1000) == pytest.approx(1000 * factor)
    # There the size of an all-to-all is that of one device, which keeps an eighth of it.
    assert wire_bytes("all-to-all", 8, 8 * 1000) == pytest.approx(875)


def test_muons_work_is_that_of_its_groups():
    # 12 layers of 768: 48 square matrices are 6 groups of 8, 24 of 768 x 3072 are 3.
    square, wide = 6 * 768**3, 4 * 768**2 * 3072 + 2 * 768**3
    assert muon_flops("124M", 1) == 5 * 8 * (6 * square + 3 * wide)
    assert muon_flops("124M", 2) == 5 * 8 * (3 * square + 2 * wide)
    assert muon_flops("124M", 64) == 5 * 8 * (square + wide)


def test_a_prediction_lies_between_all_that_is_sent_hidden_and_nothing():
    gradients = {
        "kind": "all-reduce",
        "devices": 8,
        "per_host": 8,
        "count": 1,
        "bytes": 450_000_000,
    }
    muon = {"kind": "all-gather", "devices": 8, "per_host": 8, "count": 1, "bytes": 90_000_000}
    case = {
        "size": "124M",
        "devices": 8,
        "model": 1,
        "shard_params": False,
        "reduced_GB": 0.45,
        "reduced_early_GB": 0.09,
        "state_GB": 1.0,
        "memory_GB": 2.0,
        "sent": [gradients, muon],
    }
    step = predicted(case, 65_536)
    seconds = [1.75 * 450e6 / 450e9, 0.875 * 90e6 / 450e9]
    assert step["sending"] == pytest.approx(sum(seconds))
    assert step["none_hidden"] == pytest.approx(step["computing"] + sum(seconds))
    assert step["all_hidden"] == pytest.approx(step["computing"] + seconds[1])
    # With almost no computation, almost nothing can overlap.
    alone = predicted(case, 1)
    assert alone["all_hidden"] == pytest.approx(alone["none_hidden"], rel=0.01)

    row = "| 124M | data | 8 |"
    assert f"{row} 0.87 | 1 all-gather, 1 all-reduce | 20% | 1.00 | 2.0 |" in table_of_sent([case])
    times = table_of_times([case, case | {"devices": 64}], H200)
    assert row in times and "100%" in times


def test_a_ring_leaves_a_host_by_the_nics_of_those_of_its_devices_that_are_in_it():
    def seconds(kind, devices, per_host, machine=H200):
        return seconds_of(Sent(kind, devices, per_host, 1, 800_000_000), machine)

    once = 800e6 * 63 / 64
    assert seconds("all-gather", 64, 8) == pytest.approx(once / (8 * 50e9))
    assert seconds("all-gather", 64, 4) == pytest.approx(once / (4 * 50e9))
    assert seconds("all-to-all", 64, 8) == pytest.approx(once / 64 / 50e9)
    assert seconds("all-gather", 8, 8) == pytest.approx(800e6 * 7 / 8 / 450e9)
    assert seconds("all-gather", 8, 1) == pytest.approx(800e6 * 7 / 8 / 50e9)  # one in each host
    assert seconds("all-gather", 64, 4, V5P) == pytest.approx(once / 600e9)


def test_only_what_devices_that_share_rows_sum_grows_with_the_tokens():
    sums = {"kind": "all-reduce", "devices": 2, "per_host": 2, "count": 9, "bytes": 9_000_000_000}
    muon = {"kind": "all-to-all", "devices": 2, "per_host": 2, "count": 1, "bytes": 4_000_000_000}
    case = {"size": "350M", "devices": 64, "model": 2, "shard_params": False, "sent": [sums, muon]}
    strong, weak = (predicted(case, tokens)["sending"] for tokens in (524_288 / 64, 65_536))
    assert strong == pytest.approx((9e9 + 1e9) / 450e9)
    assert weak == pytest.approx((8 * 9e9 + 1e9) / 450e9)


@pytest.mark.parametrize(("model", "shard_params"), [(1, False), (1, True), (2, False)])
def test_efficiency_is_over_the_fewest_devices_that_divide_the_work_alike(model, shard_params):
    case = {"size": "350M", "model": model, "shard_params": shard_params, "sent": []}
    few, many = ({**case, "devices": n} for n in (8, 64))
    rows = [row.split(" | ") for row in table_of_times([few, many], H200).splitlines()[2:]]
    assert rows[0][4] == "100%"
    before, after = (
        predicted(each, 524_288 / each["devices"])["all_hidden"] for each in (few, many)
    )
    assert rows[1][4] == f"{before / after / 8:.0%}" != rows[0][4]


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(118.9, 121.4, "120"), (5.16, 16.44, "5.2 to 16"), (1469.8, 1612.0, "1,500 to 1,600")],
)
def test_predictions_have_two_significant_digits(low, high, text):
    assert span(low, high) == text


@pytest.mark.skipif(
    not (find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin")),
    reason='needs JAX\'s CUDA plugin: pip install -e ".[gpu-compiler]"',
)
def test_a_tiny_run_saves_prints_and_draws_what_it_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert scaling.main(["--tiny", "--devices", "8", "512"]) == 0

    cases = json.loads((tmp_path / "scaling_tiny.json").read_text())["cases"]
    whole, wider, parts = cases  # 512 devices cannot divide the parameters
    assert [case["devices"] for case in cases] == [8, 512, 8]
    printed = capsys.readouterr().out
    assert "tiny, 512 GPUs: The " in printed and "cannot be divided" in printed
    assert printed.count("| tiny | data | 512 |") == 3
    assert (tmp_path / "scaling_tiny.png").stat().st_size > 10_000

    D, V = 768, 50_304
    parameters = 12 * D * D + 2 * V * D  # and norms, none of which has any
    for case in (whole, wider):
        reduced = sum(x["bytes"] for x in case["sent"] if x["kind"] == "all-reduce")
        assert reduced == pytest.approx(4 * parameters, rel=1e-4)
    scattered = sum(x["bytes"] for x in parts["sent"] if x["kind"] == "reduce-scatter")
    assert scattered == pytest.approx(4 * parameters, rel=1e-4)
    assert parts["state_GB"] == pytest.approx(whole["state_GB"] / 8, rel=0.01)
