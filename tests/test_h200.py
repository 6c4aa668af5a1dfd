"""The speedrun's training step, compiled for H200s: what it holds can be read without one."""

import re
from functools import cache
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from nanogpt.config import GPTConfig, Kernels
from nanogpt.hardware import activation_bytes

pytestmark = pytest.mark.skipif(
    not (find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin")),
    reason='needs JAX\'s CUDA plugin: pip install -e ".[gpu-compiler]"',
)

CONFIG = GPTConfig(windows=(384, 0))
B, T = 64, 1024
V = CONFIG.padded_vocab_size


@cache
def compiled(kernels, num_devices=1):
    from benchmarks.h200 import Program, compile_step

    step = compile_step(CONFIG, kernels, num_devices=num_devices, batch_size=B, sequence_length=T)
    return step, Program(step)


def custom_calls(program, target):
    return [x for x in program.kernels() if f'custom_call_target="{target}"' in x.attributes]


def stored_logits(program, dtype):
    """Arrays of a number for each token and id that reach the memory."""
    shape = re.compile(rf"\b{dtype}\[(\d{{4,}}|{B},{T}),{V}\]")
    return [x for x in program.kernels() if shape.search(x.shape)]


CUDNN = Kernels("cudnn")
OWN = Kernels("pallas", "pallas", fp8_head=True)


def test_every_layer_calls_cudnn_forward_and_backward_with_its_window():
    _, program = compiled(CUDNN)
    for direction in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        calls = custom_calls(program, direction)
        windows = [
            int(re.search(r'"sliding_window_length": ?(\d+)', x.attributes)[1]) for x in calls
        ]
        assert len(calls) == CONFIG.num_layers
        assert sorted(windows) == 6 * [0] + 6 * [384]


def test_the_projects_own_kernels_are_in_the_step_when_asked_for():
    _, program = compiled(OWN)
    calls = custom_calls(program, "__gpu$xla.gpu.triton")
    of_the_loss = [x for x in calls if "cross_entropy" in x.attributes]
    assert of_the_loss
    # Attention has one kernel forward and two backward.
    assert len(calls) - len(of_the_loss) == 3 * CONFIG.num_layers
    assert not custom_calls(program, "__cudnn$fmhaSoftmax")


@pytest.mark.parametrize("kernels", [CUDNN, OWN])
def test_logits_are_stored_but_never_in_float32(kernels):
    _, program = compiled(kernels)
    assert stored_logits(program, "bf16")
    assert not stored_logits(program, "f32")


@pytest.mark.parametrize("kernels", [CUDNN, OWN])
def test_memory_is_what_the_choice_of_the_micro_batch_reckons_with(kernels):
    step, _ = compiled(kernels)
    reckoned = B * T * activation_bytes(CONFIG, T, "bfloat16", flash=True)
    kept = step.memory_analysis().temp_size_in_bytes
    assert 0.7 * reckoned < kept < 1.02 * reckoned


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

    assert not eight_bit_products(compiled(CUDNN)[1])
    found = eight_bit_products(compiled(OWN)[1])
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


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(instructions):
    """By kind; of the two halves of an asynchronous one, that which has the result's shape."""
    found = {}
    for x in instructions:
        for kind in COLLECTIVES:
            if x.opcode in (kind, f"{kind}-done"):
                found.setdefault(kind, []).append(x)
    return found


def test_one_gpu_talks_to_nobody():
    assert not collectives(compiled(CUDNN)[1])


def test_eight_gpus_reduce_each_gradient_once_in_float32_and_nothing_in_a_loop():
    step, program = compiled(CUDNN, num_devices=8)
    found = collectives(program)
    assert set(found) == {"all-reduce", "all-gather"}
    parameters = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(step.in_avals[0][0].params))
    reduced = [x.shape for x in found["all-reduce"]]
    assert sum(map(items_of, reduced)) == parameters + 1  # and the loss
    assert all("f32[" in shape and "bf16" not in shape for shape in reduced)
    assert program.loops()
    for loop in program.loops():
        assert not collectives(loop)


def test_eight_gpus_gather_the_matrices_that_each_orthogonalised_in_bfloat16():
    _, program = compiled(CUDNN, num_devices=8)
    gathered = [re.search(r"\w+\[[\d,]+\]", x.shape)[0] for x in collectives(program)["all-gather"]]
    # 48 square and 24 oblong matrices, each kind in eight groups of eight, some of them idle.
    assert sorted(gathered) == ["bf16[8,8,768,3072]", "bf16[8,8,768,768]"]
