"""Small runs, compiled for TPU slices: what can be verified without a TPU."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanogpt.devices.compilation import first_that_fits
from nanogpt.devices.sharding import reduced
from nanogpt.schedule import Stage
from train_gpt import PRESETS

pytestmark = [
    pytest.mark.usefixtures("compiled_fully", "quickly"),
    pytest.mark.skipif(
        not find_spec("libtpu"),
        reason='needs the compiler for TPUs: pip install -e ".[tpu-compiler]"',
    ),
]

SPEEDRUN, BASELINE = PRESETS["speedrun"], PRESETS["baseline"]
SMALL = {"vocab_size": 2100, "num_heads": 2, "width": 256, "mlp_width": 512}
V, T, ROWS, DEVICES = 2176, 2048, 2, 8
TABLES = ("embed", "value_embed", "bigram_embed", "head")  # sharded in any run
RUNS = {
    # Documents, a window for each layer, heads in pairs, tables, gates and skips.
    "speedrun": replace(
        SPEEDRUN,
        stages=(Stage(windows=(128, 640, 640)),),
        model=replace(
            SPEEDRUN.model,
            **SMALL,
            num_layers=3,
            mlp_only=(),
            key_offset=(2,),
            paired_heads=(1,),
            skips=((0, 2),),
            attention_source=1,
            exclusive=(0,),
            gated=(2,),
            composed=(2,),
            value_embeddings=2,
            value_layers=(0, 2),
            document_separator=2099,
            bigram_buckets=4096,
            bigram_width=64,
        ),
    ),
    "divided": replace(
        BASELINE, shard_params=True, model=replace(BASELINE.model, **SMALL, num_layers=2)
    ),
    "shared rows": replace(
        BASELINE, mesh="data=4,model=2", model=replace(BASELINE.model, **SMALL, num_layers=2)
    ),
}


@pytest.fixture(scope="module")
def quickly():
    """Options with a third of the compile time; programs are slower and larger, but do the same."""
    effort = "jax_exec_time_optimization_effort"
    if effort not in jax.config.values:  # of a newer JAX
        yield
        return
    before = jax.config.values[effort]
    jax.config.update(effort, -1.0)
    yield
    jax.config.update(effort, before)


@cache
def plan_of(name):
    from benchmarks.compiled.for_tpu import plan_on
    from benchmarks.compiled.tpu import use_tpu_compiler

    use_tpu_compiler()
    tokens = 2 * ROWS * T * DEVICES  # two micro-batches, or with a mesh of two axes four
    run = replace(RUNS[name], batch_size=ROWS, sequence_length=T, total_batch_size=tokens)
    return plan_on(run, "v5e", DEVICES)


@cache
def compiled(name):
    from benchmarks.compiled.for_tpu import lowered_on
    from benchmarks.compiled.program import Program

    step = lowered_on(plan_of(name), "v5e", 0)["training step"].compile()
    return step, Program(step)


def numbers(instructions):
    from benchmarks.compiled.program import size_of

    return sum(size_of(x.shape) for x in instructions) // 4


def sizes_of_parameters(step, names=None):
    params = jax.tree.leaves_with_path(step.in_avals[0][0].params)
    return [int(np.prod(p.shape)) for path, p in params if not names or path[-1].key in names]


def test_attention_is_splash_forward_and_backward_in_large_blocks_within_its_window():
    from benchmarks.compiled.tpu import attention_kernels

    found = attention_kernels(compiled("speedrun")[1])
    # Eight blocks of 256 queries, each with the keys of two: 128 - 1 keys back is one block; four
    # of 512 with the keys of three: 640 - 1 is two. Paired heads have eight of 512.
    for kernel in ("fwd", "dq", "dkv"):
        for grid in ("8,2", "4,3", "8,3"):
            inner = ",".join(reversed(grid.split(","))) if kernel == "dkv" else grid
            assert found.pop(f"{kernel} 1,{inner}") == 1
    assert not found


def test_attention_stays_within_documents_where_there_is_a_separator_and_only_there():
    for name, expected in {"speedrun": 9, "divided": 0}.items():
        kernels = [x for x in compiled(name)[1].kernels() if x.name.startswith("splash_mha")]
        assert len(kernels) >= 6
        assert sum("segmented" in x.name for x in kernels) == expected


def test_no_halves_of_heads_are_stored_which_would_fill_half_of_each_register():
    N, H = SMALL["num_heads"], SMALL["width"] // SMALL["num_heads"]
    stored = [
        dims
        for kernel in compiled("speedrun")[1].kernels()
        for dims in re.findall(r"\[([\d,]+)\]", kernel.shape)
        if dims.endswith(f",{H // 2}")
    ]
    large = [d for d in stored if np.prod([*map(int, d.split(","))]) >= ROWS * T * N * H // 2]
    assert len(large) <= 1, large  # the angles of paired heads


def test_without_windows_attention_goes_through_all_blocks():
    from benchmarks.compiled.tpu import attention_kernels

    assert attention_kernels(compiled("divided")[1]) == {f"{x} 1,4,4": 2 for x in KERNELS}


KERNELS = ("fwd", "dq", "dkv")


@pytest.mark.parametrize("name", RUNS)
def test_logits_are_stored_but_never_in_float32(name):
    tokens = ROWS * T // (2 if name == "shared rows" else 1)  # two score half of a row each
    stored = Counter(
        kind
        for x in compiled(name)[1].kernels()
        for kind, shape in re.findall(rf"\b(bf16|f32)\[([\d,]+),{V}\]", x.shape)
        if np.prod([int(n) for n in shape.split(",")]) == tokens
    )
    assert set(stored) == {"bf16"}


def test_data_parallel_chips_reduce_each_gradient_once_in_float32_and_nothing_in_the_loop():
    from benchmarks.compiled.collectives import collectives

    step, program = compiled("speedrun")
    found = collectives(program)
    assert set(found) == {"all-reduce", "reduce-scatter", "all-gather"}
    whole, parts = found["all-reduce"], found["reduce-scatter"]
    assert all("bf16" not in x.shape for x in whole + parts)
    # And the loss, and four terms of a norm.
    assert DEVICES * numbers(parts) == sum(sizes_of_parameters(step, TABLES))
    assert numbers(whole) == sum(sizes_of_parameters(step)) - DEVICES * numbers(parts) + 1 + 4
    (loop,) = program.loops()
    assert sum(x.name.startswith("splash_mha") for x in loop) == 9
    assert not collectives(loop)


def test_gradients_of_large_stacks_are_scattered_not_reduced_whole():
    from benchmarks.compiled.collectives import collectives
    from benchmarks.compiled.for_tpu import devices_of
    from benchmarks.compiled.program import Program
    from benchmarks.compiled.tpu import use_tpu_compiler

    use_tpu_compiler()
    mesh = Mesh(np.array(devices_of("v5e", DEVICES)).reshape(-1, 1), ("data", "model"))
    whole, part = PartitionSpec(), PartitionSpec(None, "data", None)
    spread = jax.shard_map(
        lambda x: reduced({"value_embed": x}, {"value_embed": part})["value_embed"],
        mesh=mesh,
        in_specs=whole,
        out_specs=part,
        check_vma=False,
    )
    tables = jax.ShapeDtypeStruct((3, 50304, 768), "f4", sharding=NamedSharding(mesh, whole))
    found = collectives(Program(jax.jit(spread).lower(tables).compile()))
    assert "reduce-scatter" in found and "all-reduce" not in found


def test_chips_that_divide_parameters_gather_and_reduce_them_once_and_nothing_in_the_loop():
    from benchmarks.compiled.collectives import collectives

    step, program = compiled("divided")
    found = collectives(program)
    large = sum(size for size in sizes_of_parameters(step) if size > 1000)
    assert numbers(found["reduce-scatter"]) * DEVICES == large
    assert numbers(found["all-reduce"]) < 100  # scalars
    gathered = [x for x in found["all-gather"] if "f32" not in x.shape]
    assert 2 * numbers(gathered) + V * 256 == large  # in bfloat16, but for the embedding
    assert not collectives(program.loops()[0])


def test_chips_that_share_rows_exchange_the_stream_in_the_loop_and_gradients_after_it():
    from benchmarks.compiled.collectives import collectives, first_group

    _, program = compiled("shared rows")
    stream = f"bf16[{ROWS},{T},256]"
    (loop,) = program.loops()
    inside = collectives(loop)
    # Of two attentions and MLPs forward and backward, and of the features.
    assert set(inside) == {"all-reduce"} and len(inside["all-reduce"]) == 9
    assert all(x.shape.startswith(stream) for x in inside["all-reduce"])
    outside = [x for x in collectives(program)["all-reduce"] if x not in inside["all-reduce"]]
    over_data = [x for x in outside if first_group(x, DEVICES) == [0, 2, 4, 6]]
    # Half of two layers: four square matrices and two oblong ones.
    gradients = 2 * (4 * 256 * 256 + 2 * 256 * 512) // 2
    assert numbers(over_data) == pytest.approx(gradients, abs=20)  # and a few scalars
    assert all(numbers([x]) < numbers(over_data) for x in outside if x not in over_data)


def test_products_of_a_single_micro_batch_read_each_layer_s_matrix_by_itself():
    # A TPU loads a small matrix ahead of its use, but not a part of a stack.
    from benchmarks.compiled.for_tpu import lowered_on, plan_on
    from benchmarks.compiled.program import Program
    from benchmarks.compiled.tpu import use_tpu_compiler

    use_tpu_compiler()
    how = {"batch_size": ROWS, "sequence_length": T, "total_batch_size": ROWS * T}
    model = replace(BASELINE.model, **SMALL, num_layers=5)
    plan = plan_on(replace(BASELINE, model=model, **how), "v5e", 1)
    assert plan.shape(0) == (1, ROWS)
    program = Program(lowered_on(plan, "v5e", 0)["training step"].compile())
    products = [x for x in program.kernels() if re.search("jvp.*dot_general", x.attributes)]
    shapes = {
        program.computations[x.computation][name].shape for x in products for name in x.operands
    }
    assert any(shape.startswith("bf16[256,512]") for shape in shapes)
    # A stack that is loaded as a whole, ahead, is in S(1), the vector memory.
    assert not [x for x in shapes if x.startswith("bf16[5,") and "S(1)" not in x]


@pytest.mark.parametrize("name", RUNS)
def test_memory_is_what_the_choice_of_the_micro_batch_reckons_with(name):
    memory, plan = compiled(name)[0].memory_analysis(), plan_of(name)
    assert memory.argument_size_in_bytes == pytest.approx(plan.device_state_bytes, rel=0.05)
    # With fast compilation programs need more; fully optimized, half of the estimate.
    assert memory.temp_size_in_bytes < 1.3 * (plan.working_bytes + plan.activation_bytes)


def test_a_program_too_large_for_the_chip_is_halved_until_it_fits():
    from benchmarks.compiled.for_tpu import devices_of

    plan, tried = replace(plan_of("speedrun"), batch_size=4), []
    here = NamedSharding(Mesh(np.array(devices_of("v5e", 1)), ("chip",)), PartitionSpec())

    def prepare(plan):
        tried.append(plan.batch_size)
        x = jax.ShapeDtypeStruct((36_000 * plan.batch_size, 128), jnp.float32, sharding=here)
        # An array of 5 GB with one row, and of 21 and 83 GB with more.
        return jax.jit(lambda x: jnp.sin(jnp.sin(x @ x.T) @ x) @ x.T).lower(x).compile()

    first_that_fits(prepare, plan, lambda plan: plan.smaller())
    assert tried == [4, 2, 1]
