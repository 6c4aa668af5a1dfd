"""The choice of the device that JAX uses, with an explanation if the expected one is not used."""

import logging
import os
import subprocess

import jax

from nanogpt.config import ConfigError

CUDA = 'pip install "jax[cuda12]"'


def use_device(device: str = "auto") -> str:
    """Make JAX use this kind of device, or for auto the best it finds. Call before using JAX.

    Returns the kind it uses: cpu, gpu or tpu. Raises ConfigError if there is no such device.
    """
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", False)  # all arrays here have dtypes of at most 32 bits
    logging.getLogger("jax._src.xla_bridge").addFilter(_in_one_line)
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # an assertion if JAX finds no NVIDIA GPU
        asked = jax.config.values["jax_platforms"]
        what = f"what JAX_PLATFORMS asks for, {asked}" if asked else "the devices of this machine"
        reason = str(error).partition(" (")[0].rstrip(".") or "there is no such device"
        raise ConfigError(
            f"JAX cannot use {what} ({reason}): check the driver, and that JAX is installed for "
            "it, or set JAX_PLATFORMS=cpu."
        ) from error
    if device not in ("auto", found):
        install = 'pip install "jax[tpu]"' if device == "tpu" else CUDA
        raise ConfigError(
            f"JAX finds no {device}, only {found}: check the driver, and that JAX is installed for "
            f"it ({install}), or leave out --device."
        )
    return found


def unused_gpu() -> str | None:
    """Explain why JAX, on a CPU, does not use this machine's NVIDIA GPU; None if it has none."""
    if jax.config.values["jax_platforms"]:
        return None
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):  # not installed, or the driver hangs
        return None
    if not listed.startswith(b"GPU "):
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "the NVIDIA GPU of this machine is not used: CUDA_VISIBLE_DEVICES hides it"
    return f"the NVIDIA GPU of this machine is not used: {CUDA} makes JAX find it"


def _in_one_line(record: logging.LogRecord) -> bool:
    """Log JAX's message about a failed plugin without traceback; drop it if only CPUs are used."""
    if record.exc_info and record.exc_info[1]:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = None
    return jax.config.values["jax_platforms"] != "cpu"
