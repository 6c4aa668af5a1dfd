"""The device, software versions, and the rates of a large matmul and a large copy."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import distributions

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.gpu.loop import part_ms, random
from benchmarks.gpu.parts import with_rate
from benchmarks.gpu.rows import Figures
from benchmarks.gpu.sections import Context, Job
from benchmarks.gpu.variants import FULL
from nanogpt.devices.hardware import PEAK_BANDWIDTH, PEAK_FLOPS, device_memory

QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"
OF_INTEREST = ("jax", "nvidia-", "flax", "optax", "orbax", "numpy", "torch", "triton", "tyro")


def jobs(context: Context) -> Iterator[Job]:
    """Yield the device with all versions, then its rates."""
    yield "device", describe
    n, size = (64, 1 << 16) if context.tiny else (8192, 1 << 31)
    yield f"product of two bfloat16 matrices of {n:,} x {n:,}", partial(measure_product, n)
    yield f"copy of {2 * size / 1e9:.1f} GB", partial(measure_copy, size)


def describe() -> Figures:
    """Describe JAX's device, the driver, and the versions of all relevant packages."""
    device = jax.devices()[0]
    memory = device_memory(device)
    found = {dist.name.lower(): dist.version for dist in distributions() if dist.name}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "usable_GB": memory and memory / 1e9,
        "backend": " ".join(device.client.platform_version.split()),
        "nvidia_smi": driver(),
        "versions": {k: v for k, v in sorted(found.items()) if k.startswith(OF_INTEREST)},
    }


def driver() -> str | None:
    """Return nvidia-smi's line about the first GPU; None if it is not installed."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def measure_product(n: int) -> Figures:
    """Time a square matmul, large enough to reach the device's peak."""
    size = replace(FULL, rounds=10, calls=2, repeats=3)
    ms = part_ms(size, lambda _, a, b: jnp.dot(a, b), [random(n, n), random(n, n)])
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return with_rate(ms, 2 * n**3) | {"predicted": {"tflops": peak and peak / 1e12}}


def measure_copy(count: int) -> Figures:
    """Time reading and writing `count` bfloat16 numbers."""

    def work(_: Array, x: Array) -> Array:
        return 0.5 * x

    rows = count // 1024
    ms = part_ms(replace(FULL, rounds=10, calls=2, repeats=3), work, [random(rows, 1024)])
    rate, peak = 2 * 2 * count / ms * 1e3, PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
    of_peak = peak and rate / peak
    predicted = {"tb_per_s": peak and peak / 1e12}
    return {"ms": ms, "tb_per_s": rate / 1e12, "of_peak": of_peak, "predicted": predicted}
