"""The command: what it writes where, and its messages when it cannot."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt.report import page, picture
from nanogpt.report.__main__ import main, report
from tests.report.test_curves import failure, records, write
from tests.report.test_page import Page


@pytest.fixture(autouse=True)
def one_panel(monkeypatch):
    """Draw one panel instead of all: they take longest."""
    monkeypatch.setattr(picture, "PANELS", picture.PANELS[:1])


@pytest.mark.parametrize(
    ("out", "made"),
    [
        ([], ["runs/report.png", "runs/report.html"]),
        (["--out", "new/place"], ["new/place/report.png", "new/place/report.html"]),
        (["--out", "v1.html"], ["v1.html"]),
        (["--out", "new/a.png"], ["new/a.png"]),
    ],
)
def test_files_are_written_where_they_are_asked_for(tmp_path, monkeypatch, capsys, out, made):
    monkeypatch.chdir(tmp_path)
    write(Path("runs/a"), records(20))
    assert main(["runs/a", *out]) == 0
    assert capsys.readouterr().out.split() == made
    for name in made:
        start = b"\x89PNG" if name.endswith("png") else b"<!doctype html>"
        assert Path(name).read_bytes().startswith(start)


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    said = failure(capsys, write(tmp_path / "a", records(20)), "--out", tmp_path / "file/x.png")
    assert re.fullmatch(r".*file/x\.png cannot be written \(.+\): choose another place.*\.", said)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write(tmp_path / place / "run", records(20)) for place in ("here", "there")]
    report([*folders, folders[0]], tmp_path / "x.html")
    names = Page((tmp_path / "x.html").read_text()).rows[0][1:]
    assert [name.split()[-1] for name in names] == ["here/run", "there/run"]


def test_all_of_a_folder_can_be_drawn_whatever_else_lies_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("runs/a"), records(20))
    write(Path("runs/begun"), [])
    Path("runs/notes").mkdir()
    for _ in range(2):  # the second time they include the first report
        assert main([str(place) for place in sorted(Path("runs").iterdir())]) == 0
        output = capsys.readouterr()
        assert output.out == "runs/report.png\nruns/report.html\n"
    told = output.err.splitlines()
    assert all(line.startswith("Skipped: ") for line in told)
    assert [re.search(r"runs/(\S+)", line)[1] for line in told] == [
        *("begun/metrics.jsonl", "notes", "report.html", "report.png")
    ]
    names = Page(Path("runs/report.html").read_text()).rows[0][1:]
    assert [name.split()[-1] for name in names] == ["a"]
    assert main(["runs/a", "runs/b"]) == 2  # a mistyped name is not skipped silently


def test_neither_pyplot_nor_jax_is_loaded_and_matplotlib_is_left_as_it_was(tmp_path):
    folder = write(tmp_path / "run", records(20))
    program = f"""if True:
        import sys, matplotlib
        before = dict(matplotlib.rcParams)
        from nanogpt.report import __main__, picture
        picture.PANELS = (("step", "grad_norm"),)
        __main__.main([{str(folder)!r}])
        assert dict(matplotlib.rcParams) == before
        print(*sorted({{"matplotlib.pyplot", "jax"}} & set(sys.modules)), sep=",")
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(page.__file__).parents[2],
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[2:] == [""], done.stderr
