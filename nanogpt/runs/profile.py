"""A profile of a few steps: a trace to look at, and a table of the costliest operations.

runs/<name>/profile/ops.txt                                the table
                    plugins/profile/<time>/                the trace, for
                        perfetto_trace.json.gz             https://ui.perfetto.dev
                        *.xplane.pb                        XProf: `tensorboard --logdir <profile>`

No JAX here before it is needed, so that `--help` and wrong arguments answer at once.
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
CONTROL_FLOW = re.compile(r"(while|conditional|call)(\.\d+)?")  # their time is that of others


def steps_of(profile: str | None, first: int, last: int) -> range:
    """The steps that a profile asks for: "10:13" for 10 to 13, None for none.

    Raises ConfigError unless they are among `first` to `last`, those that are to be made.
    """
    if profile is None:
        return range(0)
    given = re.fullmatch(r"(\d+):(\d+)", profile)
    begin, end = map(int, given.groups()) if given else (0, 0)
    if not first <= begin <= end <= last:
        raise ConfigError(
            f"profile must be the first and the last step to trace, such as "
            f"{first}:{min(first + 3, last)}, among the steps {first} to {last} of this run, not "
            f"{profile}."
        )
    return range(begin, end + 1)


class Trace:
    """Traces some steps of a run, and nothing of the others.

    It waits for the steps before the first and for the last, so that it has whole steps; those
    between follow each other as they always do. A run that ends early leaves what there is. A
    trace that cannot be made costs a line and no more.
    """

    def __init__(self, folder: Path, steps: range, say: Callable[[str], None]):
        """`folder` takes the files; `say` is told of them."""
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
        """`program` is about to make this step, from `state`."""
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
        """The step has been dispatched, and `state` will be what it makes."""
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
        options.python_tracer_level = 0  # every call of a Python function: slow, and in the way
        try:
            jax.profiler.start_trace(
                self.folder, create_perfetto_trace=True, profiler_options=options
            )
            self._running = True
        except Exception as error:  # whatever it is, training matters more
            self.say(f"WARNING: no trace of step {self.steps[0]} and later: {error!r}")

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
        except Exception as error:  # likewise
            self.say(f"WARNING: the trace of {steps} cannot be written to {self.folder}: {error!r}")
            return
        self.say(table)
        self.say(
            f"the trace of {steps} is in {newest.parent}: open perfetto_trace.json.gz at "
            "https://ui.perfetto.dev"
        )


class Op(NamedTuple):
    """What an operation of a program cost, in all its runs on all devices."""

    module: str  # the program's name; "" if the device does not tell
    name: str
    seconds: float
    count: int


def ops_in(profile: "ProfileData") -> list[Op]:
    """The operations that the devices made, the costliest first, without those that only hold them.

    Of a GPU the operations are kernels, and several may belong to one name.
    """
    nanoseconds: dict[tuple[str, str], float] = {}
    counts: Counter[tuple[str, str]] = Counter()
    with warnings.catch_warnings():
        # Python 3.12 finds fault with the type of jaxlib's `stats`.
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, stats, duration in _on_devices(profile) or _on_host(profile):
            # TPUs give the whole instruction as a name: "%fusion.1 = f32[8]{0} fusion(...)".
            op = stats.get("hlo_op") or name.partition(" = ")[0].removeprefix("%")
            if not CONTROL_FLOW.fullmatch(op):
                place = stats.get("hlo_module", ""), op
                nanoseconds[place] = nanoseconds.get(place, 0.0) + duration
                counts[place] += 1
    ops = [Op(*place, 1e-9 * ns, counts[place]) for place, ns in nanoseconds.items()]
    return sorted(ops, key=lambda op: op.seconds, reverse=True)


Event = tuple[str, dict[str, Any], float]  # name, facts, nanoseconds


def _on_devices(profile: "ProfileData") -> list[Event]:
    """What accelerators did: TPUs have a line of operations, GPUs one of kernels per stream."""
    events = []
    for plane in profile.planes:
        lines = list(plane.lines) if plane.name.startswith("/device:") else []
        ops = [line for line in lines if line.name == "XLA Ops"]
        for line in ops or [line for line in lines if line.name.startswith("Stream")]:
            events += [(event.name, dict(event.stats), event.duration_ns) for event in line.events]
    return events


def _on_host(profile: "ProfileData") -> list[Event]:
    """What a CPU did. Most operations only begin in their event, and go on in other threads.

    Another event says when they end. Both have the same number, as producer and consumer.
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
    """The costliest operations as lines of text; `programs` are the HLO that tells their origin."""
    origin: dict[tuple[str, str], str] = {}
    for hlo in programs:
        (module,) = re.findall(r"\AHloModule ([\w.-]+)", hlo)
        for name, place in origins(hlo).items():
            # The stages of a run have programs of one name, in which it may mean other things.
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
    """Where the operations of a compiled program come from, as far as its text tells, by name.

    Such as "gpt.py:74 project < gpt.py:180 MLP.__call__, jit(train_step)/jvp()/dot_general":
    a line and what called it, and the path that JAX gives the operation, in which "transpose(jvp"
    means the backward pass. Of an operation that is XLA's own idea, what it makes: "f32[8,8] copy".
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
        name = re.sub(r"\.<locals>\.<\w+>", "", functions[function][0])  # of comprehensions
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
