"""The whole notebook on a CPU, and once more, as after an interrupted session."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.programs import ROOT, settings
from tests.small_runs import SMALL, T

pytestmark = pytest.mark.skipif(
    any(map(Path.exists, map(Path, ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0")))),
    reason="with an accelerator the notebook downloads FineWeb10B",
)
PARAMETERS = f"""
REPOSITORY, MINUTES, SHARDS = "", 0.01, 0
OPTIONS = "{" ".join(SMALL)} --preset laptop"
"""


def executed(folder, count=None):
    """Run the notebook's first code cells, or all, in a folder; return what they print or show."""
    notebook = nbformat.read(ROOT / "notebooks" / "tpu.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:count]
    notebook.cells = cells
    assert cells[0].metadata.tags == ["parameters"]
    assert not any(cell.outputs for cell in cells)
    cells[0].source = PARAMETERS
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return [
        "".join(each.get("text", "") + " ".join(each.get("data", ())) for each in cell.outputs)
        for cell in cells
    ]


def test_it_trains_draws_writes_and_exports_and_goes_on_where_it_was(tmp_path, cache, monkeypatch):
    for name in ("train_gpt.py", "sample.py", "export.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, value in settings(cache, devices=1).items():
        monkeypatch.setenv(name, value)
    _, devices, place, data, steps, training, curve, text, export = executed(tmp_path)
    assert "CpuDevice" in devices
    assert str(tmp_path / "runs") in place
    assert data == ""
    count = int(re.search(r"^(\d+) steps take about 0.01 minutes$", steps, re.MULTILINE)[1])
    assert count >= 10
    assert f"step {count}/{count} | val loss " in training
    assert "image/png" in curve
    assert text.startswith("The") and len(text) > T
    assert "model" in export
    assert (tmp_path / "runs" / "notebook" / "model" / "model.safetensors").exists()
    *_, again = executed(tmp_path, 6)
    assert f"has already finished its {count} steps" in again
