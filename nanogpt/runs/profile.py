"""A profile of a few steps: a trace to view, and a table of the costliest operations.

runs/<name>/profile/ops.txt                                the table
                    plugins/profile/<time>/                the trace, for
                        perfetto_trace.json.gz             https://ui.perfetto.dev
                        *.xplane.pb                        XProf: `tensorboard --logdir <profile>`

JAX is imported only where it is needed, so that errors in the arguments appear at once.
"""

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from nanogpt.checks import ConfigError

if TYPE_CHECKING:
    from jax.profiler import ProfileData
    from jax.stages import Compiled

    from nanogpt.runs.progress import Progress
    from nanogpt.training.step import TrainState

COSTLIEST = 10  # operations in the table
CONTROL_FLOW = re.compile(r"(while|conditional|call)(\.\d+)?")  # their time is counted elsewhere


def steps_of(profile: str | None, first: int, last: int) -> range:
    """Return the steps to profile: "10:13" for 10 to 13, None for none.

    Raises ConfigError unless they are among the steps `first` to `last` of this run.
    """
    if profile is None:
        return range(0)
    given = re.fullmatch(r"(\d+):(\d+)", profile)
    begin, end = map(int, given.groups()) if given else (0, 0)
    if not first <= begin <= end <= last:
        raise ConfigError(
            f"profile must be FIRST:LAST within steps {first} to {last}, e.g. "
            f"{first}:{min(first + 3, last)}, not {profile}."
        )
    return range(begin, end + 1)


class Trace:
    """Traces some steps of a run.

    It waits for the device before the first step and after the last, so that the trace has whole
    steps; between them nothing waits. If the run ends early, the steps so far are written. A trace
    that fails only causes a warning.
    """

    def __init__(self, folder: Path, steps: range, say: Callable[[str], None]):
        """Files are written to `folder`; `say` reports them."""
        self.folder, self.steps, self.say = folder, steps, say
        self._running = False
        self._traced: list[int] = []
        self._programs: set[Compiled] = set()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._running:
            self._write()

    def begin(
        self, step: int, program: "Compiled", state: "TrainState", progress: "Progress"
    ) -> None:
        """Start tracing this step, before `program` runs on `state`, if it is to be traced."""
        import jax

        if step not in self.steps:
            return
        if step == self.steps[0]:
            jax.block_until_ready(state)
            before = time.perf_counter()
            self._start()
            progress.spent(time.perf_counter() - before, "profile")
        if self._running:
            self._traced.append(step)
            self._programs.add(program)
            self._step = jax.profiler.StepTraceAnnotation("step", step_num=step)
            self._step.__enter__()

    def end(self, step: int, state: "TrainState", progress: "Progress") -> None:
        """End this dispatched step, which returns `state`; after the last, write the trace."""
        import jax

        if not self._running:
            return
        self._step.__exit__(None, None, None)
        if step == self.steps[-1]:
            jax.block_until_ready(state)
            before = time.perf_counter()
            self._write()
            progress.spent(time.perf_counter() - before, "profile")

    def _start(self) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing Python calls is slow and clutters the trace
        try:
            jax.profiler.start_trace(
                self.folder, create_perfetto_trace=True, profiler_options=options
            )
            self._running = True
        except Exception as error:  # no error here may stop training
            self.say(f"WARNING: tracing could not start at step {self.steps[0]}: {error!r}")

    def _write(self) -> None:
        import jax

        self._running = False
        steps = f"steps {self._traced[0]} to {self._traced[-1]}"
        try:
            jax.profiler.stop_trace()
            traces = self.folder.glob("plugins/profile/*/*.xplane.pb")
            newest = max(traces, key=lambda trace: trace.stat().st_mtime_ns)
            ops = ops_in(jax.profiler.ProfileData.from_file(str(newest)))
            table = f"{steps}: {table_of(ops, filter(None, (p.as_text() for p in self._programs)))}"
            (self.folder / "ops.txt").write_text(f"{table}\n", encoding="utf-8")
        except Exception as error:  # as above
            self.say(f"WARNING: the trace of {steps} cannot be written to {self.folder}: {error!r}")
            return
        self.say(table)
        self.say(
            f"the trace of {steps} is in {newest.parent}: open perfetto_trace.json.gz at "
            "https://ui.perfetto.dev"
        )


class Op(NamedTuple):
    """The total cost of an operation of a program, over all its runs on all devices."""

    module: str  # the program's name; "" if unknown
    name: str
    seconds: float
    count: int


def ops_in(profile: "ProfileData") -> list[Op]:
    """Return the devices' operations, costliest first, without control flow.

    On a GPU the operations are kernels, of which several may have one name.
    """
    nanoseconds: dict[tuple[str, str], float] = {}
    counts: Counter[tuple[str, str]] = Counter()
    with warnings.catch_warnings():
        # Python 3.12 warns about the type of jaxlib's `stats`.
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, stats, duration in _on_devices(profile) or _on_host(profile):
            # On TPUs the name is the whole instruction: "%fusion.1 = f32[8]{0} fusion(...)".
            op = stats.get("hlo_op") or name.partition(" = ")[0].removeprefix("%")
            if not CONTROL_FLOW.fullmatch(op):
                place = stats.get("hlo_module", ""), op
                nanoseconds[place] = nanoseconds.get(place, 0.0) + duration
                counts[place] += 1
    ops = [Op(*place, 1e-9 * ns, counts[place]) for place, ns in nanoseconds.items()]
    return sorted(ops, key=lambda op: op.seconds, reverse=True)


Event = tuple[str, dict[str, Any], float]  # name, facts, nanoseconds


def _on_devices(profile: "ProfileData") -> list[Event]:
    """Return the events on accelerators: TPUs have a line of operations, GPUs one per stream."""
    events = []
    for plane in profile.planes:
        lines = list(plane.lines) if plane.name.startswith("/device:") else []
        ops = [line for line in lines if line.name == "XLA Ops"]
        for line in ops or [line for line in lines if line.name.startswith("Stream")]:
            events += [(event.name, dict(event.stats), event.duration_ns) for event in line.events]
    return events


def _on_host(profile: "ProfileData") -> list[Event]:
    """Return the events on a CPU. Most operations only start in their event and use other threads.

    Another event marks their end. Both have the same number, as producer and consumer.
    """
    begun, ends = [], {}
    for event in (
        event for plane in profile.planes for line in plane.lines for event in line.events
    ):
        stats = dict(event.stats)
        if "hlo_op" in stats:
            begun.append((event, stats))
        elif event.name.startswith("end: "):
            ends[stats["_c"]] = event.end_ns
    return [
        (event.name, stats, ends.get(stats.get("_p"), event.end_ns) - event.start_ns)
        for event, stats in begun
    ]


def table_of(ops: list[Op], programs: Iterable[str]) -> str:
    """Format the costliest operations as lines of text, with their origin in the HLO `programs`."""
    origin: dict[tuple[str, str], str] = {}
    for hlo in programs:
        (module,) = re.findall(r"\AHloModule ([\w.-]+)", hlo)
        for name, place in origins(hlo).items():
            # Stages have programs of the same name, in which an operation's name may differ.
            same = origin.get((module, name), place) == place
            origin[module, name] = origin["", name] = place if same else ""
    total = sum(op.seconds for op in ops)
    costliest = ops[:COSTLIEST]
    width = max((len(op.name) for op in costliest), default=0)
    rows = [
        f"{1e3 * op.seconds:10.2f} {op.seconds / total:7.1%} {op.count:7,}  {op.name:{width}}  "
        f"{origin.get((op.module, op.name), '')}".rstrip()
        for op in costliest
    ]
    head = f"{'ms':>10} {'share':>7} {'count':>7}  {'operation':{width}}  from"
    return "\n".join([f"{1e3 * total:,.1f} ms in {len(ops):,} operations", head, *rows])


def origins(hlo: str) -> dict[str, str]:
    """Return the origin of the operations in a compiled program, by name, if its text has it.

    E.g. "gpt.py:74 project < gpt.py:180 MLP.__call__, jit(train_step)/jvp()/dot_general":
    a line and its caller, and JAX's path of the operation, in which "transpose(jvp" means the
    backward pass. For an operation introduced by XLA, its result: "f32[8,8] copy".
    """

    def numbered(title: str, content: str) -> dict[int, list[str]]:
        table = re.search(rf"^{title}\n((?:\d.*\n)*)", hlo, re.MULTILINE)
        rows = re.findall(rf"(\d+) {content}", table[1]) if table else []
        return {int(number): values for number, *values in rows}

    files, functions = numbered("FileNames", '"(.*)"'), numbered("FunctionNames", '"(.*)"')
    location = r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    locations = numbered("FileLocations", location)
    frames = numbered("StackFrames", r"\{file_location_id=(\d+) parent_frame_id=(\d+)")

    def line_of(frame: int) -> str:
        file, function, line = map(int, locations[int(frames[frame][0])])
        name = re.sub(r"\.<locals>\.<\w+>", "", functions[function][0])  # comprehensions
        return f"{Path(files[file][0]).name}:{line} {name.split('.<locals>.')[-1]}"

    def place(frame: int) -> str:
        caller = int(frames[frame][1]) - 1  # 0 if there is none
        return " < ".join(line_of(each) for each in (frame, caller) if each in frames)

    instruction = (
        r'^ *(?:ROOT )?%([\w.-]+) = .*?metadata=\{op_name="([^"]*)"(?: stack_frame_id=(\d+))?'
    )
    own = r"^ *(?:ROOT )?%([\w.-]+) = (\w+\[[\d,]*\])\S* ([\w-]+)\((?!.*op_name=)"
    made = {name: f"{kind} {op}" for name, kind, op in re.findall(own, hlo, re.MULTILINE)}
    return made | {
        name: f"{place(int(frame))}, {path}" if frame else path
        for name, path, frame in re.findall(instruction, hlo, re.MULTILINE)
    }
