"""Paths, globs and folders, and the files that they mean."""

import os
from pathlib import Path

import pytest

from nanogpt.data.find import files_below, matches


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create files in folders, one whose name is a glob that matches the other."""
    for name in ("d[v2]/a1.bin", "d[v2]/b/a2.bin", "dv/a1.bin", "x[12].bin", "x1.bin", ".h/a.bin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("d[v2]/a1.bin", ["d[v2]/a1.bin"]),  # an existing path is not a glob
        ("x[12].bin", ["x[12].bin"]),
        ("d[v2]/a*.bin", ["d[v2]/a1.bin"]),  # nor is the folder at the start of one
        ("d[v2]/*/a[12].bin", ["d[v2]/b/a2.bin"]),
        ("d[[]v2]/a*.bin", ["d[v2]/a1.bin"]),
        ("d[v]/a*.bin", ["dv/a1.bin"]),  # there is no such folder
        ("x[13].bin", ["x1.bin"]),
        ("d[v2]/**/*.bin", ["d[v2]/a1.bin", "d[v2]/b/a2.bin"]),
        ("**/a1.bin", ["./d[v2]/a1.bin", "./dv/a1.bin"]),
        ("dv/**", ["dv/a1.bin"]),
        ("~/x1.bin", ["{folder}/x1.bin"]),
        ("nothing*", []),
    ],
)
def test_a_pattern_means(folder, pattern, found):
    assert matches(pattern) == [path.format(folder=folder) for path in found]


def test_a_folder_is_entered_once_however_often_it_is_linked(folder):
    Path("d[v2]/again").symlink_to(folder / "dv")
    Path("d[v2]/circle").symlink_to(folder / "d[v2]")
    Path("dv/up").symlink_to(folder)
    below = [os.path.relpath(path, folder) for path in files_below("d[v2]")]
    names = ["a1.bin", "again/a1.bin", "again/up/x1.bin", "again/up/x[12].bin", "b/a2.bin"]
    assert sorted(below) == [f"d[v2]/{name}" for name in names]
    assert len(matches("d[v2]/**/a*.bin")) == 3
    assert list(files_below("d[v2]", leave_out=folder / "dv")) == [
        folder / "d[v2]/a1.bin",
        folder / "d[v2]/b/a2.bin",
    ]


def test_what_is_no_file_is_told_all_the_same(folder):
    Path("dv/gone").symlink_to("nowhere")
    os.mkfifo("dv/pipe")
    Path("dv/self").symlink_to("self")
    names = [path.name for path in files_below("dv")]
    assert names == ["a1.bin", "gone", "pipe", "self"]
