"""The tests that need a GPU, which compare attention and loss kernels with their references."""

import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

from benchmarks import processes
from benchmarks.command import ROOT
from benchmarks.gpu.rows import Figures, Unmeasured
from benchmarks.gpu.sections import Context, Job

FILES = {
    "attention": ("tests/model/kernels/test_flash_attention.py", "tests/model/test_attention.py"),
    "loss": ("tests/model/test_loss.py",),
}
ON_A_GPU = "on_a_gpu"  # in the names of these tests


def jobs(context: Context) -> Iterator[Job]:
    """Yield the tests of each kind of kernel."""
    for kind, files in FILES.items():
        yield f"tests of {kind} kernels", partial(measure, files, context.tiny)


def measure(files: tuple[str, ...], tiny: bool) -> Figures:
    """Run the tests; return how many pass and are skipped, and the names of those that fail."""
    if not find_spec("pytest"):
        raise Unmeasured("The tests need pytest: pip install pytest")
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-k", ON_A_GPU]
    platform = {} if tiny else {"JAX_PLATFORMS": "cuda,cpu"}
    process = processes.Watched([*command, *files], ROOT, platform)
    process.end()
    return results(process.output)


def results(output: str) -> Figures:
    """Read pytest's lines, one per test; if it was killed, those printed until then."""
    found = re.findall(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)", output, re.M)
    count = {kind: sum(was == kind for _, was in found) for kind in ("PASSED", "FAILED", "SKIPPED")}
    if not found:
        raise Unmeasured(f"pytest ran no test: {' '.join(output.splitlines()[-3:])}")
    failures = [name for name, was in found if was in ("FAILED", "ERROR")]
    return {"passed": count["PASSED"], "skipped": count["SKIPPED"], "failures": failures}
