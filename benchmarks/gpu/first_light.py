"""The first minutes on a new GPU: all essential measurements, in one command.

    python3 -m benchmarks.gpu.first_light --budget 480

Sections run in order of importance, each in its own process with a time limit; time left over is
added to the next section's:

    device         device, driver and versions; rates of a large matmul and a large copy
    kernels        which attention kernels pass their probe, and their times at the presets' shapes
    steps          a step of `baseline` and of the longest stage of `speedrun`
    whole_run      60 steps of train_gpt.py: from launch to first step, cold and warm; rate; stalls
    pytorch        the step in PyTorch with torch.compile, and the ratio
    alternatives   one-pass loss, FP8 head, attention kernels, micro-batch sizes, Muon's share
    gpu_tests      the tests of attention and loss kernels that need a GPU
    curve          a loss curve, ours and PyTorch's, on the source code of installed packages

Every row is written to results/first_light_<device>_<date>.json and to a table beside it as soon as
it is measured: a section that fails or runs out of time is reported, and nothing is lost if the
command is interrupted. No network is needed. For "curve", set TIKTOKEN_CACHE_DIR to the folder with
GPT-2's vocabulary; docs/gpu.md lists what else to bring to a machine without a network.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import chain, count
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import results
from benchmarks.command import Mistake
from benchmarks.command import run as run_command
from benchmarks.cpu.python_sources import python_sources
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.sections import SECTIONS, Context, Rows, run
from benchmarks.gpu.sections.table import cell, markdown
from benchmarks.gpu.sides import one_gpu
from nanogpt.files import write_whole

BUDGET = 480


@dataclass(frozen=True)
class Options:
    """Measure as much as the time allows on one GPU, in order of importance."""

    budget: float = BUDGET
    """Time limit for all sections together, in seconds."""
    only: tuple[str, ...] = ()
    """Run only these sections after the first, in their usual order; none given: run all."""
    tiny: bool = False
    """Use sizes so small that a CPU takes seconds: to test this script, not to measure."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    return run_command(Options, measure, arguments)


def measure(options: Options) -> None:
    """Run the sections; all rows measured so far are on disk, however this ends."""
    if not 60 <= options.budget <= 86_400:
        raise Mistake(f"--budget must be from 60 to 86400 seconds, not {options.budget:g}.")
    if not os.access(results.FOLDER, os.W_OK):
        raise Mistake(f"{results.FOLDER} cannot be written: use a clone in another folder.")
    if unknown := set(options.only) - set(SECTIONS):
        raise Mistake(f"There is no section {min(unknown)}: choose from {', '.join(SECTIONS)}.")
    chosen = [name for name in SECTIONS if name in ("device", *(options.only or SECTIONS))]
    ends = [signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
        ends.remove(signal.SIGHUP)
    before = [signal.signal(end, lambda number, _: sys.exit(128 + number)) for end in ends]
    spawn = multiprocessing.get_context("spawn")
    text = spawn.Process(target=python_sources, args=(options.tiny,), daemon=True)
    if "curve" in chosen:  # prepare its text on the CPU in the meantime
        text.start()
    report, deadline = Report(options.tiny), time.monotonic()
    try:
        with TemporaryDirectory() as folder:
            for name in chosen:
                deadline += SECTIONS[name][1] * options.budget / BUDGET
                context = Context(options.tiny, deadline - time.monotonic(), report.rows)
                report.begin(name)
                report.end(name, in_a_process(name, context, report.record, Path(folder)))
    finally:
        for end, handler in zip(ends, before, strict=True):
            signal.signal(end, handler)
        if text.pid:
            text.kill()
        if any(report.rows.values()):
            report.write()
            print(f"\n{report.path}:\n\n{report.path.read_text()}", flush=True)


class Report:
    """All measurements so far, in memory and on disk."""

    def __init__(self, tiny: bool):
        self.rows: dict[str, Rows] = {}
        self._tiny, self._section = tiny, ""
        self._sections: dict[str, Figures] = {}
        self._found("unknown")

    def _found(self, device: str) -> None:
        """Name the files after the device; earlier ones of the same day are kept."""
        base = f"first_light_{re.sub(r'[^A-Za-z0-9]+', '_', device)}_{date.today()}"
        names = chain([base], (f"{base}_{number}" for number in count(2)))
        self._device, self._name = device, next(names)
        while self.path.exists():
            self._name = next(names)

    @property
    def path(self) -> Path:
        """The file of the table."""
        return results.FOLDER / f"{self._name}{'_tiny' if self._tiny else ''}.md"

    def begin(self, section: str) -> None:
        """Start a section, to which the next rows belong."""
        self._section, self._begun = section, time.monotonic()
        rows = self.rows[section] = {}
        self._sections[section] = {"seconds": 0.0, "ended": "cut off", "rows": rows}

    def record(self, row: str, figures: Figures) -> None:
        """Add and write a row; raises Mistake if it shows that there is no GPU."""
        if figures.get("platform") == "cpu" and not self._tiny:
            raise Mistake("JAX finds no GPU, only a CPU; to test the script here, use --tiny.")
        self.rows[self._section][row] = figures
        if row == "device" and "device" in figures:
            self._found(figures["device"])
        self._sections[self._section]["seconds"] = time.monotonic() - self._begun
        print(f"{self._section} | {row} | {figures.get('failed') or cell(figures)}", flush=True)
        self.write()

    def end(self, section: str, why: str | None) -> None:
        """End a section; `why` is the reason if it ended early."""
        seconds = time.monotonic() - self._begun
        self._sections[section] |= {"ended": why, "seconds": seconds}
        self.write()

    def write(self) -> None:
        """Write all measurements so far."""
        figures = {"device": self._device, "sections": self._sections}
        saved = results.save(self._name, figures, self._tiny, shown=False)
        write_whole(self.path, markdown(saved))


Record = Callable[[str, Figures], None]
Work = Callable[[str, Context, Record], None]


def in_a_process(
    section: str, context: Context, record: Record, folder: Path, work: Work = run
) -> str | None:
    """Run a section in its own process, recording its rows; return why it ended early, or None."""
    here, there = multiprocessing.Pipe(duplex=False)
    log, deadline = folder / f"{section}.log", time.monotonic() + context.seconds
    log.touch()
    target = multiprocessing.get_context("spawn").Process(
        target=become, args=(section, context, there, log, work)
    )
    target.start()
    there.close()
    try:
        while here.poll(max(0.0, deadline - time.monotonic())):
            record(*here.recv())
        why = f"Its time ran out after {context.seconds:.0f} s."
    except EOFError:
        target.join(10)
        if not target.exitcode:
            return None
        why = f"It ended with status {target.exitcode}."
    finally:
        kill(target)
    return "\n".join([why, *log.read_text(errors="replace").splitlines()[-30:]])


def become(section: str, context: Context, rows: Connection, log: Path, work: Work) -> None:
    """Run a section in this process, which leads a group, so that all it starts ends with it."""
    os.setsid()
    with log.open("w") as errors:
        os.dup2(errors.fileno(), 2)
    os.environ |= {
        **one_gpu(),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",  # as train_gpt.py does
        "TMPDIR": str(log.parent),
        "JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled"),
    }
    work(section, context, lambda row, figures: rows.send((row, figures)))


def kill(process: multiprocessing.process.BaseProcess) -> None:
    """Kill a process and all that it started."""
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it does not lead a group yet, or has ended
        process.kill()
    process.join()


if __name__ == "__main__":
    sys.exit(main())
