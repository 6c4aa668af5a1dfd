"""The speedrun's training steps, compiled for H200s: what can be verified without a GPU."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from benchmarks.compiled.for_tpu import NO_DATA
from nanogpt.config import Kernels
from nanogpt.devices.hardware import activation_bytes
from nanogpt.training.plan import Hardware, make_plan
from train_gpt import PRESETS

pytestmark = [
    pytest.mark.usefixtures("compiled_fully"),
    pytest.mark.skipif(
        not (find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin")),
        reason='needs JAX\'s CUDA plugin: pip install -e ".[gpu-compiler]"',
    ),
]

# With five layers it compiles sooner: one has no attention, and two have long windows.
MODEL = replace(
    PRESETS["speedrun"].model,
    **{"num_layers": 5, "mlp_only": (2,), "key_offset": (1, 4), "paired_heads": (0,)},
    **{"skips": ((1, 2),), "attention_source": 3, "exclusive": (1, 3)},
    **{"gated": (1, 4), "composed": (4,)},
    **{"value_embeddings": 3, "value_layers": (1, 3, 4)},
)
STAGES = tuple(
    replace(stage, windows=tuple(stage.windows[layer] for layer in (0, 3, 6, 7, 10)))
    for stage in PRESETS["speedrun"].stages
)
HP = replace(PRESETS["speedrun"], model=MODEL, stages=STAGES)
V = HP.model.padded_vocab_size
CUDNN = Kernels("cudnn")  # has no document mask
CHOSEN = Kernels("pallas")  # by choose_attention, as the speedrun has one
OWN = Kernels("pallas", "pallas", fp8_head=True)


@cache
def compiled(stage, kernels, num_devices=1):
    from benchmarks.compiled.for_h200 import compile_stage
    from benchmarks.compiled.program import Program

    hp = HP
    if kernels == CUDNN:
        hp = replace(HP, model=replace(HP.model, document_separator=None))
    step = compile_stage(hp, stage, kernels, num_devices)
    return step, Program(step)


# Stage, kernels and devices: each takes a few seconds to compile, and is used by several tests.
THIRD = (2, CHOSEN)  # the largest batch
THIRD_BY_CUDNN = (2, CUDNN)
FIRST_BY_OWN = (0, OWN)  # three targets, and a tied head
TABLES = ("embed", "value_embed", "bigram_embed", "head")  # sharded in any run
LAST_ON_EIGHT = (3, CHOSEN, 8)  # the longest windows


def custom_calls(program, target):
    return [x for x in program.kernels() if f'custom_call_target="{target}"' in x.attributes]


def stored_logits(program, dtype):
    """Return the arrays with a number per token and id that are stored in memory."""
    shape = re.compile(rf"\b{dtype}\[(\d{{4,}}|\d+,\d{{4,}}),{V}\]")
    return [x for x in program.kernels() if shape.search(x.shape)]


def test_without_documents_every_attention_calls_cudnn_forward_and_backward_with_its_window():
    _, program = compiled(*THIRD_BY_CUDNN)
    for direction in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        calls = custom_calls(program, direction)
        windows = [
            int(re.search(r'"sliding_window_length": ?(\d+)', x.attributes)[1]) for x in calls
        ]
        assert Counter(windows) == {640: 2, 1408: 2}


@pytest.mark.parametrize("which", [THIRD, FIRST_BY_OWN])
def test_the_projects_own_kernels_are_in_the_step_when_asked_for(which):
    _, program = compiled(*which)
    calls = custom_calls(program, "__gpu$xla.gpu.triton")
    of_the_loss = [x for x in calls if "cross_entropy" in x.attributes]
    assert bool(of_the_loss) == (which == FIRST_BY_OWN)
    # Attention has one kernel forward and two backward.
    assert len(calls) - len(of_the_loss) == 3 * HP.model.num_attentions
    assert not custom_calls(program, "__cudnn$fmhaSoftmax")


@pytest.mark.parametrize("which", [THIRD, FIRST_BY_OWN])
def test_logits_are_stored_but_never_in_float32(which):
    _, program = compiled(*which)
    assert stored_logits(program, "bf16")
    assert not stored_logits(program, "f32")


@pytest.mark.parametrize("which", [THIRD, FIRST_BY_OWN])
def test_memory_is_what_the_choice_of_the_micro_batch_reckons_with(which):
    step, _ = compiled(*which)
    reckoned = 65_536 * activation_bytes(HP.model, 16_384, "bfloat16", flash=True)
    kept = step.memory_analysis().temp_size_in_bytes
    assert 0.7 * reckoned < kept < 1.02 * reckoned


def test_layers_computed_again_need_the_memory_that_is_reckoned_for_them():
    from benchmarks.compiled.for_h200 import compile_step

    hp, rows, T = PRESETS["gpt2-medium"], 32, 1024
    model = replace(hp.model, num_layers=4)
    step = compile_step(
        model,
        Kernels("cudnn", rematerialize=True),
        batch_size=rows,
        sequence_length=T,
        hp=hp,
    )
    kept = step.memory_analysis().temp_size_in_bytes
    whole, again = (rows * T * activation_bytes(model, T, "bfloat16", True, r) for r in (0, 1))
    assert kept < 0.5 * whole
    # The gradient of the logits overwrites them.
    in_place = again - 2 * rows * T * V
    assert 0.8 * in_place < kept < 1.05 * in_place


@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", "pallas"), ("float32", "xla")])
def test_a_step_with_few_rows_needs_the_memory_that_was_planned(dtype, kernel):
    from benchmarks.compiled import plans

    hp = replace(PRESETS["gpt2-medium"], dtype=dtype, batch_size=2)
    hp = replace(hp, model=replace(hp.model, num_layers=8, vocab_size=1024))
    plan = make_plan(hp, Hardware("GPU", 1, 1, 40e9), NO_DATA, kernel, "")
    assert 0.9 * plan.device_bytes < plans.bytes_compiled(plan) < 1.02 * plan.device_bytes


def test_an_fp8_head_multiplies_8_bit_floats_in_all_three_products():
    def eight_bit_products(program):
        found = set()
        for x in program:
            if x.opcode == "dot" or "$f8" in x.attributes:
                scope = program.computations[x.computation]
                kinds = [re.match(r"f8\w+", scope[name].shape) for name in x.operands[:2]]
                if all(kinds):
                    found.add((kinds[0][0], kinds[1][0], re.sub(r"\{.*", "", x.shape)))
        return found

    assert not eight_bit_products(compiled(*THIRD)[1])
    found = eight_bit_products(compiled(*FIRST_BY_OWN)[1])
    assert {kinds[:2] for kinds in found} == {
        ("f8e4m3fn", "f8e4m3fn"),  # logits
        ("f8e5m2", "f8e4m3fn"),  # gradient of the features
        ("f8e4m3fn", "f8e5m2"),  # gradient of the head
    }


def items_of(shape):
    return sum(
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(r"\[([\d,]*)\]", shape)
    )


def size_of_parameters(step, names=None):
    params = jax.tree.leaves_with_path(step.in_avals[0][0].params)
    return sum(int(np.prod(p.shape)) for path, p in params if not names or path[-1].key in names)


def test_one_gpu_talks_to_nobody():
    from benchmarks.compiled.collectives import collectives

    assert not collectives(compiled(*THIRD)[1])


def test_eight_gpus_reduce_each_gradient_once_in_float32_and_nothing_in_a_loop():
    from benchmarks.compiled.collectives import collectives

    step, program = compiled(*LAST_ON_EIGHT)
    found = collectives(program)
    assert set(found) == {"all-reduce", "reduce-scatter", "all-gather"}
    whole, parts = ([x.shape for x in found[kind]] for kind in ("all-reduce", "reduce-scatter"))
    assert all("f32[" in shape and "bf16" not in shape for shape in whole + parts)
    # And the loss, and four terms of a norm.
    assert 8 * sum(map(items_of, parts)) == size_of_parameters(step, TABLES)
    others = size_of_parameters(step) - size_of_parameters(step, TABLES)
    assert sum(map(items_of, whole)) == others + 1 + 4
    assert program.loops()
    for loop in program.loops():
        assert not collectives(loop)


def test_eight_gpus_gather_the_matrices_that_each_orthogonalized_in_bfloat16():
    from benchmarks.compiled.collectives import collectives

    _, program = compiled(*LAST_ON_EIGHT)
    gathered = [re.search(r"\w+\[[\d,]+\]", x.shape)[0] for x in collectives(program)["all-gather"]]
    # The 24 matrices of queries and keys, for pairs of heads, are three groups of eight, the 10 of
    # MLPs two, the second not full; four or two devices compute them. The 8 square matrices are one
    # group, which every device computes by itself.
    matrices = [shape for shape in gathered if shape.count(",") == 3]
    assert sorted(matrices) == ["bf16[2,8,768,3072]", "bf16[4,8,256,768]"]


def test_eight_gpus_gather_the_tables_that_are_rounded_anyway_in_bfloat16():
    from benchmarks.compiled.collectives import collectives

    _, program = compiled(*LAST_ON_EIGHT)
    gathered = [re.search(r"\w+\[[\d,]+\]", x.shape)[0] for x in collectives(program)["all-gather"]]
    tables = [shape for shape in gathered if shape.count(",") < 3]
    buckets, C, D = MODEL.bigram_buckets, MODEL.bigram_width, MODEL.width
    assert sorted(tables) == sorted(
        [f"bf16[3,{V},{D}]", f"bf16[{buckets},{C}]", f"bf16[{D},{V}]", f"f32[{V},{D}]"]
    )


def in_order(step, *marks):
    """Return the kinds of the instructions with a known mark, in the order of the schedule."""
    from benchmarks.compiled.program import Program

    text = step.as_text()
    assert "is_scheduled=true" in text
    found = []
    for x in Program(step):
        found += [m for m in marks if m == x.opcode or f'custom_call_target="{m}"' in x.attributes]
    return found


@cache
def small_baseline(shard_params, accumulation_steps=1):
    from benchmarks.compiled.for_h200 import compile_step

    hp = replace(PRESETS["baseline"], shard_params=shard_params)
    return compile_step(
        replace(hp.model, num_layers=4),
        CUDNN,
        num_devices=8,
        batch_size=32,
        sequence_length=1024,
        accumulation_steps=accumulation_steps,
        hp=hp,
    )


def test_gradients_are_on_their_way_before_the_backward_pass_has_ended():
    from benchmarks.compiled.collectives import is_backward_product, reduced
    from benchmarks.compiled.program import Program

    step = small_baseline(False)
    program = Program(step)
    assert "is_scheduled=true" in step.as_text()
    # Attention's two products for gradients are one kernel; four matrices and a head have two each.
    assert sum(map(is_backward_product, program)) >= 4 * (1 + 2 * 4)
    whole, early = reduced(program, 8)
    assert whole == 4 * (size_of_parameters(step) + 1 + 2)  # and the loss, and terms of a norm
    assert early > 0.1 * whole


def test_with_several_micro_batches_nothing_is_reduced_before_the_last_has_ended():
    from benchmarks.compiled.collectives import reduced
    from benchmarks.compiled.program import Program

    whole, early = reduced(Program(small_baseline(True, accumulation_steps=2)), 8)
    assert whole > 0
    assert early == 0


def test_layers_in_parts_are_gathered_while_those_before_them_are_computed():
    forward = "__cudnn$fmhaSoftmax"
    order = in_order(small_baseline(True), "all-gather-start", forward)
    assert "all-gather-start" in order[order.index(forward) :]


def test_parameters_in_parts_take_an_eighth_and_send_nothing_in_the_accumulation_loop():
    from benchmarks.compiled.collectives import collectives
    from benchmarks.compiled.program import Program

    step = small_baseline(True)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.in_avals[0][0]))
    assert step.memory_analysis().argument_size_in_bytes < state / 7.5
    program = Program(small_baseline(True, accumulation_steps=2))
    assert program.loops()
    assert not any(collectives(loop) for loop in program.loops())
    assert set(collectives(program)) == {
        *("all-gather", "reduce-scatter"),  # parameters, and their gradients
        *("all-to-all", "all-reduce"),  # for Muon; and scalars
    }
