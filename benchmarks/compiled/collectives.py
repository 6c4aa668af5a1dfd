"""The communication between devices in a step, read from the compiled step."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np

from benchmarks.compiled.program import Instruction, Program, size_of

HOST = 8  # GPUs connected by NVLink
SCATTER = "all-reduce-scatter"  # what XLA calls such a fusion for TPUs
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind and group size in one optimizer step."""

    kind: str
    devices: int  # in each group
    per_host: int  # of these devices
    count: int
    bytes: int  # of their whole results; for a reduce-scatter, of its operands


def collectives(instructions: Iterable[Instruction]) -> dict[str, list[Instruction]]:
    """Return the collectives, by kind.

    Of the two halves of an asynchronous collective, the one with the shape of the result. The parts
    of a collective that a TPU interleaves with other work form a chain and count as one. For TPUs
    XLA writes large reduce-scatters as fusions of an all-reduce and a slice.
    """
    found, chains = defaultdict(list), set()
    for x in instructions:
        kind, chain = x.opcode.removesuffix("-done"), re.findall(r'chain_id="\d+"', x.attributes)
        if x.computation.startswith(SCATTER):
            continue
        if f"calls=%{SCATTER}" in x.attributes:
            kind = "reduce-scatter"
        if kind in COLLECTIVES and chains.isdisjoint(chain):
            found[kind].append(x)
            chains.update(chain)
    return dict(found)


def wire_bytes(kind: str, devices: int, size: int) -> float:
    """Return the bytes each device sends in a ring, for a whole array of `size` bytes.

    This is the minimum (Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002): an all-reduce
    is a reduce-scatter and an all-gather, each of which passes every device's shard to all others.
    In an all-to-all each device keeps one part of its own shard.
    """
    once = size * (devices - 1) / devices
    return {"all-reduce": 2 * once, "all-to-all": once / devices}.get(kind, once)


def first_group(instruction: Instruction, num_devices: int) -> list[int]:
    """Return the first of the groups of devices that communicate. XLA writes them in four ways:

    {}                                             all devices
    {{0,2},{1,3}}                                  listed in full
    [2,2]<=[2,2]T(1,0)                             rows of numbered devices, transposed
    mesh['a'=2,'b'=2], device_ids=([4]) {'a'}      along axes of a mesh of numbered devices
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
        raise ValueError(f"Unknown notation for groups of devices: replica_groups={text[:100]}")
    return list(range(num_devices))


def counted(order: str) -> np.ndarray:
    """Return numbers from 0 in an order in HLO's notation: "[2,2]T(1,0)" is 0, 2, 1, 3."""
    sizes, axes = (
        [int(n) for n in re.findall(r"\d+", part)] for part in (order + "T").split("T")[:2]
    )
    return np.arange(prod(sizes)).reshape(sizes).transpose(axes or None).ravel()


def reduced(program: Program, num_devices: int, model: int = 1) -> tuple[int, int]:
    """Return the bytes reduced over more than `model` devices, and how many of them start early.

    Early means before the last matmul of the backward pass, which can overlap with them.
    """
    whole = early = 0
    for computation in program.computations.values():
        order = list(computation.values())
        last = max((i for i, x in enumerate(order) if is_backward_product(x)), default=-1)
        for i, each in enumerate(order):
            starts = each.opcode in ("all-reduce-start", "reduce-scatter-start")
            if starts and len(first_group(each, num_devices)) > model:
                size = sum(size_of(computation[name].shape) for name in each.operands)
                whole, early = whole + size, early + size * (i < last)
    return whole, early


def is_backward_product(instruction: Instruction) -> bool:
    """Return whether it is a matmul or attention in the backward pass."""
    text = instruction.attributes
    return "transpose(jvp" in text and any(x in text for x in ("gemm", "__cublas", "fmha"))


def sent(program: Program, num_devices: int, micro_batches: int) -> list[Sent]:
    """Return all communication in a step; in the loop over micro-batches, each iteration counts."""
    # Of an asynchronous collective, the start has the groups, and the done has the result.
    starts = {x.name: x for x in program}
    looped = {x.name for x in (program.loops() or [[]])[0]} if micro_batches > 1 else set()
    counts, sizes = Counter(), Counter()
    for kind, found in collectives(program).items():
        for each in found:
            begun = each
            if called := re.search(rf"calls=%({SCATTER}[.\d]*)", each.attributes):
                inside = program.computations[called[1]]
                (begun,) = (x for x in inside.values() if x.opcode == "all-reduce")
            elif each.opcode.endswith("-done"):
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
