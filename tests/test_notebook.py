"""The notebook on a CPU: a session that is cut while it trains, and the next one."""

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
REPOSITORY, MINUTES, SHARDS = "", 0.001, 0
OPTIONS = "{" ".join(SMALL)} --preset laptop --model.num-layers 1 --checkpoint-every 8"
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


# train_gpt.py, ended without warning once there is a checkpoint of the run, as a session may be.
CUT = """
import os, sys
sys.path.insert(0, "{root}")
import train_gpt
from nanogpt.training.saving import Checkpoints

def save_and_end(checkpoints, *arguments, save=Checkpoints.save):
    save(checkpoints, *arguments)
    if "notebook" in sys.argv:
        checkpoints.wait()
        os.kill(os.getpid(), 9)

Checkpoints.save = save_and_end
sys.exit(train_gpt.main())
"""


def test_it_trains_and_after_a_session_was_cut_goes_on_draws_writes_and_exports(
    tmp_path, cache, monkeypatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        for name in ("train_gpt.py", "sample.py", "export.py"):
            (folder / name).symlink_to(ROOT / name)
    for name, value in settings(cache, devices=1).items():
        monkeypatch.setenv(name, value)
    for name in ("notebook", "trial"):  # cut off before there was anything to resume from
        (first / "runs" / name).mkdir(parents=True)
        (first / "runs" / name / "config.json").write_text("{}")
    (first / "train_gpt.py").unlink()
    (first / "train_gpt.py").write_text(CUT.format(root=ROOT))
    _, devices, place, data, steps, training = executed(first, 6)
    assert "CpuDevice" in devices
    assert str(first / "runs") in place
    assert data == ""
    count = int(re.search(r"^(\d+) steps take about 0.001 minutes$", steps, re.MULTILINE)[1])
    assert count >= 10
    assert f"step {count}/{count} | val loss " not in training
    # Only the runs are kept.
    (first / "runs").rename(second / "runs")
    *_, training, curve, text, export = executed(second)
    assert "resuming runs/notebook after step 8" in training.splitlines()
    assert f"step {count}/{count} | val loss " in training
    assert "image/png" in curve
    assert text.startswith("The") and len(text) > T
    assert "model" in export
    assert (second / "runs" / "notebook" / "model" / "model.safetensors").exists()
