"""What the network carries when many H200s train together, and what that lets one expect.

    .venv/bin/python -m benchmarks.scaling [--devices 8 64 512] [--sizes 124M 350M 774M 1.5B]

The real step is compiled for so many H200s, eight in each host, on a machine without any
(benchmarks/h200.py). Collectives, their bytes, and the memory of each device are read from the
compiled program. Times are PREDICTED from them: from published speeds of links, and an assumed
utilisation of the GPU. Nothing here was run.

It prints the tables of docs/scaling.md, and draws docs/scaling.png. About a quarter of an hour.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import jax

from benchmarks.h200 import Program, compile_step
from benchmarks.results import save
from benchmarks.sent import Sent, reduced, sent, wire_bytes
from nanogpt.config import ConfigError, Kernels
from nanogpt.devices.compilation import memory_of
from nanogpt.devices.hardware import PEAK_FLOPS, activation_bytes, flops_per_token, largest_batch
from nanogpt.optim.groups import group
from nanogpt.optim.muon import POLAR_EXPRESS
from nanogpt.optim.sharing import GROUP
from nanogpt.runs.environment import environment
from nanogpt.training.step import init_params
from train_gpt import PRESETS

SIZES = {"124M": "baseline", "350M": "gpt2-medium", "774M": "gpt2-large", "1.5B": "gpt2-xl"}
STEP_TOKENS = 524_288  # of a step, however many devices share it: strong scaling
DEVICE_TOKENS = 65_536  # of a device, however many there are: weak scaling


@dataclass(frozen=True)
class Machine:
    """Devices and links: bytes per second that each device can send while it receives as many."""

    device: str  # as JAX names it
    link: float  # to devices that it is joined to without a network
    nic: float | None  # to all others; None where there are none


# NVIDIA H200 data sheet: NVLink 4, 900 GB/s in both directions together. DGX H200 data sheet: a
# ConnectX-7 for each GPU, of 400 Gb/s (NDR InfiniBand).
H200 = Machine("NVIDIA H200", 450e9, 50e9)
# Google Cloud's documentation of TPU v5p: ICI of 1,200 GB/s per chip, in both directions together,
# and up to 8,960 chips in a pod. Here a ring uses all six links of a chip.
V5P = Machine("TPU v5p", 600e9, None)

UTILIZATION = 0.45  # ASSUMED share of the peak that passes and Muon reach


def muon_flops(size: str, devices: int) -> float:
    """FLOPs of Muon on the busiest device: its groups, each as costly as a full one."""
    shapes = jax.eval_shape(lambda: init_params(PRESETS[SIZES[size]].model, jax.random.key(0)))
    stacks: Counter = Counter()
    for path, leaf in jax.tree.leaves_with_path(shapes):
        if group(path, leaf) == "muon":
            stacks[tuple(sorted(leaf.shape[-2:]))] += prod(leaf.shape[:-2])
    total = 0.0
    for (m, k), count in stacks.items():
        groups = -(-count // GROUP)
        each = -(-groups // devices)
        total += each * GROUP * len(POLAR_EXPRESS) * (4 * m * m * k + 2 * m**3)
    return total


def compile_case(size: str, devices: int, model: int, shard_params: bool) -> dict:
    """What the step of a size sends and keeps on so many H200s, as compiled: for JSON."""
    hp = replace(PRESETS[SIZES[size]], shard_params=shard_params)
    T, readers = hp.sequence_length, devices // model
    rows = STEP_TOKENS // T // readers
    row_bytes = T * activation_bytes(hp.model, T, "bfloat16", flash=True)
    batch_size = largest_batch(rows, row_bytes, 0.9 * 141e9)
    compiled = compile_step(
        hp.model,
        Kernels("cudnn", tensor_parallel=model > 1),
        num_devices=devices,
        model_devices=model,
        batch_size=batch_size,
        sequence_length=T,
        accumulation_steps=rows // batch_size,
        hp=hp,
    )
    program, memory = Program(compiled), compiled.memory_analysis()
    all_reduced, early = reduced(program, devices, model)
    return {
        "size": size,
        "devices": devices,
        "model": model,
        "shard_params": shard_params,
        "batch_size": batch_size,
        "micro_batches": rows // batch_size,
        "memory_GB": memory_of(compiled) / 1e9,
        "state_GB": memory.argument_size_in_bytes / 1e9,
        "reduced_GB": all_reduced / 1e9,
        "reduced_early_GB": early / 1e9,
        "sent": [asdict(each) for each in sent(program, devices, rows // batch_size)],
    }


def seconds_of(each: Sent, machine: Machine) -> float:
    """How long something takes to send, without latencies."""
    wire = wire_bytes(each.kind, each.devices, each.bytes)
    if machine.nic is None or each.per_host == each.devices:
        return wire / machine.link
    # A ring through several hosts leaves each by the NICs of all its devices at once; of what each
    # sends to all, nearly all goes to other hosts by its own.
    return wire / (machine.nic * (1 if each.kind == "all-to-all" else each.per_host))


def predicted(case: dict, tokens_per_device: float, machine: Machine = H200) -> dict[str, float]:
    """Seconds of a step: computing, sending, and both with all hidden that can be, or nothing.

    Gradients may be on their way during the backward pass, two thirds of the computation, and
    gathered parameters during the forward pass. What Muon exchanges comes after, and what devices
    that share a row exchange stands between its layers: nothing hides that. Latencies are left out.
    """
    hp = PRESETS[SIZES[case["size"]]]
    peak = UTILIZATION * PEAK_FLOPS[machine.device]
    passes = tokens_per_device * flops_per_token(hp.model, hp.sequence_length) / peak
    muon = muon_flops(case["size"], case["devices"]) / peak
    gradients = parameters = open_ = 0.0
    for each in (Sent(**values) for values in case["sent"]):
        seconds = seconds_of(each, machine)
        if case["model"] > 1 and each.devices == case["model"] and each.kind == "all-reduce":
            # The one thing that there is more of with more tokens.
            open_ += seconds * tokens_per_device * case["devices"] / STEP_TOKENS
        elif each.kind in ("all-reduce", "reduce-scatter"):
            gradients += seconds
        elif each.kind == "all-gather" and case["shard_params"]:
            parameters += seconds
        else:
            open_ += seconds
    exposed = max(0.0, gradients - passes * 2 / 3) + max(0.0, parameters - passes / 3)
    return {
        "computing": passes + muon,
        "sending": gradients + parameters + open_,
        "all_hidden": passes + muon + open_ + exposed,
        "none_hidden": passes + muon + open_ + gradients + parameters,
    }


def name_of(case: dict) -> str:
    """How a case divides its work."""
    shared = f"data={case['devices'] // case['model']},model={case['model']}"
    divided = "shard_params" if case["shard_params"] else "data"
    return shared if case["model"] > 1 else divided


def table_of_sent(cases: Iterable[dict]) -> str:
    """What was read from the programs, in Markdown."""
    lines = [
        "| size | divided by | devices | GB sent | collectives | reduced early | "
        "GB of state | GB of memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        all_sent = [Sent(**values) for values in case["sent"]]
        wire = sum(wire_bytes(x.kind, x.devices, x.bytes) for x in all_sent)
        kinds = Counter()
        for x in all_sent:
            kinds[x.kind] += x.count
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        lines.append(
            f"| {case['size']} | {name_of(case)} | {case['devices']} | {wire / 1e9:.2f} | {told} | "
            f"{case['reduced_early_GB'] / case['reduced_GB']:.0%} | "
            f"{case['state_GB']:.2f} | {case['memory_GB']:.1f} |"
        )
    return "\n".join(lines)


def table_of_times(cases: Iterable[dict], machine: Machine) -> str:
    """What is predicted from that, in Markdown; efficiency is over the fewest devices of a kind."""
    lines = [
        f"| size | divided by | {machine.device}s | "
        "ms, strong | efficiency | ms, weak | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    firsts: dict[tuple, dict] = {}
    for case in cases:
        first = firsts.setdefault((case["size"], case["model"], case["shard_params"]), case)
        cells = []
        for tokens_on in (lambda n: STEP_TOKENS / n, lambda _: DEVICE_TOKENS):
            then, now = tokens_on(first["devices"]), tokens_on(case["devices"])
            before, after = predicted(first, then, machine), predicted(case, now, machine)
            most = then / before["all_hidden"]  # tokens per second and device
            low, high = (now / after[k] / most for k in ("none_hidden", "all_hidden"))
            cells.append(f"{1e3 * after['all_hidden']:.1f} to {1e3 * after['none_hidden']:.1f}")
            cells.append(f"{low:.0%} to {high:.0%}")
        cells = " | ".join(cells)
        lines.append(f"| {case['size']} | {name_of(case)} | {case['devices']} | {cells} |")
    return "\n".join(lines)


def draw(cases: Iterable[dict], path: Path) -> None:
    """Predicted throughput of strong and weak scaling, as the span from none to all hidden."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    cases = [case for case in cases if name_of(case) == "data"]
    for axis, strong in zip(axes, (True, False), strict=True):
        for number, size in enumerate(SIZES):
            of_size = [case for case in cases if case["size"] == size]
            if not of_size:
                continue
            counts = [case["devices"] for case in of_size]
            rates = {}
            for bound in ("all_hidden", "none_hidden"):
                per_device = [STEP_TOKENS / n if strong else DEVICE_TOKENS for n in counts]
                rates[bound] = [
                    n * tokens / predicted(case, tokens)[bound]
                    for n, tokens, case in zip(counts, per_device, of_size, strict=True)
                ]
            colour = f"C{number}"
            axis.fill_between(counts, *rates.values(), alpha=0.3, color=colour, linewidth=0)
            axis.plot(counts, rates["all_hidden"], "o-", color=colour, label=size)
            ideal = [rates["all_hidden"][0] * n / counts[0] for n in counts]
            axis.plot(counts, ideal, ":", color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="H200s")
        axis.set_xticks([8, 64, 512], ["8", "64", "512"])
        axis.minorticks_off()
        kind = f"{STEP_TOKENS:,} tokens per step" if strong else f"{DEVICE_TOKENS:,} tokens per GPU"
        axis.set_title(f"{'strong' if strong else 'weak'} scaling: {kind}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens per second, predicted")
    axes[1].legend(title="data parallel; dotted: ideal")
    figure.suptitle("Prediction from the compiled step and published link speeds: nothing was run")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile each case, then print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args(arguments)
    ways = [(1, False), (1, True)]
    began, cases = environment(), []
    for size in options.sizes:
        # Two devices can share the heads of 350M; 25 heads have no half.
        for model, shard_params in [*ways, (2, False)] if size == "350M" else ways:
            for devices in options.devices:
                try:
                    case = compile_case(size, devices, model, shard_params)
                except ConfigError as error:  # so many devices cannot divide the parameters
                    print(f"{size}, {devices} GPUs: {error}")
                    continue
                cases.append(case)
                print(f"{size}, {name_of(case)}, {devices} GPUs: {case['sent']}", flush=True)
                # After each, so that nothing is lost; the file itself makes later commits dirty.
                save("scaling", began | {"cases": cases})
    print(table_of_sent(cases))
    for machine in (H200, V5P):
        print(f"\n{table_of_times(cases, machine)}")
    draw(cases, Path("docs/scaling.png"))


if __name__ == "__main__":
    main()
