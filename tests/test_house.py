"""The house rules, checked in the code: which modules may import which, and lengths."""

import ast
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
CODE = ROOT / "nanogpt/inference/pytorch"  # copied into exported models, and imported by none of us
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "nanogpt").rglob("*.py")
    if path.name != "__init__.py" and path.parent != CODE
}
# Packages from top to bottom: each imports itself and those in the rows below. Modules directly in
# nanogpt/ are plain data for all.
FLOORS = (
    {"report"},
    {"runs"},
    {"inference"},
    {"training"},
    {"data", "optim"},
    {"model"},
    {"devices"},
    {"adam", "checks", "command_line", "config", "files", "schedule", "sizes"},
)
TOUR = (
    "train_gpt.py",
    "nanogpt/model/gpt.py",
    "nanogpt/model/loss.py",
    "nanogpt/optim/muon.py",
    "nanogpt/data/batches.py",
    "nanogpt/training/step.py",
)


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def imports(path):
    """Return the modules that a file imports, except those for type checkers only."""
    waiting, found = [ast.parse(path.read_text(encoding="utf-8"))], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {node.module}
        if not is_for_type_checkers(node):
            waiting += ast.iter_child_nodes(node)
    return found


def room(module):
    return module.split(".")[1]


def floor(module):
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_room_and_those_below(module):
    for other in imports(MODULES[module]):
        assert other.split(".")[0] not in SCRIPTS, f"{module} imports the script {other}"
        assert other.split(".")[0] not in ("tests", "benchmarks")
        if other in MODULES:
            below = floor(other) > floor(module)
            plain = floor(module) == floor(other) == len(FLOORS) - 1
            assert below or plain or room(other) == room(module), f"{module} imports {other}"


def test_no_imports_go_in_a_circle():
    after = {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}
    done = set()
    while ready := {module for module, others in after.items() if others <= done} - done:
        done |= ready
    assert after.keys() - done == set()


@pytest.mark.parametrize("name", sorted(FLOORS[-1]))
def test_plain_data_is_loaded_without_jax(name):
    code = f"import sys, nanogpt.{name}; print(*{{'jax', 'flax', 'optax'}} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_model_knows_no_optimizer_the_data_no_device_and_the_step_no_console():
    def packages(module):
        """Return the packages that a module imports, directly or indirectly."""
        seen, waiting = set(), {module}
        while waiting:
            seen |= waiting
            files = [MODULES[each] for each in waiting & MODULES.keys()]
            waiting = set(chain.from_iterable(map(imports, files))) - seen
        return {name.removeprefix("nanogpt.").split(".")[0] for name in seen}

    for module in MODULES:
        if room(module) == "model":
            assert not packages(module) & {"optim", "optax"}
        if room(module) == "data":
            assert not packages(module) & {"devices", "jax", "jaxlib"}
    assert not packages("nanogpt.training.step") & {"rich", "runs", "tyro"}


def test_the_tour_can_be_read_in_an_evening():
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in TOUR}
    assert lines["train_gpt.py"] <= 500
    assert lines["nanogpt/model/gpt.py"] <= 330
    assert lines["nanogpt/model/loss.py"] <= 150
    assert sum(lines.values()) <= 1600, lines


def test_the_tour_is_told_in_the_readme_in_its_order():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = readme[readme.index("## Reading the code") :]
    places = [told.index(f"({name})") for name in TOUR]
    assert places == sorted(places)


def test_train_reads_as_a_story():
    tree = ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    (train,) = (node for node in tree.body if getattr(node, "name", None) == "train")
    assert train.end_lineno - train.lineno + 1 <= 80
    inner = (node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda))
    assert all(f is train or f.end_lineno - f.lineno + 1 <= 5 for f in inner)


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=str)
def test_every_room_says_in_a_sentence_what_it_is_for(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert text
    assert len(text.splitlines()) == 1
    if folder.name != "nanogpt":
        assert "skip" in text or "Read " in text  # says whether readers of the algorithm need it
