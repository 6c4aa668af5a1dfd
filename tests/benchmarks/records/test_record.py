"""Records: which runs qualify, the t-test against closed forms and tables, and the folder."""

import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import train_gpt
from benchmarks.records import check, record
from benchmarks.records.check import End, RecordError, statistics
from nanogpt.runs.environment import environment

CIRCUMSTANCES = environment() | {
    "command": "python train_gpt.py --preset speedrun --seed 0",
    "date": "2026-11-22T10:00:00+00:00",
    "commit": "1234567",
    "hardware": "32 x Some CPU",
    "accelerators": ["8 x NVIDIA H200"],
}
LOSSES = (3.2779, 3.2761, 3.2784)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder for runs/ and records/, and a console that does not wrap lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("records").mkdir()


def make_run(name, seed=0, val_loss=3.277, steps=4, *, environment=(), metrics=None, **settings):
    """Write runs/<name> as train_gpt.py would after this many steps."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    config = asdict(train_gpt.PRESETS["speedrun"]) | {
        "num_steps": 4,
        "seed": seed,
        "momentum": 0.95,
    }
    config |= {"run_name": name, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(CIRCUMSTANCES | dict(environment)))
    (folder / "log.txt").write_text(f"the log of {name}\n")
    if metrics is None:
        lines = [
            {"step": s, "train_loss": 4.0, "tokens": 524_288 * s, "time_s": 10.0 * s + seed}
            for s in range(1, steps + 1)
        ]
        lines[1]["val_loss"] = 5.0
        lines[-1]["val_loss"] = val_loss
        metrics = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


@pytest.fixture
def runs():
    """Three runs that qualify as a record."""
    return [make_run(f"r{seed}", seed, loss) for seed, loss in enumerate(LOSSES)]


def make_record(*runs, folder="records/some"):
    return record.main([folder, *map(str, runs), "--description", "Something new."])


def refusal(capsys, *runs, folder="records/some"):
    """Return record.py's message for runs that do not qualify; it must write nothing."""
    before = sorted(Path("records").rglob("*"))
    assert make_record(*runs, folder=folder) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"[^\n]+\.\n", output.err)
    assert sorted(Path("records").rglob("*")) == before
    return output.err


def ends(losses):
    return [End(f"r{i}", 4, 4, loss, 1.0 + i) for i, loss in enumerate(losses)]


def t(losses, target):
    """Student's t, written out."""
    n, mean = len(losses), sum(losses) / len(losses)
    sd = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (n - 1))
    return (mean - target) / (sd / math.sqrt(n)), mean, sd


# The test


@pytest.mark.parametrize("target", [3.28, 3.2775, 3.27])
def test_p_of_three_runs_is_that_of_the_closed_form_for_two_degrees_of_freedom(target):
    value, mean, sd = t(LOSSES, target)
    found = statistics(ends(LOSSES), target)
    assert (found.n, found.mean, found.sd) == pytest.approx((3, mean, sd), rel=1e-9)
    assert found.p == pytest.approx(0.5 + value / (2 * math.sqrt(2 + value**2)), rel=1e-6)


def test_p_of_two_runs_is_that_of_a_cauchy_distribution():
    losses = (3.275, 3.276)
    value, _, _ = t(losses, 3.28)
    assert statistics(ends(losses), 3.28).p == pytest.approx(
        0.5 + math.atan(value) / math.pi, rel=1e-6
    )


@pytest.mark.parametrize(
    # Critical values of t at p = 0.01, one-sided, from tables.
    ("n", "critical"),
    [(4, 4.541), (5, 3.747), (10, 2.821), (21, 2.528)],
)
def test_at_the_critical_value_of_the_tables_p_is_one_percent(n, critical):
    deviations = [i - (n - 1) / 2 for i in range(n)]
    _, _, sd = t(deviations, 0)
    losses = [3.28 + d - critical * sd / math.sqrt(n) for d in deviations]
    assert statistics(ends(losses), 3.28).p == pytest.approx(0.01, rel=2e-3)


def test_a_single_run_has_a_mean_but_no_p():
    found = statistics(ends([3.2]), 3.28)
    assert (found.n, found.mean) == (1, 3.2)
    assert math.isnan(found.sd) and math.isnan(found.p)


def test_runs_that_all_end_alike_or_stop_at_different_steps_are_not_tested():
    with pytest.raises(RecordError, match=r"same validation loss, 3\.27, .* its own seed"):
        statistics(ends([3.27, 3.27]), 3.28)
    early = End("early", 3, 3, 3.271, 1.0)
    with pytest.raises(RecordError, match="r0 stops at step 4 and early at step 3"):
        statistics([*ends([3.27]), early], 3.28)


# benchmarks.records.check


def test_the_table_shows_each_run_and_the_line_below_it_the_statistics(runs, capsys):
    # By hand: t = (3.277467 - 3.28) / (0.001210 / √3) = -3.627, p = 1/2 - 3.627 / (2 √15.16).
    assert check.main([*map(str, runs)]) == 1
    printed = capsys.readouterr().out
    for run, loss, time in zip(runs, LOSSES, ("40.0 s", "41.0 s", "42.0 s"), strict=True):
        assert re.search(rf"{run.name} .* 4 .* 2,097,152 .* {loss} .* {time}", printed)
    assert printed.endswith(
        "n = 3, mean 3.27747, standard deviation 0.00121, p = 0.034. "
        "That the mean is at most 3.28 is not shown at p < 0.01.\n"
    )


def test_the_exit_status_says_whether_p_is_below_one_percent(runs, capsys):
    assert check.main([*map(str, runs), "--target", "3.282"]) == 1  # p = 0.0115
    assert check.main([*map(str, runs), "--target", "3.283"]) == 0  # p = 0.0078
    assert "at most 3.283 is shown" in capsys.readouterr().out
    assert check.main([*map(str, runs), "--target", "3.2"]) == 1


def test_one_run_is_shown_and_proves_nothing(runs, capsys):
    assert check.main([str(runs[0]), "--target", "9"]) == 1
    assert "A p-value needs at least two runs" in capsys.readouterr().out


def test_runs_are_named_by_folder_by_the_folder_of_all_or_by_their_metrics(runs, capsys):
    printed = []
    for logs in (runs, ["runs"], [run / "metrics.jsonl" for run in runs], [runs[0], *runs[1:]]):
        check.main([*map(str, logs)])
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1


def test_metrics_alone_do_without_the_other_files(runs, capsys):
    for run in runs:
        for name in ("config.json", "log.txt", "run.json"):
            (run / name).unlink()
    assert check.main(["runs", "--target", "3.3"]) == 0


@pytest.mark.parametrize(
    ("logs", "told"),
    [
        ([], "no runs to test"),
        (["nowhere"], "nowhere contains no run"),
        (["records"], "records contains no run"),
        (["runs/r0", "runs/r0/metrics.jsonl"], "r0 and r0 are one run"),
        (["runs", "copy-of-r1"], "r1 and copy-of-r1 are one run"),
    ],
)
def test_logs_that_hold_no_run_or_one_twice_are_told_in_one_sentence(runs, capsys, logs, told):
    shutil.copytree(runs[1], "copy-of-r1")
    assert check.main(logs) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(rf"[^\n]*{told}[^\n]*\.\n", output.err)


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ("", "The last line of"),
        ('{"step": 4, "val_lo', "The last line of"),
        ("[4]\n", "The last line of"),
        ('{"step": 4, "val_loss": 3.2, "tokens": 4}\n', "The last line of"),
        ('{"step": 3, "val_loss": 3.2, "tokens": 4, "time_s": 1}\n', "ends at step 3 of 4"),
        ('{"step": 5, "val_loss": 3.2, "tokens": 4, "time_s": 1}\n', "ends at step 5 of 4"),
        ('{"step": 4, "tokens": 4, "time_s": 1}\n', "no validation loss at its last step, 4"),
        (
            '{"step": 4, "val_loss": NaN, "tokens": 4, "time_s": 1}\n',
            "no validation loss at its last step, 4",
        ),
    ],
)
def test_a_run_that_did_not_come_to_its_end_is_told_by_both_programs(runs, capsys, metrics, told):
    run = make_run("broken", 7, metrics=metrics)
    for program in (lambda: check.main(["runs"]), lambda: make_record(*runs, run)):
        assert program() == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch(rf"[^\n]*{told}[^\n]*\.\n", output.err)
        assert "runs/broken/metrics.jsonl" in output.err


# benchmarks.records.record


@pytest.fixture
def good_runs():
    """Four runs with p = 0.0077: mean 3.277, sd 0.001155, t = -5.196 with 3 degrees of freedom."""
    losses = (3.276, 3.276, 3.278, 3.278)
    return [make_run(f"r{seed}", seed, loss) for seed, loss in enumerate(losses)]


def test_a_record_holds_what_each_run_logged_byte_for_byte(good_runs):
    assert make_record(*good_runs) == 0
    made = {str(path.relative_to("records")) for path in Path("records").rglob("*.*")}
    names = ("config.json", "run.json", "log.txt", "metrics.jsonl")
    assert made == {"some/README.md"} | {f"some/seed-{i}/{x}" for i in range(4) for x in names}
    for seed, run in enumerate(good_runs):
        for name in names:
            copy = Path("records/some", f"seed-{seed}", name)
            assert copy.read_bytes() == (run / name).read_bytes()


def test_the_page_of_a_record_tells_runs_statistics_and_how_to_repeat_it(good_runs):
    assert make_record(*reversed(good_runs)) == 0
    page = Path("records/some/README.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert table[2:] == [
        "| 0 | 3.2760 | 40.0 s | 4 | 2,097,152 |",
        "| 1 | 3.2760 | 41.0 s | 4 | 2,097,152 |",
        "| 2 | 3.2780 | 42.0 s | 4 | 2,097,152 |",
        "| 3 | 3.2780 | 43.0 s | 4 | 2,097,152 |",
    ]
    # p by the closed form for 3 degrees of freedom: 1/2 - (x / (1 + x²) + atan x) / π, x = |t| / √3
    x = 5.19615 / math.sqrt(3)
    p = 0.5 - (x / (1 + x**2) + math.atan(x)) / math.pi
    for told in (
        "# some\n\nSomething new.\n",
        "41.5 s of training on 8 x NVIDIA H200",
        f"n = 4, mean 3.27700, standard deviation 0.00115, p = {p:.2g}.",
        "10,485,760 tokens",
        4 * "python train_gpt.py --preset speedrun --seed 0\n",
        "commit: 1234567",
        "processors: 32 x Some CPU",
        f"python {CIRCUMSTANCES['python']}, jax {CIRCUMSTANCES['jax']}",
        f"numpy {CIRCUMSTANCES['numpy']}",
    ):
        assert told in page


def test_the_line_for_the_history_has_the_mean_time_and_the_date_of_the_last_run(good_runs, capsys):
    later = CIRCUMSTANCES | {"date": "2026-11-23T01:00:00+00:00"}
    (good_runs[1] / "run.json").write_text(json.dumps(later))
    assert make_record(*good_runs) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| 8 x NVIDIA H200 | 41.5 s | [Something new.](records/some/README.md) | 2026-11-23 |"
    )


def test_a_record_can_be_tested_again_and_gives_the_same_statistics(good_runs, capsys):
    assert make_record(*good_runs) == 0
    made = capsys.readouterr().out.splitlines()[0]
    assert check.main(["records/some"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == made


def test_without_accelerators_the_processors_are_the_hardware(capsys):
    on_cpu = {"accelerators": []}
    runs = [make_run(f"c{i}", i, 3.2 + 0.001 * i, environment=on_cpu) for i in range(3)]
    assert make_record(*runs) == 0
    assert "| 32 x Some CPU | 41.0 s |" in capsys.readouterr().out


def test_runs_whose_mean_is_not_shown_to_be_low_enough_make_no_record(runs, capsys):
    assert "not shown at p < 0.01" in refusal(capsys, *runs)
    assert "A p-value needs at least two runs" in refusal(capsys, runs[0])
    assert "give their folders" in refusal(capsys)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"val_tokens": 1_048_576}, "runs/odd validates on 1048576 tokens"),
        ({"val_files": "data/val_*.bin"}, r"runs/odd has data/val_\*.bin for val_files"),
        ({"val_files": None, "train_files": None}, "runs/odd has None for train_files"),
        ({"train_files": "a/fineweb_val_*.bin"}, r"fineweb_val_\*.bin for train_files"),
        ({"shuffle": True}, "runs/odd shuffles"),
        ({"environment": {"commit": "1234567-dirty"}}, "runs/odd .*commit 1234567-dirty"),
        ({"environment": {"commit": "unknown"}}, "runs/odd .*commit unknown"),
    ],
)
def test_runs_that_break_a_rule_are_refused_even_when_they_all_do(
    good_runs, capsys, settings, told
):
    odd = make_run("odd", 9, **settings)
    assert re.search(told, refusal(capsys, *good_runs, odd))
    alike = [make_run(f"odd{i}", i, 3.27 + 0.001 * i, **settings) for i in range(4)]
    refusal(capsys, *alike)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"momentum": 0.9}, "runs/r0 and runs/odd differ in momentum, 0.95 and 0.9"),
        ({"num_steps": 3, "steps": 3}, "differ in num_steps, 4 and 3"),
        ({"model": {"width": 512}}, "runs/r0 and runs/odd differ in model."),
        ({"new_setting": 1}, "differ in new_setting, None and 1"),
        ({"environment": {"commit": "7654321"}}, "differ in commit, 1234567 and 7654321"),
        ({"environment": {"jax": "0.0.1"}}, "differ in jax, "),
        ({"environment": {"accelerators": ["4 x NVIDIA H200"]}}, "differ in accelerators, "),
        ({"seed": 2}, "runs/r2 and runs/odd have the same seed, 2"),
    ],
)
def test_runs_that_differ_in_more_than_their_seed_are_refused(good_runs, capsys, settings, told):
    odd = make_run("odd", **{"seed": 9} | settings)
    assert told in refusal(capsys, *good_runs, odd)


@pytest.mark.parametrize("name", ["config.json", "run.json", "log.txt", "metrics.jsonl"])
def test_a_run_without_one_of_its_files_is_refused(good_runs, capsys, name):
    (good_runs[3] / name).unlink()
    assert refusal(capsys, *good_runs).startswith(f"runs/r3 has no {name}")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.json", "{", " is not valid JSON"),
        ("config.json", "[]", " must be an object, not []: give"),
        ("config.json", "{}", ": model is missing: give a run"),
        ("run.json", '{"command": "a"}', ": date is missing"),
    ],
)
def test_a_file_that_is_not_what_a_run_writes_is_named(good_runs, capsys, name, text, told):
    (good_runs[3] / name).write_text(text)
    assert refusal(capsys, *good_runs).startswith(f"runs/r3/{name}{told}")


def test_a_folder_that_exists_is_left_as_it_is(good_runs, capsys):
    Path("records/some").mkdir()
    assert "records/some already exists" in refusal(capsys, *good_runs)


def test_a_folder_that_cannot_be_made_whole_is_not_made_at_all(good_runs, capsys, monkeypatch):
    assert "cannot be written (No such file" in refusal(capsys, *good_runs, folder="no/where/some")
    copy, copied = shutil.copyfile, []

    def full_after_five(source, target):
        if len(copied) == 5:
            raise OSError(28, "No space left on device")
        copied.append(copy(source, target))

    monkeypatch.setattr(shutil, "copyfile", full_after_five)
    assert "cannot be written (No space left on device)" in refusal(capsys, *good_runs)
    assert len(copied) == 5


def test_the_rules_are_those_of_the_speedrun_preset():
    hp = train_gpt.PRESETS["speedrun"]
    assert hp.val_tokens == record.VAL_TOKENS == 20 * 2**19
    assert asdict(hp).keys() >= record.Settings.__annotations__.keys()
    assert set(environment()) == record.Circumstances.__annotations__.keys()
