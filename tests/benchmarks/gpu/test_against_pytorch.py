"""The comparison with PyTorch: one tiny run end to end, its arithmetic, and every mistake.

The tests of the PyTorch side need a Python that has PyTorch: the one in the environment variable
TORCH_PYTHON, by default this one.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import processes, results
from benchmarks.command import ROOT, Mistake
from benchmarks.gpu import against_pytorch, sides
from benchmarks.gpu.against_pytorch import main
from benchmarks.gpu.sides import Size, gpt2_flops_per_token
from nanogpt.config import GPTConfig
from nanogpt.data.shards import read_shard
from nanogpt.devices.hardware import flops_per_token

TORCH_PYTHON = os.environ.get("TORCH_PYTHON") or (find_spec("torch") and sys.executable)
NEEDS_TORCH = pytest.mark.skipif(not TORCH_PYTHON, reason="no PyTorch: set TORCH_PYTHON")
FULL_SIZE = 12, 768, 1024, 50304  # L, D, T, V of GPT-2 small

NANOGPT = """\
Overriding config with config/train_gpt2.py:
tokens per iteration will be: 491,520
defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)
number of parameters: 123.59M
step 0: train loss 10.9897, val loss 10.9897
iter 0: loss 10.9886, time 61234.56ms, mfu -100.00%
iter 1: loss 10.2345, time 2000.00ms, mfu -100.00%
iter 2: loss 9.8765, time 1900.00ms, mfu -100.00%
iter 3: loss nan, time 1500.50ms, mfu 41.20%
iter 4: loss 9.1234, time 1400.50ms, mfu 41.30%
iter 5: loss 9.0123, time 1450.50ms, mfu 41.30%
"""
MODDED = """\
Compiling model and warming up kernels (~7 minutes on first execution)
step:0/1490 val_loss:10.8315 train_time:0ms step_avg:0.29ms
step:1/1490 train_time:117ms step_avg:117.01ms
step:2/1490 train_time:190ms step_avg:95.20ms
step:3/1490 val_loss:7.2798 train_time:260ms step_avg:86.67ms
peak memory allocated: 30632 MiB reserved: 31716 MiB
"""
MODDED_2024 = """\
step:1/1480 train_loss:10.8258 train_time:30000ms step_avg:nanms
step:11/1480 train_loss:7.1010 train_time:160ms step_avg:160.41ms
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, with results saved in it, on a machine with one CPU device."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # to compile in half the time
    return tmp_path


@pytest.fixture
def checkout(folder):
    """A folder whose train.py prints what it finds in output.txt and ends with its argument."""
    place = folder / "nanoGPT"
    place.mkdir()
    (place / "output.txt").write_text(NANOGPT)
    script = "import sys; print(open('output.txt').read(), end=''); sys.exit(int(sys.argv[1]))"
    (place / "train.py").write_text(script)
    return place


@pytest.fixture
def ours(monkeypatch):
    """Pretend that train_gpt.py ran on an H200, faster in the first run; the list of its runs."""
    runs = []

    def run_ours(size):
        runs.append(size)
        rate = 1.0e6 if len(runs) == 1 else 0.9e6
        milliseconds = 1e3 * size.tokens_per_step / rate
        figures = {"tokens_per_s": rate, "ms_per_step": milliseconds, "flops_per_token": 8e8}
        return figures | {"device": "NVIDIA H200"}

    monkeypatch.setattr(against_pytorch, "run_ours", run_ours)
    return runs


def program(path, line):
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


# End to end


def test_a_tiny_run_measures_both_sides_and_saves_their_ratio(
    folder, checkout, forked, monkeypatch
):
    run_ours = cache(sides.run_ours)  # the same for the time after
    monkeypatch.setattr(against_pytorch, "run_ours", lambda size: {**run_ours(size)})
    arguments = ["--tiny", "--checkout", "nanoGPT", "--checkout-command", "python train.py 0"]
    pytorch = ["--torch-python", TORCH_PYTHON] if TORCH_PYTHON else ["--no-pytorch"]
    assert main([*arguments, *pytorch]) == 0
    (file,) = (folder / "results").iterdir()
    assert file.name == "gpu_vs_pytorch_nanoGPT_tiny.json"
    figures = json.loads(file.read_text())
    assert figures.keys() > {"command", "date", "commit", "hardware", "jax"}
    assert "cpu" in figures["device"].lower()

    for side in (figures["before"], figures["after"]):
        assert side["tokens_per_step"] == 128
        assert side["tokens_per_s"] == pytest.approx(128 / (side["ms_per_step"] / 1000))
        assert side["mfu"] is None  # a CPU's peak is not known
    slower = min(figures[time]["tokens_per_s"] for time in ("before", "after"))
    nanogpt = figures["opponents"]["nanoGPT"]
    assert nanogpt["ms_per_step"] == 1450.5
    assert nanogpt["tokens_per_s"] == pytest.approx(338_862.46, abs=0.01)  # 491,520 / 1.4505
    assert nanogpt["ratio"] == pytest.approx(slower / 338_862.46)
    if TORCH_PYTHON:
        torch = figures["opponents"]["GPT-2 small in PyTorch"]
        assert torch["device"] == figures["device"]
        assert torch["tokens_per_s"] == pytest.approx(128 / (torch["ms_per_step"] / 1000))
        assert torch["ratio"] == pytest.approx(slower / torch["tokens_per_s"])
        assert math.isfinite(torch["first_step_s"])
        # An untrained model guesses uniformly; then it memorizes.
        assert torch["first_loss"] == pytest.approx(math.log(50304), abs=0.05)
        assert torch["last_loss"] < torch["first_loss"] - 0.05
        assert torch["flops_per_token"] == 19_908_864


# The sides


@NEEDS_TORCH
def test_the_model_in_pytorch_has_the_parameters_of_gpt2_small():
    code = (
        "import torch; from benchmarks.gpu.torch_model import GPT2; "
        "torch.set_default_device('meta'); "
        "print(sum(p.numel() for p in GPT2(12, 768, 12, 1024).parameters()))"
    )
    count = subprocess.run([TORCH_PYTHON, "-c", code], cwd=ROOT, text=True, capture_output=True)
    L, D, T, V = FULL_SIZE
    vectors = 4 * D + 9 * D  # two norms; the biases of 3D, D, 4D and D outputs
    expected = V * D + T * D + L * (12 * D**2 + vectors) + 2 * D
    assert int(count.stdout) == expected == 124_475_904


@NEEDS_TORCH
def test_a_token_of_the_model_in_pytorch_is_predicted_from_those_before_it_alone():
    # The loss of the first 7 of 8 targets is that of a row of 7: it does not see the eighth input.
    code = """
import torch
from benchmarks.gpu.torch_model import GPT2
torch.manual_seed(0)
model = GPT2(2, 64, 2, 8)
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.2)
row = torch.arange(9)[None] * 5000
targets = row[:, 1:].clone()
targets[:, 7] = -100  # cross_entropy leaves it out
print(model(row[:, :8], targets).item(), model(row[:, :7], row[:, 1:8]).item())
"""
    done = subprocess.run([TORCH_PYTHON, "-c", code], cwd=ROOT, text=True, capture_output=True)
    whole, part = map(float, done.stdout.split())
    assert whole == pytest.approx(part, rel=1e-5)


def test_flops_of_gpt2_small_are_those_of_a_plain_transformer_of_its_shape():
    L, D, T, V = FULL_SIZE
    # 12 * 12 * 768² + 50,304 * 768 weights; 12 layers see 512.5 keys on average
    assert gpt2_flops() == 6 * 123_568_128 + 12 * 768 * 512.5 * 12 == 798_087_168
    plain = GPTConfig(vocab_size=V, num_layers=L, num_heads=12, width=D, mlp_width=4 * D)
    assert gpt2_flops() == flops_per_token(plain, T)


def gpt2_flops():
    return gpt2_flops_per_token(*FULL_SIZE)


def ran(monkeypatch, device):
    """Call run_ours with known times on `device`; return its figures, command and shards."""
    seen = []

    def train(command, folder, environment, shown):
        seen.append(" ".join(command))
        seen.extend(read_shard(folder / f"{split}.bin").copy() for split in ("train", "val"))
        run = folder / "runs" / "jax"
        run.mkdir(parents=True)
        steps = [{"step": i, "step_time_s": s} for i, s in enumerate((90, 9, 0.5, 0.2, 0.4), 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        model = GPTConfig(num_layers=2, width=64, num_heads=2, mlp_width=128, windows=(4,))
        config = {"total_batch_size": 256, "sequence_length": 16, "model": asdict(model)}
        (run / "config.json").write_text(json.dumps(config))
        (run / "log.txt").write_text(f"baseline preset | x, 9 tokens | {device} | Ng = 1\n...\n")

    monkeypatch.setattr(processes, "output_of", train)
    size = Size(tokens_per_step=256, sequence_length=16, warm_up=2, steps=3, ours="--seed 7")
    return sides.run_ours(size), *seen


def test_our_time_is_the_median_of_the_steps_after_the_warm_up(monkeypatch):
    figures, command, train, val = ran(monkeypatch, "1 x NVIDIA H200")
    shape = GPTConfig(num_layers=2, width=64, num_heads=2, mlp_width=128, windows=(4,))
    assert figures == {
        "ms_per_step": pytest.approx(400),
        "tokens_per_step": 256,
        "tokens_per_s": pytest.approx(640),
        "flops_per_token": flops_per_token(shape, 16),
        "device": "NVIDIA H200",
    }
    assert len(train) > 5 * 256  # no token is repeated
    assert len(val) > 16
    assert train.max() < 50257
    assert "train_gpt.py --preset baseline --train-files train.bin --val-files val.bin" in command
    assert command.endswith("--num-steps 5 --sequence-length 16 --total-batch-size 256 --seed 7")


def test_the_slower_of_our_runs_counts_and_mfu_is_of_the_devices_peak(ours, checkout, capsys):
    command = ["--checkout-command", f"{sys.executable} train.py 0"]
    tokens = ["--checkout-tokens-per-step", "725250"]  # in 1.4505 s
    assert main(["--no-pytorch", "--checkout", "nanoGPT", *command, *tokens]) == 0
    figures = json.loads((results.FOLDER / "gpu_vs_pytorch_nanoGPT.json").read_text())
    assert [size.tokens_per_step for size in ours] == [524_288, 524_288]
    assert figures["before"]["mfu"] == pytest.approx(8e14 / 989.4e12)
    assert figures["after"]["mfu"] == pytest.approx(7.2e14 / 989.4e12)
    assert figures["opponents"]["nanoGPT"]["tokens_per_s"] == pytest.approx(0.5e6)
    assert figures["opponents"]["nanoGPT"]["ratio"] == pytest.approx(1.8)
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["NVIDIA H200"] == ["ms/step", "tokens/s", "FLOPs/token", "MFU", "ratio"]
    assert rows["train_gpt.py, before"] == ["524.3", "1,000,000", "8e+08", "80.9%"]
    assert rows["nanoGPT"] == ["1450.5", "500,000", "1.80"]
    assert rows["train_gpt.py, after"] == ["582.5", "900,000", "8e+08", "72.8%"]


def test_times_and_tokens_are_read_from_what_nanogpt_and_modded_nanogpt_print():
    times = sides.step_milliseconds
    assert times(NANOGPT) == statistics.median([1500.5, 1400.5, 1450.5])
    assert times(MODDED) == 86.67
    assert times(MODDED_2024) == 160.41
    assert times(MODDED_2024.splitlines()[0]) is None  # nan is not a time
    assert times(MODDED.splitlines()[1]) is None  # nor is the validation before the first step
    assert times("step 1/3 | train loss 10.8 | 400.0 ms") is None
    assert sides.printed_tokens_per_step(NANOGPT) == 491_520
    assert sides.printed_tokens_per_step(MODDED) is None


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("3,1", "3"), ("", "")])
def test_all_sides_see_the_first_gpu_and_no_other(monkeypatch, visible, first):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    printed = processes.output_of([sys.executable, "-c", code], Path(), sides.one_gpu())
    assert printed == first + "\n"


# Mistakes


def answer(capsys, *arguments):
    """Return the sentence about a mistake, and the lines below it; nothing may be saved."""
    assert main(list(arguments)) == 2
    sentence, *below = capsys.readouterr().err.splitlines()
    assert sentence.endswith(":" if below else ".")
    assert not results.FOLDER.exists()
    return sentence, below


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--no-pytorch"], ["nothing to compare", "--checkout"]),
        (["--torch-python", "no/python"], ["no/python", "No such file", "--torch-python"]),
        (["--torch-batch-size", "48"], ["48 rows", "524,288", "--torch-batch-size"]),
        (["--torch-batch-size", "0"], ["0 rows", "--torch-batch-size"]),
        (["--checkout", "nanoGPT"], ["--checkout-command"]),
        (["--checkout-command", "python train.py"], ["--checkout"]),
        (["--checkout", "nowhere", "--checkout-command", "python train.py"], ["nowhere"]),
        (["--checkout", "nanoGPT", "--checkout-command", "'"], ["--checkout-command"]),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_measured(
    checkout, ours, capsys, arguments, told
):
    sentence, below = answer(capsys, *arguments)
    for words in told:
        assert words in sentence
    assert (below, ours) == ([], [])


def test_a_python_without_pytorch_is_told_what_to_install_before_anything_is_measured(
    folder, ours, capsys
):
    bare = program(folder / "bare", f'exec "{sys.executable}" -I -S "$@"')  # no site-packages
    sentence, below = answer(capsys, "--torch-python", bare)
    assert "No module named 'torch'" in sentence
    for words in (bare, "pip install torch", "--torch-python", "--no-pytorch"):
        assert words in sentence
    assert (below, ours) == ([], [])


def test_pytorch_without_a_gpu_compares_at_the_tiny_size_only(folder, ours, capsys):
    sentence, below = answer(capsys, "--torch-python", program(folder / "cpu", "echo cpu"))
    assert "no GPU" in sentence
    assert "--tiny" in sentence
    assert (below, ours) == ([], [])


def test_two_devices_are_not_compared(folder, ours, capsys):
    other = program(folder / "other", "echo NVIDIA A100")
    sentence, below = answer(capsys, "--torch-python", other)
    assert "NVIDIA H200" in sentence
    assert "NVIDIA A100" in sentence
    assert (below, ours) == ([], [sides.FULL])


@pytest.mark.parametrize(
    ("command", "output", "told"),
    [
        ("python train.py 0", "no such thing\n", ["python train.py 0", "step's time"]),
        ("python train.py 0", MODDED, ["--checkout-tokens-per-step"]),
        ("python train.py 3", NANOGPT, ["python train.py 3", "status 3"]),
    ],
)
def test_a_checkout_that_cannot_be_measured_is_shown_by_the_end_of_its_output(
    checkout, ours, capsys, command, output, told
):
    (checkout / "output.txt").write_text(output)
    arguments = ["--no-pytorch", "--torch-python", sys.executable, "--checkout", "nanoGPT"]
    sentence, below = answer(capsys, *arguments, "--checkout-command", command)
    for words in told:
        assert words in sentence
    assert below == output.splitlines()[-10:]


def test_a_command_that_does_not_exist_is_told(checkout, ours, capsys):
    arguments = ["--no-pytorch", "--checkout", "nanoGPT", "--checkout-command", "no-such-program"]
    sentence, below = answer(capsys, *arguments)
    assert sentence == "no-such-program cannot be run (No such file or directory)."
    assert below == []


def test_training_on_several_devices_is_not_compared(monkeypatch):
    with pytest.raises(Mistake, match=r"one device: .* 8 x TPU v5p"):
        ran(monkeypatch, "8 x TPU v5p")
