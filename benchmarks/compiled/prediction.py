"""The time of a step on many devices, predicted from the communication in its compiled program."""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import jax

from benchmarks.compiled.collectives import Sent, wire_bytes
from nanogpt.devices.hardware import PEAK_FLOPS, flops_per_token
from nanogpt.optim.groups import group
from nanogpt.optim.muon import POLAR_EXPRESS
from nanogpt.optim.sharing import GROUP
from nanogpt.training.step import param_shapes
from train_gpt import PRESETS

SIZES = {
    "124M": PRESETS["baseline"],
    "350M": PRESETS["gpt2-medium"],
    "774M": PRESETS["gpt2-large"],
    "1.5B": PRESETS["gpt2-xl"],
}
SIZES["tiny"] = replace(SIZES["124M"], model=replace(SIZES["124M"].model, num_layers=1))
STEP_TOKENS = 524_288  # per step, for any number of devices: strong scaling
DEVICE_TOKENS = 65_536  # per device, for any number of devices: weak scaling


@dataclass(frozen=True)
class Machine:
    """Devices and links, in bytes per second and device in each direction."""

    device: str  # as JAX names it
    link: float  # to devices connected without a network
    nic: float | None  # to all others; None if there are none


# NVIDIA H200 data sheet: NVLink 4, 900 GB/s, the sum of both directions. DGX H200 data sheet: one
# ConnectX-7 per GPU, of 400 Gb/s (NDR InfiniBand).
H200 = Machine("NVIDIA H200", 450e9, 50e9)
# Google Cloud's documentation of TPU v5p: ICI of 1,200 GB/s per chip, the sum of both directions,
# and up to 8,960 chips in a pod. A ring is assumed to use all six links of a chip.
V5P = Machine("TPU v5p", 600e9, None)

UTILIZATION = 0.45  # ASSUMED fraction of peak FLOP/s, in forward, backward and Muon


def muon_flops(size: str, devices: int) -> float:
    """Return Muon's FLOPs on the busiest device, counting each of its groups as a full one."""
    shapes = param_shapes(SIZES[size].model)
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


def seconds_of(each: Sent, machine: Machine) -> float:
    """Return the time of a kind of communication, without latencies."""
    wire = wire_bytes(each.kind, each.devices, each.bytes)
    if machine.nic is None or each.per_host == each.devices:
        return wire / machine.link
    # A ring through several hosts leaves each host by the NICs of all its devices at once; in an
    # all-to-all, nearly all of a device's data goes to other hosts by its own NIC.
    return wire / (machine.nic * (1 if each.kind == "all-to-all" else each.per_host))


def predicted(case: dict, tokens_per_device: float, machine: Machine = H200) -> dict[str, float]:
    """Predict the seconds of a step: computation, communication, and both with full or no overlap.

    Reducing gradients can overlap with the backward pass, two thirds of the computation, and
    gathering parameters with the forward pass. Muon's communication comes after both, and that of
    devices sharing a row is between layers: neither can overlap. Latencies are left out.
    """
    hp = SIZES[case["size"]]
    peak = UTILIZATION * PEAK_FLOPS[machine.device]
    passes = tokens_per_device * flops_per_token(hp.model, hp.sequence_length) / peak
    muon = muon_flops(case["size"], case["devices"]) / peak
    gradients = parameters = open_ = 0.0
    for each in (Sent(**values) for values in case["sent"]):
        seconds = seconds_of(each, machine)
        if case["model"] > 1 and each.devices == case["model"] and each.kind == "all-reduce":
            # The only communication that grows with the number of tokens.
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
