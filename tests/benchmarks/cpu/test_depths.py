"""The losses at several depths: what is trained, what is predicted from it, and when."""

import json

import pytest

from benchmarks import results
from benchmarks.cpu import depths
from benchmarks.cpu.depths import ENDS, LARGEST, RULE, SAME_FLOPS, Result, all_settings, flops, main
from train_gpt import PRESETS

LAPTOP = PRESETS["laptop"]


def test_a_tiny_run_saves_every_run_and_draws_them(forked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    assert main(["--tiny"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"depths_tiny.json", "depths_tiny.png"}
    runs = json.loads((tmp_path / "depths_tiny.json").read_text())["runs"]
    assert [(run["depth"], run["differs"]) for run in runs] == [(1, RULE), (2, RULE)]
    assert all(4 < run["loss"] < 6 for run in runs)  # ln 256 = 5.5


def test_the_largest_is_predicted_from_the_others_before_it_is_trained(
    monkeypatch, tmp_path, capsys
):
    def law(flops, seed):
        return 0.5 + 0.8 * (flops / 1e13) ** -0.15 + 0.001 * seed

    def trained(runs, own_core):
        saved = results.FOLDER / "depths.json"
        if not own_core:  # the largest: the prediction is there already
            assert {run["depth"] for run in json.loads(saved.read_text())["runs"]} == {
                *range(1, LARGEST)
            }
        return [
            Result(*name, 0, 0, 0, 0, 0, flops(hp), 1.0, law(flops(hp), name[2]))
            for name, hp in runs.items()
        ]

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(depths, "ROOT", tmp_path)
    monkeypatch.setattr(depths, "trained", trained)
    (tmp_path / "docs").mkdir()
    assert main([]) == 0
    saved = json.loads((tmp_path / "depths.json").read_text())
    last = saved["runs"][-1]
    assert (last["depth"], last["differs"]) == (LARGEST, RULE)
    assert saved["predicted"] == pytest.approx(last["loss"], abs=0.003)
    assert (tmp_path / "docs/sizes.png").read_bytes().startswith(b"\x89PNG")
    assert "| 4 | batch x 0.5 | +0.0000 | 1.00 |" in capsys.readouterr().out


def test_neighbors_differ_in_one_thing_and_train_on_as_many_tokens():
    runs = all_settings()
    for (depth, differs, seed), hp in runs.items():
        hp.check()
        rule = runs[depth, RULE, 0]
        tokens = [each.schedule.tokens(each.num_steps) for each in (hp, rule)]
        if differs == SAME_FLOPS:
            assert flops(hp) == pytest.approx(flops(LAPTOP), rel=0.01)
            continue
        assert tokens[0] == pytest.approx(tokens[1], rel=0.01)
        times = [each.total_batch_size / rule.total_batch_size for each in (hp, rule)]
        rate = hp.learning_rate_factor
        if differs.startswith("batch"):
            assert times[0] in (0.5, 2.0) and rate**2 == pytest.approx(times[0])
        elif differs.startswith("rates"):
            assert times[0] == 1 and rate in (0.5, 2.0)
        else:
            assert (times[0], rate, hp.seed) == (1, 1, seed)
    ends = {(depth, differs) for depth, differs, _ in runs if differs not in (RULE, SAME_FLOPS)}
    assert len(ends) == 8 and {depth for depth, _ in ends} == {*ENDS}
