"""The picture shows what is in the runs' files."""

import json
from dataclasses import asdict, fields

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanogpt.config import GPTConfig
from nanogpt.report.__main__ import report
from nanogpt.report.curves import read_run
from nanogpt.report.picture import LOOKS, draw, loss_png, overview
from nanogpt.schedule import Schedule, Stage
from tests.report.test_curves import records, write
from train_gpt import PRESETS


def drawn(folders, x, y):
    axes = Figure().subplots()
    draw(axes, [read_run(folder, folder.name) for folder in folders], x, y)
    return axes


@pytest.mark.parametrize(
    ("x", "y", "x_unit", "y_unit", "x_label", "y_label"),
    [
        ("tokens", "train_loss", 1e6, 1, "tokens (millions)", "loss (nats per token)"),
        ("step", "train_loss", 1, 1, "step", "loss (nats per token)"),
        ("time_s", "train_loss", 60, 1, "training time (minutes)", "loss (nats per token)"),
        ("step", "learning_rate_factor", 1, 1, "step", "learning-rate factor"),
        ("step", "grad_norm", 1, 1, "step", "gradient norm"),
        ("step", "tokens_per_s", 1, 1e3, "step", "tokens per second (thousands)"),
    ],
)
def test_the_numbers_drawn_are_those_of_the_files_in_the_units_of_the_labels(
    tmp_path, x, y, x_unit, y_unit, x_label, y_label
):
    made = [records(200, seed) for seed in (0, 1)]
    axes = drawn([write(tmp_path / f"{i}", each) for i, each in enumerate(made)], x, y)
    assert (axes.get_xlabel(), axes.get_ylabel()) == (x_label, y_label)
    lines = {"training, every step": [], "training, running median": [], "validation": []}
    for line in axes.lines:
        if line.get_label() in lines:
            lines[line.get_label()].append(line)
    for run, each in enumerate(made):
        for line in (lines["training, every step"][run], lines["training, running median"][run]):
            np.testing.assert_allclose(line.get_xdata() * x_unit, [record[x] for record in each])
        raw = np.array([record[y] for record in each])
        np.testing.assert_allclose(lines["training, every step"][run].get_ydata() * y_unit, raw)
        smooth = raw
        if y != "learning_rate_factor":  # medians of 7, the ends mirrored
            around = np.concatenate([raw[2::-1], raw, raw[:-4:-1]])
            smooth = np.median(np.lib.stride_tricks.sliding_window_view(around, 7), axis=1)
        median = lines["training, running median"][run].get_ydata()
        np.testing.assert_allclose(median * y_unit, smooth)
        if y == "train_loss":
            validated = [record for record in each if "val_loss" in record]
            marks = lines["validation"][run]
            np.testing.assert_allclose(marks.get_xdata() * x_unit, [v[x] for v in validated])
            np.testing.assert_array_equal(marks.get_ydata(), [v["val_loss"] for v in validated])
    assert len(lines["validation"]) == (2 if y == "train_loss" else 0)


def test_a_run_that_diverged_is_drawn_up_to_there_and_squashes_no_other(tmp_path):
    good, bad = records(300), records(300, seed=1)
    for i, record in enumerate(bad[200:]):
        record["train_loss"] = 5.0 + i**2
        if i >= 50:
            record["train_loss"] = record["grad_norm"] = float("nan")
            record["val_loss"] = float("inf")
    folders = [write(tmp_path / "good", good), write(tmp_path / "bad", bad)]
    assert "NaN" in (folders[1] / "metrics.jsonl").read_text()
    axes = drawn(folders, "step", "train_loss")
    _, _, _, raw, *_ = axes.lines
    assert raw.get_xdata()[-1] == 250 and raw.get_ydata()[-1] == 5.0 + 49**2
    low, high = axes.get_ylim()
    assert 2.5 < low < 3.2 and high < 12
    overview([read_run(folder, folder.name) for folder in folders]).savefig(tmp_path / "x.png")


def test_a_run_of_which_nothing_is_finite_is_drawn_as_nothing(tmp_path):
    folder = write(tmp_path / "run", [{"step": 1, "train_loss": float("nan"), "grad_norm": 0.0}])
    assert not drawn([folder], "step", "train_loss").lines
    assert report([folder], tmp_path / "out.html")


@pytest.mark.parametrize(("most", "scale"), [(9.0, "linear"), (11.0, "log")])
def test_gradient_norms_of_many_sizes_have_a_logarithmic_axis(tmp_path, most, scale):
    made = [{"step": step, "grad_norm": norm} for step, norm in enumerate([0.0, 1.0, most])]
    axes = drawn([write(tmp_path / "run", made)], "step", "grad_norm")
    assert axes.get_yscale() == scale


def test_the_end_of_a_run_is_framed_rather_than_its_beginning(tmp_path):
    low, high = drawn([write(tmp_path / "run", records(500))], "step", "train_loss").get_ylim()
    assert low < 3.1 and 5 < high < 9.5


@pytest.mark.parametrize(
    ("tokenizer", "last", "shown"),
    [("gpt2", 3.2, True), ("gpt2", 3.35, True), ("gpt2", 5.5, False), ("bytes", 3.2, False)],
)
def test_the_speedruns_target_is_drawn_where_losses_compare_and_come_near(
    tmp_path, tokenizer, last, shown
):
    folder = write(tmp_path / "run", records(200, last=last), tokenizer)
    axes = drawn([folder], "step", "train_loss")
    assert [text.get_text() for text in axes.texts] == ["3.28"] * shown
    level = [line for line in axes.lines if set(line.get_ydata()) == {3.28}]
    assert len(level) == shown
    low, high = axes.get_ylim()
    assert (low < 3.28 < high) == (last < 4)
    assert high - low < 8


def test_a_picture_names_its_runs_as_they_are_called(tmp_path):
    names = ["_first", "$x$", "a" * 70]
    folders = [write(tmp_path / name, records(20)) for name in names]
    figure = overview([read_run(folder, folder.name) for folder in folders])
    [legend] = figure.legends
    texts = legend.get_texts()
    assert [text.get_text() for text in texts] == ["_first", "$x$", "a" * 39 + "…"]
    assert not any(text.get_parse_math() for text in texts)
    assert len(figure.axes) == len({(a.get_xlabel(), a.get_ylabel()) for a in figure.axes}) == 6


def test_no_two_of_eighteen_runs_look_alike():
    assert len(set(LOOKS)) == 18


def test_the_trainers_picture_lies_in_the_runs_folder(tmp_path):
    folder = write(tmp_path / "run", records(50))
    assert loss_png(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_long_run_some_points_are_drawn_and_its_extremes_among_them(tmp_path):
    step = np.arange(1, 9_001)
    loss = 3 + 8 / step**0.5 + np.random.default_rng(0).normal(size=step.size) / 10
    loss[1_234], loss[4_567] = 9.0, 0.5
    line = '{{"step": {}, "tokens": {}, "train_loss": {!r}, "time_s": {}, "grad_norm": 1.0}}\n'
    folder = write(tmp_path / "run", [], "bytes")
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(
            line.format(s, 1000 * s, y, s / 10) for s, y in zip(step, loss.tolist(), strict=True)
        )
    raw, median = drawn([folder], "step", "train_loss").lines
    for each in (raw, median):
        assert len(each.get_xdata()) <= 800
        assert set(np.diff(each.get_xdata()) > 0) == {True}
        assert each.get_xdata()[0] == 1 and each.get_xdata()[-1] == 9_000
    np.testing.assert_array_equal(raw.get_ydata(), loss[raw.get_xdata().astype(int) - 1])
    assert {1_235, 4_568} <= set(raw.get_xdata())
    for file in report([folder], tmp_path):
        assert file.stat().st_size < 300_000


def shaped(folder, made, width, tokenizer="bytes"):
    """Create a run's folder with settings whose FLOPs are known."""
    model = asdict(GPTConfig(vocab_size=128, num_layers=1, num_heads=1, width=width, mlp_width=8))
    schedule = {field.name: getattr(PRESETS["baseline"], field.name) for field in fields(Schedule)}
    stages = [asdict(stage) for stage in (Stage(), Stage(length=0.5))]
    given = {"num_steps": len(made), "total_batch_size": 300_000, "sequence_length": 32}
    return write(folder, made, tokenizer, model=model, **schedule | given | {"stages": stages})


def test_loss_against_compute_has_a_point_for_the_end_of_each_run(tmp_path):
    widths, made = (16, 32, 64, 128), records(40)
    folders = [shaped(tmp_path / f"{D}", made, D) for D in widths]
    axes = drawn(folders, "flops", "val_loss")
    points = [line.get_xydata()[0] for line in axes.lines if line.get_marker() != "None"]
    for (flops, loss), D in zip(points, widths, strict=True):
        weights = 4 * D * D + 2 * D * 8 + D * 128
        # Half of the tokens are in rows of 32, whose queries see 16.5 keys on average.
        each = [6 * weights + 12 * D * (T + 1) / 2 for T in (32, 16)]
        assert flops == pytest.approx(20 * 300_000 * sum(each))
        assert loss == made[-1]["val_loss"]
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("tokenizers", "panels"), [(("bytes",) * 4, 7), (("bytes", "gpt2") * 2, 6), (("bytes",), 6)]
)
def test_only_runs_on_the_same_data_are_compared_by_compute(tmp_path, tokenizers, panels):
    folders = [
        shaped(tmp_path / f"{i}", records(20, last=4 - i / 2), 16 << i, tokenizer)
        for i, tokenizer in enumerate(tokenizers)
    ]
    figure = overview([read_run(folder, folder.name) for folder in folders])
    assert len(figure.axes) == panels


def test_a_run_that_is_not_finished_is_no_point(tmp_path):
    folders = [shaped(tmp_path / f"{D}", records(40), D) for D in (16, 32, 64)]
    lines = (folders[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folders[0] / "metrics.jsonl").write_text("".join(lines[:30]))
    axes = drawn(folders, "flops", "val_loss")
    assert len(axes.lines) == 2


def test_runs_on_other_text_are_not_compared(tmp_path):
    folders = [shaped(tmp_path / f"{D}", records(40), D) for D in (16, 32, 64)]
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"data": ["novel.txt"]}))
    figure = overview([read_run(folder, folder.name) for folder in folders])
    assert len(figure.axes) == 6
