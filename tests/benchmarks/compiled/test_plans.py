"""The plans in the documentation match those of runs."""

from benchmarks.command import ROOT
from benchmarks.compiled import plans


def test_the_tables_of_the_documentation_are_the_plans_of_now(capsys):
    assert plans.main([]) == 0
    gpus, old_gpus, tpus = capsys.readouterr().out.strip().split("\n\n")
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert gpus in page and old_gpus in page
    assert tpus in (ROOT / "docs" / "tpu.md").read_text()
    assert gpus.count("\n") > 8 and tpus.count("\n") > 6
