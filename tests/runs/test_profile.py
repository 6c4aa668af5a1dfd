"""The steps in a trace, and its table: of real runs on a CPU, and of synthetic traces."""

import gzip
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from nanogpt.config import ConfigError
from nanogpt.runs.profile import Op, Trace, ops_in, origins, steps_of, table_of
from tests.programs import Process

PRODUCTS = 40  # in a step; enough that it is not finished when its dispatch returns


def layer(x):
    return jnp.tanh(x @ x)


def make_step(x):
    return jax.lax.scan(lambda x, _: (layer(x), None), x, length=PRODUCTS)[0]


def compiled():
    return jax.jit(make_step).lower(jnp.ones((256, 256))).compile()


@pytest.fixture(scope="module")
def program():
    return compiled()


class Clock:
    """Replaces Progress, and records what was not training."""

    def __init__(self):
        self.calls = []

    def spent(self, seconds, what):
        assert seconds >= 0
        self.calls.append(what)


def train(folder, steps, program, num_steps=7, stop_after=None):
    """Run a training loop; return its messages, the result, and the clock."""
    said, clock, state = [], Clock(), 0.01 * jnp.ones((256, 256))
    with Trace(folder, steps, said.append) as trace:
        for step in range(1, num_steps + 1):
            trace.begin(step, program, state, clock)
            state = program(state)
            trace.end(step, state, clock)
            if step == stop_after:
                break
    return said, state, clock


@pytest.fixture(scope="module")
def traced(tmp_path_factory, program):
    """A run of 7 steps with a trace of 3 to 5: its folder and its messages."""
    folder = tmp_path_factory.mktemp("run") / "profile"
    return folder, *train(folder, steps_of("3:5", 1, 7), program)


def test_first_and_last_step_are_both_traced():
    assert list(steps_of("10:13", 1, 100)) == [10, 11, 12, 13]
    assert list(steps_of("7:7", 7, 7)) == [7]
    assert list(steps_of(None, 1, 100)) == []


@pytest.mark.parametrize(
    "profile", ["", "5", "5:", "a:b", "5:4", "0:3", "-1:3", "5:101", "1:2:3", "4.0:5"]
)
def test_a_profile_that_names_no_steps_of_the_run_is_answered_in_a_sentence(profile):
    with pytest.raises(ConfigError, match=r"within steps 1 to 100, e\.g\. 1:4, not ") as error:
        steps_of(profile, 1, 100)
    assert str(error.value).endswith(f"not {profile}.") and "\n" not in str(error.value)


def test_steps_before_the_first_of_a_resumed_run_cannot_be_traced():
    assert list(steps_of("51:52", 51, 100)) == [51, 52]
    with pytest.raises(ConfigError, match=r"within steps 51 to 100, e\.g\. 51:54, not"):
        steps_of("50:52", 51, 100)


def test_the_trace_opens_in_perfetto_and_in_xprof_and_shows_the_steps_asked_for(traced):
    folder = traced[0]
    (perfetto,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "step"]
    assert sorted(map(int, steps)) == [3, 4, 5]
    (xplane,) = folder.glob("plugins/profile/*/*.xplane.pb")
    assert [p.name for p in ProfileData.from_file(str(xplane)).planes if p.name == "/host:CPU"]


def test_the_trace_holds_each_of_its_steps_whole_and_nothing_of_the_others(traced):
    (xplane,) = traced[0].glob("plugins/profile/*/*.xplane.pb")
    ops = {op.name: op for op in ops_in(ProfileData.from_file(str(xplane)))}
    (product,) = (op for name, op in ops.items() if re.match("dot|ynn", name))
    assert product.count == 3 * PRODUCTS
    assert product.module == "jit_make_step"
    assert product.seconds > 0
    assert not [name for name in ops if name.startswith("while")]


def test_the_table_is_said_and_kept_and_names_source_lines(traced):
    folder, said, _, _ = traced
    table, place = said
    assert (folder / "ops.txt").read_text() == f"{table}\n"
    assert re.match(r"steps 3 to 5: [\d.,]+ ms in \d+ operations\n +ms +share +count ", table)
    rows = table.splitlines()[2:]
    assert 1 <= len(rows) <= 10
    (product,) = (row for row in rows if re.search(r" (dot|ynn)", row))
    line = inspect.getsourcelines(layer)[1] + 1
    assert f" test_profile.py:{line} layer < test_profile.py:" in product
    assert product.split()[2] == str(3 * PRODUCTS)
    assert "ui.perfetto.dev" in place and str(folder) in place


def test_tracing_changes_no_result_and_neither_waits_nor_counts_outside_its_steps(
    tmp_path, program, monkeypatch
):
    waits, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append(1) or wait(x))
    said, plain, clock = train(tmp_path / "none", range(0), program)
    assert (said, waits, clock.calls, list(tmp_path.iterdir())) == ([], [], [], [])
    _, state, clock = train(tmp_path / "some", range(2, 4), program)
    assert (state == plain).all()
    assert len(waits) == 2  # for what was before, and for the last
    assert clock.calls == ["profile", "profile"]  # starting, and writing


def test_a_run_that_ends_within_its_trace_leaves_the_steps_it_made(tmp_path, program):
    said, _, _ = train(tmp_path, range(2, 6), program, stop_after=3)
    assert said[0].startswith("steps 2 to 3: ")
    assert (tmp_path / "ops.txt").read_text() == f"{said[0]}\n"


def test_what_else_traces_already_is_left_alone_and_costs_a_line(tmp_path, program):
    jax.profiler.start_trace(tmp_path / "other")
    try:
        said, _, _ = train(tmp_path / "mine", range(2, 4), program)
    finally:
        jax.profiler.stop_trace()  # which would fail if it had been stopped
    assert len(said) == 1 and said[0].startswith("WARNING: tracing could not start at step 2: ")


def some_steps(arguments):
    """Trace two of seven steps into a folder, and print what is said."""
    said, *_ = train(Path(arguments[0]), range(1, 3), compiled())
    print(*said, "all steps made", sep="\n")


def test_a_full_disk_costs_a_line_and_not_the_run(tmp_path, cache):
    with Process([tmp_path], tmp_path, cache, limit=100, main=some_steps) as process:
        assert process.end() == 0, process.stderr
    warning, end = process.output.splitlines()
    assert warning.startswith(f"WARNING: the trace of steps 1 to 2 cannot be written to {tmp_path}")
    assert end == "all steps made"


def made(*planes):
    """Build a profile: planes of (name, lines), lines of (name, events), events of
    (name, start in ns, duration in ns, stats)."""
    text = []
    for plane, lines in planes:
        stats = sorted({stat for _, events in lines for *_, stats in events for stat in stats})
        names = sorted({name for _, events in lines for name, *_ in events})
        text.append(f'planes {{ name: "{plane}"')
        for line, events in lines:
            text.append(f'lines {{ name: "{line}"')
            for name, start, duration, facts in events:
                text.append(f"events {{ metadata_id: {1 + names.index(name)}")
                text.append(f"offset_ps: {1000 * start} duration_ps: {1000 * duration}")
                for stat, value in facts.items():
                    kind = "uint64_value" if isinstance(value, int) else "str_value"
                    text.append(f"stats {{ metadata_id: {1 + stats.index(stat)}")
                    text.append(f"{kind}: {json.dumps(value)} }}")
                text.append("}")
            text.append("}")
        for kind, known in ("event", names), ("stat", stats):
            for key, name in enumerate(known, 1):
                value = f"{{ id: {key} name: {json.dumps(name)} }}"
                text.append(f"{kind}_metadata {{ key: {key} value {value} }}")
        text.append("}")
    serialized = ProfileData.text_proto_to_serialized_xspace(" ".join(text))
    return ProfileData.from_serialized_xspace(serialized)


def costs(profile):
    """Return nanoseconds and runs of each operation, the costliest first."""
    return [(op.module, op.name, round(1e9 * op.seconds), op.count) for op in ops_in(profile)]


def hlo(op):
    return {"hlo_op": op, "hlo_module": "jit_f"}


HOST_OF_A_GPU = ("/host:CPU", [("python", [("thunk", 0, 9000, hlo("fusion.1"))])])


def test_of_a_gpu_the_kernels_of_all_streams_and_devices_are_counted_once():
    kernels = [("k1", 0, 30, hlo("fusion.1")), ("k2", 30, 20, hlo("fusion.1"))]
    profile = made(
        HOST_OF_A_GPU,
        (
            "/device:GPU:0",
            [
                ("Stream #13(Compute)", [*kernels, ("gemm<a = b>", 60, 200, hlo("dot.2"))]),
                ("Stream #14(MemcpyD2D)", [("MemcpyD2D", 0, 7, {})]),
                ("Launch Stats", [("whatever", 0, 5000, {})]),
            ],
        ),
        ("/device:GPU:1", [("Stream #9(Compute)", kernels)]),
    )
    assert costs(profile) == [
        ("jit_f", "dot.2", 200, 1),
        ("jit_f", "fusion.1", 100, 4),
        ("", "MemcpyD2D", 7, 1),
    ]


def test_of_a_gpu_whose_profile_has_operations_their_kernels_are_not_counted_again():
    profile = made(
        HOST_OF_A_GPU,
        (
            "/device:GPU:0",
            [
                ("Stream #13(Compute)", [("kernel", 0, 30, hlo("fusion.1"))]),
                ("XLA Modules", [("jit_f", 0, 35, {})]),
                ("XLA Ops", [("fusion.1", 0, 30, hlo("fusion.1"))]),
            ],
        ),
    )
    assert costs(profile) == [("jit_f", "fusion.1", 30, 1)]


def test_of_a_tpu_operations_are_named_as_in_the_program_and_loops_are_what_is_in_them():
    fusion = "%fusion.12 = bf16[8,128]{1,0:T(8,128)} fusion(%p.1), kind=kLoop"
    profile = made(
        (
            "/device:TPU:0",
            [
                ("Steps", [("3", 0, 1000, {})]),
                ("XLA Modules", [("jit_train_step(123)", 0, 1000, {})]),
                (
                    "XLA Ops",
                    [
                        ("%while.3 = (s32[]) while(%t)", 0, 900, {}),
                        (fusion, 10, 400, {}),
                        (fusion, 420, 400, {}),
                        ("%while_fusion.3 = f32[] fusion(%t)", 900, 50, {}),
                    ],
                ),
                ("Async XLA Ops", [("%copy-start.1 = u32[] copy-start(%p)", 0, 700, {})]),
            ],
        )
    )
    assert costs(profile) == [("", "fusion.12", 800, 2), ("", "while_fusion.3", 50, 1)]


def test_of_a_cpu_an_operation_lasts_until_the_thread_that_went_on_with_it_says_so():
    profile = made(
        (
            "/host:CPU",
            [
                ("python", [("step", 0, 5000, {}), ("PjitFunction(f)", 0, 4000, {"_p": 1})]),
                (
                    "tf_XLAEigen/1",
                    [
                        ("ThunkExecutor::Execute", 0, 900, {}),
                        ("while.1", 0, 900, hlo("while.1") | {"_p": 7}),
                        ("dot.1", 100, 5, hlo("dot.1") | {"_p": 8}),
                        ("add.2", 110, 20, hlo("add.2") | {"_p": 9}),
                        ("end: add.2", 128, 1, {"_c": 9}),
                    ],
                ),
                ("tf_XLAEigen/2", [("end: dot.1", 398, 2, {"_c": 8})]),
            ],
        )
    )
    assert costs(profile) == [("jit_f", "dot.1", 300, 1), ("jit_f", "add.2", 19, 1)]


def test_an_empty_profile_has_a_table_without_rows():
    assert table_of(ops_in(made(("/host:CPU", []))), []).splitlines()[0] == "0.0 ms in 0 operations"


def program_text(name, *ops):
    """Return the text of a compiled program with operations (name, path)."""
    lines = [f'  %{op} = f32[] add(%x, %y), metadata={{op_name="{path}"}}' for op, path in ops]
    return "\n".join([f"HloModule {name}, is_scheduled=true", *lines, ""])


def test_the_table_has_the_ten_costliest_with_their_shares_of_the_time_of_all():
    ops = [Op("jit_f", f"op.{i}", 1e-3 * i, 2 * i) for i in range(12, 0, -1)]
    table = table_of(ops, [program_text("jit_f", ("op.12", "jit(f)/add"))]).splitlines()
    assert table[0] == "78.0 ms in 12 operations"
    rows = [row.split() for row in table[2:]]
    assert [row[:4] for row in rows] == [
        [f"{i:.2f}", f"{i / 78:.1%}", str(2 * i), f"op.{i}"] for i in range(12, 2, -1)
    ]
    assert [row[4:] for row in rows] == [["jit(f)/add"]] + 9 * [[]]


def test_an_origin_is_given_only_if_it_is_sure():
    first = program_text("jit_f", ("same", "jit(f)/add"), ("other", "jit(f)/mul"))
    second = program_text("jit_f", ("same", "jit(f)/add"), ("other", "jit(f)/sub"))
    names = ("jit_f", "same"), ("jit_f", "other"), ("jit_g", "same"), ("", "same")
    ops = [Op(program, name, 1.0, 1) for program, name in names]
    rows = table_of(ops, [first, second]).splitlines()[2:]
    assert [row.split()[3:] for row in rows] == [
        ["same", "jit(f)/add"],
        ["other"],
        ["same"],  # of another program
        ["same", "jit(f)/add"],  # of one that the device does not report
    ]


def test_origins_are_the_line_the_caller_and_the_pass_of_each_operation():
    def inner(x):
        return jnp.sin(x @ x)

    def outer(x):
        return inner(inner(x) + 1).sum()

    text = jax.jit(jax.grad(outer)).lower(jnp.ones((8, 8))).compile().as_text()
    start = inspect.getsourcelines(inner)[1] + 1, inspect.getsourcelines(outer)[1] + 1
    place = f"test_profile.py:{start[0]} inner < test_profile.py:{start[1]} outer, jit(outer)/"
    found = set(origins(text).values())
    assert f"{place}jvp()/dot_general" in found
    assert any(origin.startswith(f"{place}transpose(jvp())/") for origin in found)


def test_of_an_operation_that_is_xlas_own_the_table_tells_what_it_makes():
    text = """HloModule jit_f
  %copy.3 = f32[16,8]{1,0:T(8,128)} copy(%param.1)
  ROOT %add.1 = bf16[] add(%a, %b), metadata={op_name="jit(f)/add"}
  %pair.2 = (f32[8]{0}, s32[]) custom-call(%copy.3)
"""
    assert origins(text) == {"copy.3": "f32[16,8] copy", "add.1": "jit(f)/add"}
