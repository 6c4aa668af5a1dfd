"""What the network carries when many H200s train together, and what that lets one expect.

    .venv/bin/python -m benchmarks.scaling [--devices 8 64 512] [--sizes 124M 350M 774M 1.5B]

The real step is compiled for so many H200s, eight in each host, on a machine without any
(benchmarks/h200.py). Collectives, their bytes, and the memory of each device are read from the
compiled program. Times are PREDICTED from them: from published speeds of links, and an assumed
utilisation of the GPU. Nothing here was run.

It prints the tables of docs/scaling.md, and draws docs/scaling.png. About twenty minutes.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import jax
import numpy as np

from benchmarks.h200 import Instruction, Program, collectives, compile_step, size_of
from benchmarks.results import save
from nanogpt.compilation import memory_of
from nanogpt.config import ConfigError, Kernels
from nanogpt.environment import environment
from nanogpt.hardware import PEAK_FLOPS, activation_bytes, flops_per_token, largest_batch
from nanogpt.muon import GROUP, POLAR_EXPRESS
from nanogpt.optimizer import group
from nanogpt.step import init_params
from train_gpt import PRESETS

SIZES = {"124M": "baseline", "350M": "gpt2-medium", "774M": "gpt2-large", "1.5B": "gpt2-xl"}
STEP_TOKENS = 524_288  # of a step, however many devices share it: strong scaling
DEVICE_TOKENS = 65_536  # of a device, however many there are: weak scaling
HOST = 8  # GPUs that NVLink joins

# Bytes per second that each device can send while it receives as many.
NVLINK = 450e9  # NVIDIA H200 data sheet: NVLink 4, 900 GB/s in both directions together
NIC = 50e9  # NVIDIA ConnectX-7 data sheet: NDR InfiniBand, 400 Gb/s; a DGX H200 has one per GPU
RAILS = HOST * NIC  # a ring through all hosts leaves each by all of its NICs at once
ICI = 300e9  # Google Cloud's documentation of TPU v5p: 4,800 Gb/s per chip, in both directions

UTILIZATION = 0.45  # ASSUMED share of the peak that forward and backward passes reach, and Muon


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind among so many devices at a time, in one optimizer step."""

    kind: str
    devices: int
    per_host: int  # of these devices
    count: int
    bytes: int  # of their results, whole: for a reduce-scatter, of its operands


def wire_bytes(kind: str, devices: int, size: int) -> float:
    """Bytes that each device sends for an array of `size` bytes, whole, by a ring.

    The least there can be (Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002): an all-reduce
    is a reduce-scatter and an all-gather, each of which takes every device's part past all others.
    In an all-to-all each keeps one part of its own.
    """
    once = size * (devices - 1) / devices
    return {"all-reduce": 2 * once, "all-to-all": once / devices}.get(kind, once)


def first_group(instruction: Instruction, num_devices: int) -> list[int]:
    """The first devices that exchange something with each other: XLA has four ways to name them.

    {}                                             all
    {{0,2},{1,3}}                                  in full
    [2,2]<=[2,2]T(1,0)                             rows of counted devices, transposed
    mesh['a'=2,'b'=2], device_ids=([4]) {'a'}      along axes of a mesh of such
    """
    _, _, text = instruction.attributes.partition("replica_groups=")
    order = r"(\[[\d,]+\](?:T\([\d,]+\))?)"
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return [int(n) for n in listed[1].split(",")]
    if rows := re.match(rf"\[\d+,(\d+)\]<={order}", text):
        return counted(rows[2])[: int(rows[1])].tolist()
    if mesh := re.match(rf"mesh\[([^\]]+)\](?:, device_ids=\({order}\))? \{{([^}}]+)\}}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        ids = counted(mesh[2] or f"[{num_devices}]").reshape(*sizes.values())
        ids = np.moveaxis(ids, along, range(-len(along), 0))
        return ids.reshape(-1, prod(ids.shape[-len(along) :]))[0].tolist()
    if text and not text.startswith("{}"):
        raise ValueError(f"Devices named in a way unknown here: replica_groups={text[:100]}")
    return list(range(num_devices))


def counted(order: str) -> np.ndarray:
    """Numbers from 0 as HLO orders them: "[2,2]T(1,0)" is 0, 2, 1, 3."""
    sizes, axes = (
        [int(n) for n in re.findall(r"\d+", part)] for part in (order + "T").split("T")[:2]
    )
    return np.arange(prod(sizes)).reshape(sizes).transpose(axes or None).ravel()


def sent(program: Program, num_devices: int, micro_batches: int) -> list[Sent]:
    """All that is sent in a step; what stands in the loop over micro-batches, that many times."""
    # An asynchronous collective tells its groups where it starts, and its result where it is done.
    starts = {x.name: x for x in program}
    looped = {x.name for x in (program.loops() or [[]])[0]} if micro_batches > 1 else set()
    counts, sizes = Counter(), Counter()
    for kind, found in collectives(program).items():
        for each in found:
            begun = each
            if each.opcode.endswith("-done"):
                begun = next(starts[name] for name in each.operands if name in starts)
            members = first_group(begun, num_devices)
            devices, per_host = len(members), max(Counter(n // HOST for n in members).values())
            times = micro_batches if each.name in looped else 1
            whole = size_of(each.shape) * (
                devices if kind in ("reduce-scatter", "all-to-all") else 1
            )
            counts[kind, devices, per_host] += times
            sizes[kind, devices, per_host] += times * whole
    return [Sent(*key, counts[key], sizes[key]) for key in sorted(counts)]


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
    return {
        "size": size,
        "devices": devices,
        "model": model,
        "shard_params": shard_params,
        "batch_size": batch_size,
        "micro_batches": rows // batch_size,
        "memory_GB": memory_of(compiled) / 1e9,
        "state_GB": memory.argument_size_in_bytes / 1e9,
        "sent": [asdict(each) for each in sent(program, devices, rows // batch_size)],
    }


def predicted(case: dict, tokens_per_device: float, link: float | None = None) -> dict[str, float]:
    """Seconds of a step: computing, sending what may overlap with it, and what may not.

    Gradients may be on their way during the backward pass, two thirds of the computation, and
    gathered parameters during the forward pass. What Muon exchanges comes after, and what devices
    that share a row exchange stands between its layers: nothing hides that. Latencies are left out.
    """
    hp = PRESETS[SIZES[case["size"]]]
    peak = UTILIZATION * PEAK_FLOPS["NVIDIA H200"]
    flops = flops_per_token(hp.model, hp.sequence_length) / case["model"]
    passes = tokens_per_device * case["model"] * flops / peak
    muon = muon_flops(case["size"], case["devices"]) / peak
    hidden = {"gradients": 0.0, "parameters": 0.0}
    open_ = 0.0
    for each in (Sent(**values) for values in case["sent"]):
        speed = link or (NVLINK if each.devices <= HOST else RAILS)
        if each.kind == "all-to-all" and each.devices > HOST and not link:
            speed = NIC  # nearly all of it goes to other hosts
        seconds = wire_bytes(each.kind, each.devices, each.bytes) / speed
        of_rows = case["model"] > 1 and each.devices == case["model"]
        if of_rows and each.kind == "all-reduce":
            open_ += seconds
        elif each.kind in ("all-reduce", "reduce-scatter"):
            hidden["gradients"] += seconds
        elif each.kind == "all-gather" and case["shard_params"]:
            hidden["parameters"] += seconds
        else:
            open_ += seconds
    best = passes + muon + open_
    best += max(0.0, hidden["gradients"] - passes * 2 / 3)
    best += max(0.0, hidden["parameters"] - passes / 3)
    return {
        "computing": passes + muon,
        "sending": sum(hidden.values()) + open_,
        "all_hidden": best,
        "none_hidden": passes + muon + sum(hidden.values()) + open_,
    }


def name_of(case: dict) -> str:
    """How a case divides its work."""
    shared = f"data={case['devices'] // case['model']},model={case['model']}"
    divided = "shard_params" if case["shard_params"] else "data"
    return shared if case["model"] > 1 else divided


def tables(cases: Iterable[dict]) -> str:
    """What was read from the programs, and what is predicted from it, in Markdown."""
    cases = list(cases)
    lines = [
        "| size | divided by | H200s | GB sent | collectives | GB of state | GB of memory |",
        "|---|---|---|---|---|---|---|",
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
            f"{case['state_GB']:.2f} | {case['memory_GB']:.1f} |"
        )
    lines += [
        "",
        "| size | divided by | H200s | ms, strong | efficiency | ms, weak | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    firsts: dict[tuple, dict] = {}
    for case in cases:
        n = case["devices"]
        first = firsts.setdefault((case["size"], name_of(case)), case)
        cells = []
        for tokens in (STEP_TOKENS / n, DEVICE_TOKENS):
            now = predicted(case, tokens)
            strong = tokens != DEVICE_TOKENS
            begin = predicted(first, STEP_TOKENS / first["devices"] if strong else tokens)
            grown = n / first["devices"] if strong else 1
            low, high = (
                begin["all_hidden"] / now[k] / grown for k in ("none_hidden", "all_hidden")
            )
            cells.append(f"{1e3 * now['all_hidden']:.1f} to {1e3 * now['none_hidden']:.1f}")
            cells.append(f"{low:.0%} to {high:.0%}")
        lines.append(f"| {case['size']} | {name_of(case)} | {n} | {' | '.join(cells)} |")
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


def main() -> None:
    """Compile each case, then print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
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
    print(tables(cases))
    draw(cases, Path("docs/scaling.png"))


if __name__ == "__main__":
    main()
