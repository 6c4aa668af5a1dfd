"""The project's consistency: documents name what exists, and all CI runs the same commands."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "records/README.md"]
PAGES += sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
TARGETS = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
# A path in one of our folders, or the name of a script; not a link's text, and not runs/<name>.
NAMED = re.compile(
    r"(?<![\w./~[-])(?:(?:nanogpt|tests|benchmarks|launch|docs|records)/[\w./-]*\w"
    r"|\w+\.(?:py|sh|sbatch))(?![\w*<]|:\d)"
)

of_each_page = pytest.mark.parametrize("page", [ROOT / page for page in PAGES], ids=PAGES)


def slug(heading):
    """Return GitHub's anchor for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Pages


@of_each_page
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    for path, anchor in links:
        file = page.parent / path if path else page
        assert file.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), f"{path}#{anchor}"


@of_each_page
def test_every_file_that_a_page_names_exists(page):
    for path in NAMED.findall(page.read_text()):
        assert (ROOT / path).exists(), path


@of_each_page
def test_every_module_that_a_page_runs_exists(page):
    for module in re.findall(r"python3? -m ((?:nanogpt|benchmarks)[\w.]*)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@of_each_page
def test_every_make_target_that_a_page_names_exists(page):
    named = re.findall(r"`make ([a-z]+)|^make ([a-z]+)(?: +#.*| ARGS=.*)?$", page.read_text(), re.M)
    assert {target for pair in named for target in pair if target} <= set(TARGETS)


def test_the_tour_is_the_same_in_the_readme_and_for_contributors():
    tour = [
        *("train_gpt.py", "nanogpt/model/gpt.py", "nanogpt/model/loss.py"),
        *("nanogpt/optim/muon.py", "nanogpt/data/batches.py", "nanogpt/training/step.py"),
    ]
    readme, contributing = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    assert re.findall(r"^\| \[.+?\]\((.+?\.py)\)", readme, re.M) == tour
    assert re.findall(r"^\d\. \[.+?\]\((.+?\.py)\)$", contributing, re.M) == tour


# Commands


def test_the_workflow_runs_the_commands_of_ci_run_on_the_oldest_and_a_newer_python():
    (job,) = WORKFLOW["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    lines = (ROOT / ".ci/run").read_text().splitlines()
    in_ci_run = [line.removesuffix(' "${second[@]}"') for line in lines]
    assert commands == [line for line in in_ci_run if re.match(r"make [a-z]+($| ARGS=)", line)]
    oldest, newer = job["strategy"]["matrix"]["python"]
    assert SETTINGS["project"]["requires-python"] == f">={oldest}"
    assert f"for python in python{newer} " in (ROOT / ".ci/run").read_text()


def test_hooks_have_the_version_of_ruff_that_lint_has():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (pinned,) = (it for it in SETTINGS["project"]["optional-dependencies"]["dev"] if "ruff" in it)
    assert [hook["additional_dependencies"] for hook in repo["hooks"]] == [[pinned]] * 2


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_trains_unless_it_is_told_otherwise_and_lists_its_targets():
    def make(*arguments):
        command = ["make", "--always-make", *arguments]
        # Without the settings of a make that runs the tests.
        told = re.compile("MAKE|(ARGS|PYTHON|VENV|ACCELERATOR)$")
        env = {name: value for name, value in os.environ.items() if not told.match(name)}
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    *_, last = make("--dry-run").splitlines()
    assert last.split()[1:] == ["train_gpt.py"]
    for target in TARGETS:
        assert "Nothing to be done" not in make("--dry-run", target)
        assert f"make {target} " in make("help")


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda script: script.name)
def test_a_script_started_by_a_python_without_the_packages_says_what_to_run(script):
    bare = [sys.executable, "-S", str(script)]  # -S: without what is installed
    done = subprocess.run(bare, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2
    assert re.fullmatch(
        r"This Python \(.+\) does not have .*tyro\. Run `.+` first\.\n", done.stderr
    )
