"""The page shows what is in the runs' files, and needs no other file."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from nanogpt.report import page as module
from nanogpt.report.__main__ import report
from nanogpt.report.curves import read_run
from tests.report.test_curves import CIRCUMSTANCES, records, write


class Page(HTMLParser):
    """Collects what a browser would load and run, and the text of the table's cells."""

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
    """The page without its panels, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "panels_for", lambda runs: ())
        return Page(module.page([read_run(folder, folder.name) for folder in folders]))


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    folder = write(tmp_path / "run", records(50))
    text = module.page([read_run(folder, "run")])
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
    parsed = page(*folders)
    assert not {"script", "img", "b"} & set(parsed.tags)
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


def test_metrics_alone_are_enough(tmp_path):
    folder = write(tmp_path / "run", records(20))
    for name in ("config.json", "run.json", "log.txt"):
        (folder / name).unlink()
    table = page(folder).table
    assert table["preset"] == table["hardware"] == table["commit"] == ["unknown"]
    assert table["steps"] == ["20"]


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


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_fits_a_phone_and_asks_for_nothing(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `dev` has Playwright")
    names = ["a" * 80, "b", "c", "d"]
    folders = [write(tmp_path / "runs" / name, records(50), x=name) for name in names]
    [file] = report(folders, tmp_path / "report.html")
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
