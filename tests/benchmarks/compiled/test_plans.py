"""The tables of planned and compiled memory."""

import json
from functools import cache

import pytest

from benchmarks import results
from benchmarks.command import ROOT
from benchmarks.compiled import h200, plans

planned_once = cache(plans.plans)


def test_the_tables_of_the_documentation_are_the_plans_of_now(monkeypatch, capsys):
    monkeypatch.setattr(plans, "plans", planned_once)
    assert plans.main([]) == 0
    gpus, old_gpus, tpus = capsys.readouterr().out.strip().split("\n\n")
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert gpus in page and old_gpus in page
    assert tpus in (ROOT / "docs" / "tpu.md").read_text()
    assert gpus.count("\n") > 8 and tpus.count("\n") > 6


@pytest.mark.parametrize(
    ("num_bytes", "cell"),
    [
        (4.8e9, "| 4, 5.1 GB (4.8) |"),
        (7.4e9, "| does not fit (7.4 GB) |"),  # 7.2 GB are usable
        (None, "| does not fit (5.1 GB) |"),  # refused by the compiler
    ],
)
def test_each_step_is_compiled_once_and_what_needs_too_much_does_not_fit(
    num_bytes, cell, tmp_path, monkeypatch, capsys
):
    compiled = []

    def bytes_compiled(plan):
        compiled.append(plans.name_of(plan))
        smallest = plan.hp.preset == "baseline" and plan.batch_size == 4
        return num_bytes if smallest and plan.hp.dtype == "bfloat16" else 1e9

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(plans, "plans", planned_once)
    monkeypatch.setattr(plans, "bytes_compiled", bytes_compiled)
    monkeypatch.setattr(h200, "use_gpu_compiler", lambda: None)
    assert plans.main(["--compile", "gpu"]) == 0
    assert len(compiled) == len({*compiled}) and all("GPU" in name for name in compiled)
    saved = json.loads((tmp_path / "plans_gpu.json").read_text())
    assert [*saved["bytes"]] == compiled
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("| 8 GB |"))
    assert cell in line
