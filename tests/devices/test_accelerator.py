"""The device that JAX uses, and messages if it is not the requested or the available one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nanogpt.config import ConfigError
from nanogpt.devices.accelerator import unused_gpu, use_device
from tests.programs import Process


def asks_in_vain(platforms):
    """Request a missing platform, as JAX_PLATFORMS does, then 64-bit numbers."""
    for platform in platforms:
        jax.config.update("jax_platforms", platform)
        try:
            use_device()
        except ConfigError as error:
            print(error, flush=True)
    jax.config.update("jax_platforms", None)
    jax.config.update("jax_enable_x64", True)
    print(use_device("cpu"), jax.numpy.arange(2.0).dtype, flush=True)


def test_a_platform_that_jax_cannot_use_is_told_in_one_sentence_and_64_bits_are_not_used(
    tmp_path, cache
):
    platforms = "cuda", "tpu", "nonsense"
    with Process(platforms, tmp_path, cache, main=asks_in_vain) as process:
        assert process.end() == 0, process.stderr
    *told, last = process.output.splitlines()
    for platform, sentence in zip(platforms, told, strict=True):
        assert sentence.startswith(f"JAX cannot use what JAX_PLATFORMS asks for, {platform} (")
        assert sentence.endswith(
            ": check the driver, and that JAX is installed for it, or set JAX_PLATFORMS=cpu."
        )
    assert last == "cpu float32"


@pytest.mark.parametrize(("platforms", "lines"), [("", 1), ("cpu", 0)])
def test_a_plugin_that_cannot_start_costs_a_line_and_none_where_only_cpus_are_asked_for(
    tmp_path, platforms, lines
):
    plugin = tmp_path / "jax_plugins" / "no_driver"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("def initialize():\n    raise RuntimeError('no libcuda')\n")
    code = "from nanogpt.devices.accelerator import use_device; print(use_device())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "cpu\n", done.stderr
    told = [line for line in done.stderr.splitlines() if "jax_plugins.no_driver" in line]
    assert len(told) == lines, done.stderr
    assert all(line.endswith(": no libcuda") for line in told)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("visible", "told"),
    [(None, 'pip install "jax[cuda12]"'), ("", "CUDA_VISIBLE_DEVICES hides it")],
)
def test_a_gpu_that_jax_does_not_use_is_told_with_what_to_do(tmp_path, monkeypatch, visible, told):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "")  # the CPU is already in use
    try:
        assert unused_gpu() is None
        (tmp_path / "nvidia-smi").write_text("no program")
        assert unused_gpu() is None
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: NVIDIA H200\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert told in (unused_gpu() or "")
        jax.config.update("jax_platforms", "cpu")
        assert unused_gpu() is None  # it is not requested
    finally:
        jax.config.update("jax_platforms", before)
