"""The report on runs: what is drawn and told is what their files say, and a page needs no other."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need Matplotlib: the extra `plot`")

from matplotlib.figure import Figure

from nanogpt.report import __main__ as report
from nanogpt.report import curves
from nanogpt.report.curves import draw, loss_png, overview, read_run

CIRCUMSTANCES = {
    "date": "2026-11-22T19:42:06+00:00",
    "commit": "bea878c",
    "hardware": "2 x AMD EPYC",
    "accelerators": ["8 x NVIDIA H200"],
}


def records(num_steps, seed=0, first=10.8, last=3.2):
    """What a run that learns writes: a record per step, every tenth with a validation loss."""
    rng = np.random.default_rng(seed)
    made = []
    for step in range(1, num_steps + 1):
        seconds = float(rng.uniform(0.4, 0.6))
        loss = last + (first - last) * float(np.exp(-8 * step / num_steps))
        made.append(
            {
                "step": step,
                "train_loss": loss + float(rng.normal()) / 20,
                "grad_norm": float(rng.uniform(0.1, 9)),
                "spike": 0.0,
                "learning_rate_factor": 1 - step / num_steps,
                "tokens": 300_000 * step,
                "time_s": (made[-1]["time_s"] if made else 0.0) + seconds,
                "step_time_s": seconds,
                "tokens_per_s": 300_000 / seconds,
            }
        )
        if step % 10 == 0:
            made[-1]["val_loss"] = loss
    return made


def write(folder, made, tokenizer="gpt2", **config):
    """A run's folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in made))
    config = {"preset": "speedrun", "tokenizer": tokenizer, **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(CIRCUMSTANCES))
    (folder / "log.txt").write_text("run: x\nparameters: 275,742,772\nstep 1/9 | ...\n")
    return folder


def drawn(folders, x, y):
    axes = Figure().subplots()
    draw(axes, [read_run(folder, folder.name) for folder in folders], x, y)
    return axes


def failure(capsys, *arguments):
    """The sentence with which the command refuses its arguments."""
    assert report.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err.strip()


# Curves


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
    assert report.report([folder], tmp_path / "out")


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
    assert len(set(curves.LOOKS)) == 18


def test_the_trainers_picture_lies_in_the_runs_folder(tmp_path):
    folder = write(tmp_path / "run", records(50))
    assert loss_png(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_long_run_some_points_are_drawn_and_its_extremes_among_them(tmp_path):
    step = np.arange(1, 30_001)
    loss = 3 + 8 / step**0.5 + np.random.default_rng(0).normal(size=step.size) / 10
    loss[12_345], loss[23_456] = 9.0, 0.5
    line = '{{"step": {}, "tokens": {}, "train_loss": {!r}, "time_s": {}, "grad_norm": 1.0}}\n'
    folder = write(tmp_path / "run", [])
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(
            line.format(s, 1000 * s, y, s / 10) for s, y in zip(step, loss.tolist(), strict=True)
        )
    raw, median = drawn([folder], "step", "train_loss").lines
    for each in (raw, median):
        assert len(each.get_xdata()) <= 800
        assert set(np.diff(each.get_xdata()) > 0) == {True}
        assert each.get_xdata()[0] == 1 and each.get_xdata()[-1] == 30_000
    np.testing.assert_array_equal(raw.get_ydata(), loss[raw.get_xdata().astype(int) - 1])
    assert {12_346, 23_457} <= set(raw.get_xdata())
    for file in report.report([folder], tmp_path):
        assert file.stat().st_size < 300_000


# The page


class Page(HTMLParser):
    """What a browser would load, and run, and the text of the table's cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")

    @property
    def table(self):
        return {name: [cell.strip() for cell in cells] for name, *cells in self.rows}


def page(*folders):
    """The page without its panels, which take longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PANELS", ())
        return Page(report.page([read_run(folder, folder.name) for folder in folders]))


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    folder = write(tmp_path / "run", records(50))
    text = report.page([read_run(folder, "run")])
    parsed = Page(text)
    assert parsed.tags.count("svg") == 6
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "{{" not in text


def test_names_and_settings_are_escaped(tmp_path):
    name = '<script>alert("1") && "{{panels}}"'
    made = records(20)
    folders = [
        write(tmp_path / name, made, **{"note<b>": "<img src=x onerror=alert(1)>"}),
        write(tmp_path / "other", made, **{"note<b>": "&amp;"}),
    ]
    text = report.page([read_run(folder, folder.name) for folder in folders])
    parsed = Page(text)
    assert not {"script", "img", "b"} & set(parsed.tags)
    assert parsed.tags.count("svg") == 6
    assert any(name in cell for cell in parsed.rows[0])
    assert parsed.table["note<b>"] == ["<img src=x onerror=alert(1)>", "&amp;"]


def test_the_table_tells_what_the_files_say(tmp_path):
    made = records(40)
    made[-1] |= {"train_loss": 3.21987, "val_loss": 3.27811, "time_s": 20.0}
    early = records(35)
    early[29]["val_loss"] = 4.5
    whole = write(tmp_path / "whole", made, num_steps=40)
    part = write(tmp_path / "part", early, num_steps=2160)
    (part / "run.json").write_text(json.dumps(CIRCUMSTANCES | {"accelerators": []}))
    (part / "log.txt").unlink()
    table = page(whole, part).table
    assert table["preset"] == ["speedrun", "speedrun"]
    assert table["parameters"] == ["275,742,772", "unknown"]
    assert table["steps"] == ["40 of 40", "35 of 2,160"]
    assert table["tokens"] == ["12,000,000", "10,500,000"]
    assert table["training loss"] == ["3.2199", f"{early[-1]['train_loss']:.4f}"]
    assert table["validation loss"] == ["3.2781", "4.5000 at step 30"]
    assert table["training time"] == ["20.0 s", f"{early[-1]['time_s']:.1f} s"]
    assert table["tokens per second"] == ["600,000", f"{10.5e6 / early[-1]['time_s']:,.0f}"]
    assert table["hardware"] == ["8 x NVIDIA H200", "2 x AMD EPYC"]
    assert table["commit"] == ["bea878c"] * 2
    assert table["date"] == ["2026-11-22 19:42:06 UTC"] * 2


def test_only_the_settings_that_differ_are_shown(tmp_path):
    made, stage = records(20), {"share": 1.0, "rate": 1.0}
    same = {"seed": 0, "model": {"width": 768, "windows": [8, 0]}}
    a = write(tmp_path / "a", made, **same, run_name="a", stages=[stage], learning_rate=0.1)
    b = write(tmp_path / "b", made, **same, run_name="b", stages=[stage, stage | {"rate": 2}])
    rows = list(page(a, b).table.items())
    names = [name for name, _ in rows]
    assert dict(rows[names.index("Settings that differ") + 1 :]) == {
        "learning_rate": ["0.1", "—"],
        "stages.2.share": ["—", "1.0"],
        "stages.2.rate": ["—", "2"],
    }
    (b / "config.json").write_bytes((a / "config.json").read_bytes())
    assert list(page(a, b).table)[-1] == "No settings differ"
    assert list(page(a).table)[-1] == "date"


def test_text_of_ones_own_is_shown_instead_of_the_shards_made_of_it(tmp_path):
    shards = {"train_files": "cache/x", "val_files": "cache/y"}
    a = write(tmp_path / "a", records(20), **shards, data=["notes", "b.txt"])
    b = write(tmp_path / "b", records(20), train_files="t", val_files="v", data=[])
    rows = list(page(a, b).table.items())
    names = [name for name, _ in rows]
    assert dict(rows[names.index("Settings that differ") + 1 :]) == {
        "data": ["notes, b.txt", "none"],
        "train_files": ["—", "t"],
        "val_files": ["—", "v"],
    }


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write(tmp_path / place / "run", records(20)) for place in ("here", "there")]
    report.report([*folders, folders[0]], tmp_path / "x.html")
    names = Page((tmp_path / "x.html").read_text()).rows[0][1:]
    assert [name.split()[-1] for name in names] == ["here/run", "there/run"]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_fits_a_phone_and_asks_for_nothing(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` has Playwright")
    names = ["a" * 80, "b", "c", "d"]
    folders = [write(tmp_path / "runs" / name, records(50), x=name) for name in names]
    _, file = report.report(folders, tmp_path)
    told = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            size = {"width": 360, "height": 740}
            tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            tab.on("request", lambda request: told.append(request.url))
            tab.on("console", lambda message: told.append(message.text))
            tab.goto(file.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == 360
            ink, behind = tab.evaluate(
                """() => [getComputedStyle(document.querySelector("svg text")).fill,
                          getComputedStyle(document.querySelector("svg")).backgroundColor]"""
            )
            brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, behind)]
            assert (brightness[0] > 600 > 150 > brightness[1]) == (scheme == "dark")
            assert abs(brightness[0] - brightness[1]) > 450
        browser.close()
    assert [url for url in told if not url.startswith("data:")] == [file.as_uri()] * 2


# Where it is written, and what cannot be drawn


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
    monkeypatch.setattr(report, "PANELS", ())  # they take longest
    write(Path("runs/a"), records(20))
    assert report.main(["runs/a", *out]) == 0
    assert capsys.readouterr().out.split() == made
    for name in made:
        start = b"\x89PNG" if name.endswith("png") else b"<!doctype html>"
        assert Path(name).read_bytes().startswith(start)


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    said = failure(capsys, write(tmp_path / "a", records(20)), "--out", tmp_path / "file/x.png")
    assert re.fullmatch(r".*file/x\.png cannot be written \(.+\): choose another place.*\.", said)


def test_a_folder_that_is_no_runs_is_named(tmp_path, capsys):
    said = failure(capsys, tmp_path / "none")
    assert "none cannot be read (No such file or directory): name the folders of runs" in said
    assert f"{tmp_path} is no run: name the folders of runs" in failure(capsys, tmp_path)
    assert failure(capsys) == "There is nothing to draw: name runs, runs/<name>."


def test_a_run_without_numbers_is_told_from_one_that_cannot_be_read(tmp_path, capsys):
    folder = write(tmp_path / "run", [])
    assert "has no numbers yet: wait" in failure(capsys, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_l')
    assert "has no numbers yet: wait" in failure(capsys, folder)


def test_all_of_a_folder_can_be_drawn_whatever_else_lies_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("runs/a"), records(20))
    write(Path("runs/begun"), [])
    Path("runs/notes").mkdir()
    for _ in range(2):  # the second time the first report is among them
        assert report.main([str(place) for place in sorted(Path("runs").iterdir())]) == 0
        output = capsys.readouterr()
        assert output.out == "runs/report.png\nruns/report.html\n"
    told = output.err.splitlines()
    assert all(line.startswith("Left out: ") for line in told)
    assert [re.search(r"runs/(\S+)", line)[1] for line in told] == [
        *("begun/metrics.jsonl", "notes", "report.html", "report.png")
    ]
    names = Page(Path("runs/report.html").read_text()).rows[0][1:]
    assert [name.split()[-1] for name in names] == ["a"]
    assert report.main(["runs/a", "runs/b"]) == 2  # a name that was mistyped is not passed over


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"step": 3, "tra', " is not valid JSON (Unterminated"),
        ("[3]", " must be an object, not [3]"),
        ('{"step": "three"}', ': step must be an integer, not "three"'),
        ('{"step": 3, "tokens": null}', ": tokens must be an integer, not null"),
        ("{}", ": step is missing"),
        ("", " is not valid JSON (empty)"),
        ("\0\0", " is not valid JSON (Expecting value"),
        ("[" * 10_000, " is not valid JSON (nested too deeply)"),
    ],
)
def test_a_broken_line_is_named_but_the_last_one_is_not_read(tmp_path, capsys, line, told):
    folder = write(tmp_path / "run", records(4))
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, line]))
    np.testing.assert_array_equal(read_run(folder, "run").metrics["step"], [1, 2, 3, 4])
    metrics.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    said = failure(capsys, folder)
    assert f"{metrics}, line 3{told}" in said and said.endswith(": repair it or take it out.")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "must be an object, not [1]"),
        ('{"a"', "is not valid JSON"),
        ("7", "must be an object, not 7"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, capsys, text, told):
    folder = write(tmp_path / "run", records(4))
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'} {told}" in failure(capsys, folder)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("run.json", {"hardware": []}, "hardware must be a string, not []"),
        ("run.json", {"accelerators": "8 x H200"}, 'accelerators must be a list, not "8 x H200"'),
        ("run.json", {"date": 2026}, "date must be a string, not 2026"),
        ("config.json", {"num_steps": "9"}, 'num_steps must be an integer, not "9"'),
        ("config.json", {"data": {}}, "data must be a list, not {}"),
    ],
)
def test_a_field_that_is_not_as_declared_is_named(tmp_path, capsys, name, change, told):
    file = write(tmp_path / "run", records(4)) / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    said = failure(capsys, file.parent)
    assert said == f"{file}: {told}: restore it or take it away."


def test_metrics_alone_are_enough(tmp_path):
    folder = write(tmp_path / "run", records(20))
    for name in ("config.json", "run.json", "log.txt"):
        (folder / name).unlink()
    table = page(folder).table
    assert table["preset"] == table["hardware"] == table["commit"] == ["unknown"]
    assert table["steps"] == ["20"]


def test_without_matplotlib_one_sentence_tells_how_to_get_it(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "run", records(20))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install -e ".[plot]"' in failure(capsys, folder)


def test_neither_pyplot_nor_jax_is_loaded_and_matplotlib_is_left_as_it_was(tmp_path):
    folder = write(tmp_path / "run", records(20))
    program = f"""if True:
        import sys, matplotlib
        before = dict(matplotlib.rcParams)
        from nanogpt.report import __main__ as report
        report.main([{str(folder)!r}])
        assert dict(matplotlib.rcParams) == before
        print(*sorted({{"matplotlib.pyplot", "jax"}} & set(sys.modules)), sep=",")
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(report.__file__).parents[2],
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[2:] == [""], done.stderr
