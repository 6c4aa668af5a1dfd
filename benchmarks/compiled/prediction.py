"""What a step takes on many devices, predicted from what its compiled program sends."""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import jax

from benchmarks.compiled.collectives import Sent, wire_bytes
from nanogpt.devices.hardware import PEAK_FLOPS, flops_per_token
from nanogpt.optim.groups import group
from nanogpt.optim.muon import POLAR_EXPRESS
from nanogpt.optim.sharing import GROUP
from nanogpt.training.step import init_params
from train_gpt import PRESETS

SIZES = {
    "124M": PRESETS["baseline"],
    "350M": PRESETS["gpt2-medium"],
    "774M": PRESETS["gpt2-large"],
    "1.5B": PRESETS["gpt2-xl"],
}
SIZES["tiny"] = replace(SIZES["124M"], model=replace(SIZES["124M"].model, num_layers=1))
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
    shapes = jax.eval_shape(lambda: init_params(SIZES[size].model, jax.random.key(0)))
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
    hp = SIZES[case["size"]]
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
