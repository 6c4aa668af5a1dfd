"""The benchmark of the step: one tiny run end to end, its arithmetic, and possible failures."""

import json
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO

import jax.numpy as jnp
import pytest

from benchmarks import results
from benchmarks.gpu import loop, measurement, parts, rows, step, variants
from benchmarks.gpu.floors import attention_row, floors, loss_row, orthogonalization_flops
from benchmarks.gpu.loop import check_agreement, looped
from benchmarks.gpu.parts import part_jobs
from benchmarks.gpu.rows import Unmeasured
from benchmarks.gpu.sections.presets import TINY_SPEEDRUN
from benchmarks.gpu.step import COLUMNS, main
from benchmarks.gpu.variants import FULL, TINY, Variant, stage_alone, variants_of
from benchmarks.gpu.whole_step import measure_step
from nanogpt.devices import compilation
from nanogpt.devices.hardware import PEAK_BANDWIDTH, PEAK_FLOPS

SIZE = replace(TINY, hp=stage_alone(TINY.hp, 2))
BASE = Variant("xla", 2)
# The model that is compiled: a plain layer of each window, of which the wider pairs heads.
PLAIN = replace(TINY_SPEEDRUN.model, num_layers=2, paired_heads=(0,))
WINDOWS = tuple(replace(stage, windows=(48, 16)) for stage in TINY.hp.stages)
SMALL = replace(TINY, hp=replace(TINY.hp, stages=WINDOWS, model=PLAIN))
SMALL_SIZE = replace(SMALL, hp=stage_alone(SMALL.hp, 2))
PARTS = ["products of the layers", "products with the head", "attention", "loss", "optimizer"]
# The rows that are compiled here, of each kind a few; each takes seconds, or tenths of one.
COMPILED = {
    "steps": ("base", "without document mask, cudnn"),
    "products": ("out, forward", "head, d-input", "head, d-weight"),
    "loss": ("xla", "xla, FP8", "pallas"),
    "attention": ("xla, window 48, paired", "pallas, window 16", "cudnn, window 16, all documents"),
    "optimizer": ("Adam's part", "orthogonalization in it"),
}
MEASURED = COMPILED | {
    "steps": (*COMPILED["steps"], "fastest of each", "base again", "base, traced")
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run: the figures it saved, with the texts of its loops, its output and its folder."""
    folder, printed, texts = tmp_path_factory.mktemp("step"), StringIO(), []

    def some_variants(base):
        return {row: variants_of(base)[row] for row in COMPILED["steps"]}

    def some_jobs(size, kernel):
        return [
            (section, row, partial(measure_and_read, measure))
            for section, row, measure in part_jobs(size, kernel)
            if row in COMPILED[section]
        ]

    def measure_and_read(measure):
        return measure() | {"text": texts.pop()}

    def looped_and_read(work, rounds):
        advance, compiled = looped(work, rounds), []

        def call(carry):
            if not compiled:
                compiled.append(advance.lower(carry).compile())
                texts.append(compiled[0].as_text())
            return compiled[0](carry)

        return call

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(results, "FOLDER", folder)
        patch.setattr(variants, "TINY", SMALL)
        patch.setattr(measurement, "variants_of", some_variants)
        patch.setattr(measurement, "part_jobs", some_jobs)
        patch.setattr(loop, "looped", looped_and_read)
        patch.setattr(compilation, "use_compilation_cache", lambda: None)
        patch.setattr(rows.gc, "collect", lambda: None)  # takes as long as the rest of a tiny row
        assert main(["--tiny", "--trace", str(folder / "trace")]) == 0
    figures = json.loads((folder / "gpu_step_stage_3_tiny.json").read_text())
    return figures, printed.getvalue(), folder


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """`pretend(ms)` runs everything with the times `ms(section, row)`; returns what it saved."""

    def run(ms, *options):
        saved = []
        monkeypatch.setattr(compilation, "use_compilation_cache", lambda: None)
        monkeypatch.setattr(rows.gc, "collect", lambda: None)

        def save(name, figures, tiny, shown=True):
            saved.append(json.loads(json.dumps(figures)))

        for module in (step, measurement):
            monkeypatch.setattr(module, "save", save)
        for module, section, name, row in [
            (measurement, "steps", "measure_step", lambda size, steps, variant: variant),
            (parts, "products", "measure_product", lambda size, *which: which),
            (parts, "attention", "measure_attention", lambda size, *which: attention_row(*which)),
            (parts, "loss", "measure_loss", lambda size, *which: loss_row(*which)),
            (parts, "optimizer", "measure_update", lambda size, *which: which),
            (parts, "optimizer", "measure_orthogonalization", lambda size: "orthogonalization"),
        ]:

            def measure(*arguments, section=section, row=row):
                return {"ms": ms(section, row(*arguments))}

            monkeypatch.setattr(module, name, measure)
        assert main(["--tiny", *options]) == 0
        return saved

    return run


# The tiny run.


def test_a_variant_changes_one_thing_of_the_base():
    found = variants_of(BASE)
    assert set(found) == {
        *("base", "1 rows", "4 rows", "Adam for all", "plain Muon", "FP8 head", "pallas loss"),
        *("pallas attention", "without document mask", "without document mask, cudnn"),
    }
    changed = {
        row: {name for name in vars(BASE) if getattr(variant, name) != getattr(BASE, name)}
        for row, variant in found.items()
    }
    assert changed.pop("without document mask, cudnn") == {"document_mask", "attention"}
    assert changed.pop("base") == set()
    assert {len(names) for names in changed.values()} == {1}


def test_every_variant_and_every_part_has_a_row(pretend):
    figures = pretend(lambda section, row: 1.0)[-1]
    assert set(figures["steps"]) == {*variants_of(BASE), "fastest of each", "base again"}
    ways = ("forward", "d-input", "d-weight")
    products = {f"{name}, {way}" for name in ("qkv", "out", "up", "down", "head") for way in ways}
    assert set(figures["products"]) == products
    assert set(figures["loss"]) == {"xla", "xla, FP8", "pallas", "pallas, FP8"}
    places = "window 16", "window 48, paired"
    masked = {f"{k}, {place}" for k in ("xla", "pallas") for place in places}
    whole = {f"{k}, {place}, all documents" for k in ("cudnn", "pallas") for place in places}
    assert set(figures["attention"]) == masked | whole
    assert len(figures["optimizer"]) == 5
    assert set(figures["parts"]) == {*PARTS, "rest", "whole step"}


def test_what_a_cpu_cannot_do_says_so_in_a_sentence_and_all_else_has_a_time(run):
    figures, *_ = run
    for section, names in MEASURED.items():
        assert set(figures[section]) == set(names)
        for row, found in figures[section].items():
            if "cudnn" in row:
                assert re.fullmatch(r"It failed with \w+: .*cuDNN.*", found["failed"])
            else:
                assert found.get("ms", 0) > 0, (section, row, found)


def test_tokens_per_second_and_milliseconds_agree(run):
    figures, *_ = run
    assert figures["device"] == "cpu"
    assert figures["steps"]["base"]["mfu"] is None  # without a data sheet
    rows = [found for found in figures["steps"].values() if "tokens_per_s" in found]
    assert len(rows) == len(MEASURED["steps"]) - 2  # without cuDNN and the trace
    for found in rows:
        assert found["tokens_per_s"] * found["ms"] / 1e3 == pytest.approx(768)
        assert found["ratio"] == pytest.approx(found["ms"] / figures["steps"]["base"]["ms"])


def test_the_base_trains_and_computes_the_same_again(run):
    steps = run[0]["steps"]
    assert steps["base"]["last_loss"] < math.log(256) - 0.1  # the state was trained, not discarded
    assert steps["base"]["last_loss"] == steps["base again"]["last_loss"]
    assert steps["base"]["variant"] == vars(BASE) | {"target_weights": [1.0]}


def test_the_tables_show_every_row_and_the_trace_is_written(run):
    figures, printed, folder = run
    assert list((folder / "trace").rglob("*.xplane.pb"))
    tables = re.split(r"^(\w+) +ms\b.*\n", printed, flags=re.MULTILINE)
    for section, table in zip(tables[1::2], tables[2::2], strict=True):
        for row, found in figures[section].items():
            (line,) = re.findall(rf"^{re.escape(row)}  .*$", table, re.MULTILINE)
            assert found.get("failed", "") in line
    assert len(tables) == 1 + 2 * 6
    assert "nan" not in printed


# The loop: nothing is eliminated or hoisted out of it.


def dots(text: str) -> tuple[int, int]:
    """Count the matmuls in a program: those in its loops, and all."""
    blocks = re.findall(
        r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE
    )
    called = r"(?:calls|to_apply|body)=%?([\w.\-]+)"
    inside = set(re.findall(r"body=%?([\w.\-]+)", text))
    for _ in blocks:  # at most as deep
        inside.update(
            x for name, body in blocks if name in inside for x in re.findall(called, body)
        )
    counts = {name: len(re.findall(r" dot\(", body)) for name, body in blocks}
    return sum(counts[name] for name in inside), sum(counts.values())


@pytest.mark.parametrize(
    ("section", "row", "products"),
    [
        ("products", "out, forward", 1),
        ("products", "head, d-input", 1),
        ("products", "head, d-weight", 1),
        ("attention", "xla, window 48, paired", 6),  # scores and outputs, and two gradients of each
        ("loss", "xla", 3),
        ("optimizer", "orthogonalization in it", 9),  # an iteration of each of three shapes
    ],
)
def test_every_round_makes_all_products(run, section, row, products):
    inside, in_all = dots(run[0][section][row]["text"])
    assert inside == in_all >= products


def test_the_loop_makes_as_many_rounds_as_it_is_told():
    run = looped(lambda result, x: result + 1.0 + 0.0 * x.sum(), 7)
    result, _ = run((jnp.zeros([1]), [jnp.ones([3, 3])]))
    assert result == 7


# Floors and sums.


@pytest.fixture
def fake_device(monkeypatch):
    monkeypatch.setitem(PEAK_FLOPS, "fake", 1e9)
    monkeypatch.setitem(PEAK_BANDWIDTH, "fake", 1e6)
    return "fake"


def test_the_floors_are_those_of_the_arithmetic_by_hand(fake_device):
    """L 4, three with attention, D 64, F 256, V 256, T 64, 768 tokens; 1 GFLOP/s and 1 MB/s."""
    attention, mlp = 3 * 64 * 64 + 64 * 64, 64 * 256 + 256 * 64
    weights = 3 * attention + 4 * mlp
    # Two windows of 16, and one of 48 over paired heads, whose row has 128 queries.
    keys = 2 * (sum(range(1, 17)) + 48 * 16) / 64 + (sum(range(1, 49)) + 80 * 48) / 128
    # Of a polynomial; each head's queries and keys are matrices of their own.
    products = 3 * (2 * 6 * 64**3 + 4 * (4 * 32**2 * 64 + 2 * 32**3))
    products += 4 * 2 * (4 * 64**2 * 256 + 2 * 64**3)
    tables = 4 * 256 * 64 + 128 * 64  # embedding, values of two layers, head; pairs of tokens
    # Two shares of each of three attentions, four of each of three layers, a skip, the smear's
    # share; gates of two heads' values and of the smear, from 12 channels; MLPs with 64 hidden
    # channels, for 14 and 5 weights and 2 and 11 gates, and the scale of these.
    scalars = 2 * 3 + 4 * 3 + 1 + 1 + 12 * (2 + 1)
    scalars += 4 * 64 * 64 + (64 + 1) * (14 + 5 + 2 + 11) + 1
    # Copies a gradient; at the next step reads the copy and a gradient, and reads and writes a
    # weight and two means.
    adam = (2 + 2 + 2 * 3) / 2
    seconds = {
        "products of the layers": 6 * weights * 768 / 1e9,
        "products with the head": 6 * 64 * 256 * 768 / 1e9,
        "attention": (2 + 4) * 2 * 64 * keys * 768 / 1e9,  # two products, of each layer its keys
        "loss": 768 * 256 * 4 / 1e6,
        "optimizer": 4 * (5 * weights + adam * (tables + scalars)) / 1e6 + 5 * products / 1e9,
    }
    found = floors(SIZE.hp, fake_device)
    assert found.pop("whole step") == pytest.approx(1e3 * sum(seconds.values()))
    assert found == pytest.approx({part: 1e3 * s for part, s in seconds.items()})


def test_the_full_size_is_the_third_stage_of_the_speedrun(fake_device):
    hp = stage_alone(FULL.hp, 2)
    per_token = {part: ms * 1e6 / 393_216 for part, ms in floors(hp, fake_device).items()}
    # 10 attentions and 11 MLPs
    assert per_token["products of the layers"] == pytest.approx(6 * 75.50e6, rel=1e-3)
    assert per_token["products with the head"] == pytest.approx(231.8e6, rel=1e-3)
    keys = 4 * (640 - 639 * 640 / 2 / 16384) + 2 * (1408 - 1407 * 1408 / 2 / 16384)
    keys += 4 * (640 - 639 * 640 / 2 / 32768)  # four with paired heads
    assert per_token["attention"] == pytest.approx(12 * 768 * keys)
    # Five polynomials of 20 square matrices, of 60 a third as wide, and of 22 four times as wide.
    flops = 5 * 768**3 * (20 * 6 + 60 * (4 / 9 + 2 / 27) + 22 * (4 * 4 + 2))
    assert orthogonalization_flops(hp) == pytest.approx(flops)
    size = replace(FULL, hp=hp)
    assert (size.tokens, size.Ng, size.repeats >= 5, size.calls % 2) == (65_536, 6, True, 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_alone_is_what_the_run_makes_of_it(stage):
    whole, alone = FULL.hp, stage_alone(FULL.hp, stage)
    alone.check()
    assert alone.schedule.model(alone.model, 0) == whole.schedule.model(whole.model, stage)
    assert alone.schedule.ties_head(alone.model, 0) == (stage < 2)
    assert alone.schedule.row_length(0) == 16_384
    assert alone.schedule.tokens_per_step(0) == (131_072, 262_144, 393_216, 393_216)[stage]
    assert alone.batch_size * alone.sequence_length == 65_536
    assert alone.stages[0].target_weights == whole.stages[stage].target_weights
    assert alone.total_batch_size % (2 * alone.batch_size * alone.sequence_length) == 0


def test_an_unknown_device_has_no_floors():
    assert set(floors(SIZE.hp, "abacus").values()) == {None}


def test_parts_are_scaled_to_the_step(pretend):
    times = {"steps": 100.0, "products": 0.25, "loss": 2.0, "optimizer": 5.0}
    attention = {"xla, window 16": 1.0, "xla, window 48, paired": 3.0}
    parts = pretend(lambda section, row: times.get(section) or attention.get(row, 50.0))[-1][
        "parts"
    ]
    Ng, L, attentions = 6, 4, 3
    expected = {
        "products of the layers": Ng * (attentions * 2 + L * 2) * 3 * 0.25,
        "products with the head": Ng * 3 * 0.25,
        "attention": Ng * (2 * 1.0 + 3.0),
        "loss": Ng * (2.0 - 3 * 0.25),
        "optimizer": 5.0,
    }
    assert {name: parts[name]["ms"] for name in PARTS} == expected
    assert parts["rest"]["ms"] == 100.0 - sum(expected.values())
    assert parts["whole step"]["ms"] == 100.0
    assert sum(parts[name]["of_step"] for name in [*PARTS, "rest"]) == pytest.approx(1)
    # A CPU has no data sheet.
    assert [parts[name]["floor_ms"] for name in PARTS] == [None] * len(PARTS)


def test_another_stage_has_its_shape_and_its_targets_and_a_variant_with_one(pretend):
    seen = []

    def ms(section, row):
        if section == "steps":
            seen.append(row)
        return 1.0

    figures = pretend(ms, "--stage", "1")[-1]
    assert figures["of_stage"] == "256 tokens per step, in rows of 64"
    base = Variant("xla", 2, (1.0, 0.5, 0.25))
    assert seen[0] == seen[-1] == base
    assert replace(base, target_weights=(1.0,)) in seen
    assert "one target" in figures["steps"]


def test_the_fastest_of_each_thing_are_combined(pretend):
    seen = []

    def ms(section, row):
        if section != "steps":
            return 1.0
        seen.append(row)
        faster = {"pallas attention": 1, "pallas loss": 9}
        slower = {"1 rows": 1, "4 rows": 1}
        kernels = f"{row.attention} attention", f"{row.loss} loss", f"{row.batch_size} rows"
        gain = sum(faster.get(kernel, 0) - slower.get(kernel, 0) for kernel in kernels)
        return 100.0 - gain - row.fp8_head - 50 * (row.rule == "Adam" or not row.document_mask)

    steps = pretend(ms)[-1]["steps"]
    assert seen[-2:] == [Variant("pallas", 2, loss="pallas", fp8_head=True), BASE]
    assert steps["fastest of each"] == {"ms": 89.0}


# Failures.


def test_a_row_that_fails_stops_no_other(pretend):
    def ms(section, row):
        if section == "products" and row[1] == "d-weight":
            raise MemoryError("RESOURCE_EXHAUSTED: too much\nand more\nof it\nand a stack")
        if section == "steps" and row.loss == "pallas":
            raise Unmeasured("It is wrong.")
        return 1.0

    saved = pretend(ms)
    last = saved[-1]
    failed = {"failed": "It failed with MemoryError: RESOURCE_EXHAUSTED: too much and more of it"}
    assert last["products"]["up, d-weight"] == last["products"]["head, d-weight"] == failed
    assert last["products"]["up, forward"] == last["steps"]["base again"] == {"ms": 1.0}
    assert last["steps"]["pallas loss"] == {"failed": "It is wrong."}
    assert last["parts"]["attention"]["ms"] == 18.0
    assert "failed" in last["parts"]["products of the layers"] and "failed" in last["parts"]["rest"]

    rows = [sum(len(figures[s]) for s in COLUMNS if s != "parts") for figures in saved[:-1]]
    assert rows == list(range(1, 1 + 12 + 15 + 8 + 4 + 5))  # saved after each


def test_the_projects_own_kernels_come_after_what_needs_none(pretend):
    own = []

    def ms(section, row):
        own.append("pallas" in str(row))
        return 1.0

    pretend(ms)
    assert own[:-2] == sorted(own[:-2]) and own.count(True) == 2 + 2 + 4


def test_a_kernel_that_disagrees_is_not_timed():
    x = [jnp.ones([4, 4])]
    check_agreement(lambda _, x: 1.01 * x, lambda _, x: x, x)
    for wrong in (lambda _, x: 1.2 * x, lambda _, x: x * jnp.nan, lambda _, x: 0 * x):
        with pytest.raises(Unmeasured, match=r"differs from XLA's results in bfloat16 by"):
            check_agreement(wrong, lambda _, x: x, x)


def test_a_step_whose_loss_is_not_the_bases_is_not_timed(run):
    wanted = run[0]["steps"]["base"]["last_loss"] + 1
    with pytest.raises(Unmeasured, match=rf"^After 3 steps its loss .* the base's {wanted:.2f}\.$"):
        measure_step(SMALL_SIZE, {"base": {"ms": 1.0, "last_loss": wanted}}, BASE)
