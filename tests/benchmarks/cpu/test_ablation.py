"""The ablation: what each of its runs leaves out, and one small enough for a test."""

import json
from itertools import product

import numpy as np
import pytest

from benchmarks import results
from benchmarks.compiled import h200, recipe_bytes
from benchmarks.cpu import python_sources as sources
from benchmarks.cpu import width_transfer
from benchmarks.cpu.ablation import Options, changes_of, proxy_of
from benchmarks.cpu.pieces import ADDITIONS, BUILT_IN, CPU, GPU, PIECES
from nanogpt.data.shards import read_shard
from nanogpt.optim import muon
from nanogpt.schedule import Schedule
from nanogpt.training.step import param_shapes
from tests.programs import run_to_end


@pytest.mark.parametrize(
    ("proxy", "change"),
    [
        *product([CPU, GPU], PIECES.values()),
        *product([CPU], ADDITIONS.values()),
    ],
)
def test_a_changed_run_is_valid_and_sees_as_many_tokens(proxy, change):
    changed = change(proxy)
    changed.check()
    tokens = [hp.schedule.tokens(hp.num_steps) for hp in (changed, proxy)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.01)


def test_every_piece_is_in_the_speedrun_and_every_addition_is_one_to_the_laptop_preset():
    assert all(leave_out(GPU) != GPU or leave_out(CPU) != CPU for leave_out in PIECES.values())
    assert all(add(CPU) != CPU for add in ADDITIONS.values())


def test_the_compiled_benchmarks_name_pieces_that_there_are():
    cases = [*recipe_bytes.all_cases().values(), *h200.all_steps().values()]
    for hp in {case[0] for case in cases}:
        hp.check()
    assert len({case[0] for case in cases}) > len(recipe_bytes.INGREDIENTS)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_tiny_run_is_valid(gpu, monkeypatch):
    monkeypatch.setattr(sources, "python_sources", lambda: ("a.bin", "b.bin"))
    tiny = Options(gpu=gpu, tiny=True)
    proxy = proxy_of(tiny)
    assert proxy.model.num_layers == proxy.num_steps == 1
    for hp, _ in changes_of(proxy, tiny).values():
        hp.check()


def test_a_piece_that_a_run_does_not_have_is_not_left_out():
    cpu, gpu = (changes_of(hp, Options(gpu=hp is GPU)) for hp in (CPU, GPU))
    assert {
        "without smear",
        "without Polar Express",
        "with dynamic connections, composed heads",
    } <= cpu.keys()
    assert {"without composed heads", "without YaRN"} <= gpu.keys() - cpu.keys()
    assert not any(name.startswith("with ") for name in gpu)


def test_a_run_ends_with_the_loss_of_its_validation(forked, monkeypatch, tmp_path):
    """An untrained model's loss on bytes is ln 256; that of its validation is after a step."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert width_transfer.main(["--tiny"]) == 0
    losses = json.loads((tmp_path / "width_transfer_tiny.json").read_text())["losses"]
    assert losses["matrices"] == losses["head"]
    assert np.log(256) - 0.3 < losses["head"]["1"]["32"] < np.log(256) - 0.01


VALUES = {
    "YaRN": lambda: Schedule.model(GPU.schedule, GPU.model, 2).rotary_windows,
    "Polar Express": lambda: len(set(muon.POLAR_EXPRESS)),
    "share of what attentions add": lambda: (
        # not from the cache: the second time the piece is taken out
        "out_share" in param_shapes.__wrapped__(CPU.model)["attention"]
    ),
}


def take_out(_):
    """Print a value that each piece changes, with and without it."""
    for piece, value in VALUES.items():
        print(value(), BUILT_IN[piece]() or value())


def test_what_is_no_setting_is_taken_out_of_its_process(tmp_path, cache):
    done = run_to_end([], tmp_path, cache, main=take_out)
    assert done.stdout.splitlines() == ["(384, 896, 1408) ()", "5 1", "True False"]
    assert VALUES.keys() == BUILT_IN.keys()


@pytest.mark.parametrize("hp", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_head_that_is_not_tied_leaves_the_embedding_to_learn_as_tables_do(hp):
    apart = PIECES["tied head"](hp)
    assert (apart.model.tied_head, apart.adam.embedding) == (False, hp.adam.tables)
    assert apart.adam.head == hp.adam.head


def test_the_text_for_a_gpu_is_what_python_s_packages_hold(tmp_path, monkeypatch):
    class Words:  # replaces GPT-2's vocabulary, which may not be available
        separator = 50256

        def encode(self, text):
            return [len(word) for word in text.split()]

    package = tmp_path / "packages" / "package"
    package.mkdir(parents=True)
    for i in range(40):
        (package / f"module{i}.py").write_text(f"x = {'y' * (i + 1)}\n")
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "packages"))
    monkeypatch.setattr(sources, "load_tokenizer", lambda name: Words())
    documents = [
        document.tolist()
        for shard in sources.python_sources()
        for document in np.split(read_shard(shard), np.arange(4, len(read_shard(shard)), 4))
    ]
    assert sorted(documents) == [[50256, 1, 1, i + 1] for i in range(40)]
