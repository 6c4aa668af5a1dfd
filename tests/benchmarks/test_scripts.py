"""Every script in benchmarks/: its --help appears at once, and its --tiny run works."""

import re
import subprocess
import sys
from importlib import import_module

import pytest

from benchmarks import results
from benchmarks.command import ROOT

SCRIPTS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").glob("*/*.py")
    if '__name__ == "__main__"' in file.read_text()
)
TINY = [
    name
    for name in SCRIPTS
    if "tiny: bool" in (ROOT / (name.replace(".", "/") + ".py")).read_text()
]
MAIN = '\n\nif __name__ == "__main__":\n    sys.exit(main())\n'
# Their tiny runs have their own tests, which check more than the one here.
TESTED_ELSEWHERE = {
    "benchmarks.compiled.scaling": "compiled/test_scaling.py",
    "benchmarks.cpu.depths": "cpu/test_depths.py",
    "benchmarks.cpu.tokenize_text": "cpu/test_tokenize_text.py",
    "benchmarks.cpu.width_transfer": "cpu/test_ablation.py",
    "benchmarks.gpu.first_light": "gpu/test_first_light.py",
    "benchmarks.gpu.step": "gpu/test_step.py",
    "benchmarks.gpu.against_pytorch": "gpu/test_against_pytorch.py",
    "benchmarks.reliability.soak": "reliability/test_soak.py",
}


def written():
    """Return the files that scripts may write, with their modification times."""
    places = (ROOT / "benchmarks" / "results", ROOT / "records", ROOT / "runs")
    paths = [path for place in places for path in place.rglob("*")]
    paths += (ROOT / "docs").glob("*.png")
    return {path: path.stat().st_mtime for path in paths}


def test_there_are_scripts_and_each_of_their_folders_says_what_it_is_for():
    assert len(SCRIPTS) >= 15
    for name in SCRIPTS:
        assert import_module(name.rpartition(".")[0]).__doc__.strip().endswith(".")


def test_help_says_how_to_use_a_script_without_loading_jax_and_measures_nothing():
    before, helps = written(), ["import sys", "from importlib import import_module as load"]
    for script in SCRIPTS:  # `python3 -m` one, and all others as well
        assert (ROOT / f"{script.replace('.', '/')}.py").read_text().endswith(MAIN)
        helps += ["try:", f"    load({script!r}).main(['--help'])", "except SystemExit as end:"]
        helps += ["    print('status', end.code, *{'jax', 'torch'} & {*sys.modules})"]
    command = [sys.executable, "-c", "\n".join(helps)]
    every = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    *texts, rest = every.stdout.split("status 0\n")
    command = [sys.executable, "-m", SCRIPTS[0], "--help"]
    one = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert (one.returncode, one.stdout) == (0, texts[0])
    assert every.stderr == one.stderr == rest == ""
    for script, text in zip(SCRIPTS, texts, strict=True):
        assert text.startswith(f"usage: python3 -m {script} ")
    assert written() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_a_mistake(script, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(script).main(["--no-such-option"])
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (2, "")
    assert f"python3 -m {script}" in printed.err


@pytest.mark.parametrize("script", [name for name in TINY if name not in TESTED_ELSEWHERE])
def test_a_tiny_run_saves_its_figures_or_names_what_to_install(
    script, forked, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    before = written()
    status, printed = import_module(script).main(["--tiny"]), capsys.readouterr()
    assert written() == before
    if status == 0:
        (file,) = tmp_path.iterdir()
        assert file.name.endswith("_tiny.json")
    else:
        assert (status, list(tmp_path.iterdir())) == (2, [])
        assert re.fullmatch(r"[^\n]*pip install [^\n]*\n", printed.err)


def test_the_other_tiny_runs_have_tests_of_their_own():
    for script, file in TESTED_ELSEWHERE.items():
        assert script in TINY
        text = (ROOT / "tests" / "benchmarks" / file).read_text()
        assert '"--tiny"' in text


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("cpu.forms", ["--rounds", "0"], "--rounds must be above 0, not 0."),
        ("cpu.ablation", ["--seeds", "-1"], "--seeds must be above 0, not -1."),
        ("cpu.ablation", ["--pieces", "no such"], "No piece has such a name; the pieces are"),
        ("cpu.sampling", ["--preset", "huge"], "There is no preset huge: choose from"),
        ("cpu.sampling", ["--context", "3"], "--context must be above"),
        ("cpu.tokenize_text", ["--megabytes", "0"], "--megabytes must be above 0"),
        ("cpu.against_nanogpt", ["--nanogpt", "docs"], "docs is not a checkout of nanoGPT"),
        ("gpu.first_light", ["--budget", "0"], "--budget must be from 60 to 86400 seconds, not 0"),
        ("gpu.first_light", ["--only", "heat"], "There is no section heat: choose from device,"),
        ("reliability.soak", ["--kills", "0"], "--kills must be above 0, not 0."),
        ("reliability.soak", ["--steps", "5"], "--steps must be 0 or at least"),
        ("gpu.step", [], 'pip install -e ".[cuda12]"'),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(script, arguments, told, capsys):
    assert import_module(f"benchmarks.{script}").main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("compiled.h200", 'pip install -e ".[gpu-compiler]"'),
        ("compiled.scaling", 'pip install -e ".[gpu-compiler]"'),
        ("gpu.torch_gpt2", "pip install torch"),
    ],
)
def test_a_script_names_the_package_that_it_lacks(script, told, monkeypatch, capsys):
    from benchmarks import command
    from benchmarks.gpu import torch_gpt2

    for module in (command, torch_gpt2):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert import_module(f"benchmarks.{script}").main([]) == 2
    assert told in capsys.readouterr().err
