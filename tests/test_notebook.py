"""The notebook on a CPU: a session that is cut while it trains, and the next one."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.programs import ROOT, settings
from tests.small_runs import SMALL, STEPS, T

pytestmark = pytest.mark.skipif(
    any(map(Path.exists, map(Path, ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0")))),
    reason="with an accelerator the notebook downloads FineWeb10B",
)
PARAMETERS = f"""
REPOSITORY, MINUTES, SHARDS = "", {{}}, 0
OPTIONS = "{" ".join(SMALL)} --checkpoint-every 8"
"""


def executed(folder, minutes, count=None):
    """Run the notebook's first code cells, or all, in a folder; return what they print or show."""
    notebook = nbformat.read(ROOT / "notebooks" / "tpu.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:count]
    notebook.cells = cells
    assert cells[0].metadata.tags == ["parameters"]
    assert not any(cell.outputs for cell in cells)
    cells[0].source = PARAMETERS.format(minutes)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return [
        "".join(each.get("text", "") + " ".join(each.get("data", ())) for each in cell.outputs)
        for cell in cells
    ]


# train_gpt.py, ended without warning once there is a checkpoint of the run, as a session may be.
# The trial is a run of the same model that is there already.
CUT = """
import os, shutil, sys
sys.path.insert(0, "{root}")
import train_gpt
if "trial" in sys.argv:
    train_gpt.train = lambda *_: shutil.copytree("{trial}", "runs/trial")
else:
    from nanogpt.training.saving import Checkpoints

    def save_and_end(checkpoints, *arguments, save=Checkpoints.save):
        save(checkpoints, *arguments)
        checkpoints.wait()
        os.kill(os.getpid(), 9)

    Checkpoints.save = save_and_end
train_gpt.main()
"""


def test_it_trains_and_after_a_session_was_cut_goes_on_draws_writes_and_exports(
    tmp_path, cache, base, monkeypatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    for name in ("train_gpt.py", "sample.py", "export.py"):
        (second / name).symlink_to(ROOT / name)
    for name, value in settings(cache, devices=1).items():
        monkeypatch.setenv(name, value)
    for name in ("notebook", "trial"):  # cut off before there was anything to resume from
        (first / "runs" / name).mkdir(parents=True)
        (first / "runs" / name / "config.json").write_text("{}")
    (first / "train_gpt.py").write_text(CUT.format(root=ROOT, trial=base.folder))
    minutes = 12 / STEPS * base.column("time_s")[-1] / 60
    _, devices, place, data, steps, training = executed(first, minutes, 6)
    assert "CpuDevice" in devices
    assert str(first / "runs") in place
    assert data == ""
    assert steps == f"12 steps take about {minutes} minutes\n"
    assert "step 12/12 | val loss " not in training
    # Only the runs are kept.
    (first / "runs").rename(second / "runs")
    *_, training, curve, text, export = executed(second, minutes)
    assert "resuming runs/notebook after step 8" in training.splitlines()
    assert "step 12/12 | val loss " in training
    assert "image/png" in curve
    assert text.startswith("The") and len(text) > T
    assert "model" in export
    assert (second / "runs" / "notebook" / "model" / "model.safetensors").exists()
