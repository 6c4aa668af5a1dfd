"""The sections of first_light.py, each measured row by row in its own process."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu.rows import Figures, attempt

Rows = dict[str, Figures]
Job = tuple[str, Callable[[], Figures]]  # a row, and the function to measure it

# By module, in order of importance: what it measures, and its share of a budget of 480 s.
SECTIONS = {
    "device": ("device and rates", 40),
    "kernels": ("attention kernels", 55),
    "steps": ("one training step", 85),
    "whole_run": ("train_gpt.py", 90),
    "pytorch": ("PyTorch", 60),
    "alternatives": ("other kernels and sizes", 70),
    "gpu_tests": ("tests on the GPU", 40),
    "curve": ("loss curve", 40),
}


@dataclass(frozen=True)
class Context:
    """What a section is given."""

    tiny: bool
    seconds: float
    """Its time limit."""
    earlier: dict[str, Rows]
    """Measurements of earlier sections."""

    def row(self, section: str, name: str) -> Figures:
        """Return a row of an earlier section; empty if it was not measured."""
        return self.earlier.get(section, {}).get(name, {})


def run(section: str, context: Context, record: Callable[[str, Figures], None]) -> None:
    """Measure a section's rows, and record each as soon as it is measured."""
    jobs: Callable[[Context], Iterable[Job]] = import_module(f"{__name__}.{section}").jobs
    for row, measure in jobs(context):
        record(row, attempt(measure))
