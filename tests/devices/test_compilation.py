"""What happens before the clock starts: the cache, compiling with progress, fitting memory."""

import io
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from nanogpt.config import ConfigError
from nanogpt.devices.compilation import compile_all, first_that_fits, prune

POWERS = (64, 32, 16, 8, 4, 2, 1)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9000000000 bytes."


def preparation(fits):
    """Return a `prepare` with memory for at most `fits` rows, and the list of rows it was given."""
    tried = []

    def prepare(rows):
        tried.append(rows)
        if rows > fits:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY + "\nAnd much more.")
        return f"{rows} rows"

    return prepare, tried


def halved(rows):
    return rows // 2 or None


@pytest.mark.parametrize(("fits", "tries"), [(64, [64]), (20, [64, 32, 16]), (1, [*POWERS])])
def test_what_does_not_fit_is_tried_with_less_until_it_does(fits, tries):
    prepare, tried = preparation(fits)
    assert first_that_fits(prepare, 64, halved) == f"{tries[-1]} rows"
    assert tried == tries


def test_a_device_too_small_for_one_row_is_told_in_one_sentence():
    prepare, tried = preparation(0)
    with pytest.raises(ConfigError, match="too little memory for a single row") as error:
        first_that_fits(prepare, 4, halved)
    assert tried == [4, 2, 1]
    assert "\n" not in str(error.value) and "9000000000 bytes" in str(error.value)


def test_the_error_of_a_device_that_is_full_is_recognized():
    def prepare(rows):
        return jax.block_until_ready(jnp.zeros((rows, 1 << 44), jnp.uint8))[0, :3]  # 16 TB a row

    with pytest.raises(ConfigError, match="too little memory"):
        first_that_fits(prepare, 2, halved)


def test_other_errors_pass_and_nothing_is_tried_again():
    def prepare(rows):
        raise jax.errors.JaxRuntimeError(f"INTERNAL: no plan for {rows} rows")

    with pytest.raises(jax.errors.JaxRuntimeError, match="no plan for 8 rows"):
        first_that_fits(prepare, 8, halved)


def lowered(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))


@pytest.mark.parametrize("terminal", [True, False])
def test_functions_are_compiled_each_with_its_time_and_shown_on_a_terminal_only(terminal):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal)
    functions = {
        "doubling": lowered(lambda x: 2 * x, (3,)),
        "product": lowered(jnp.dot, (2, 3), (3, 2)),
    }
    compiled, seconds = compile_all(functions, console)
    np.testing.assert_array_equal(compiled["doubling"](np.ones(3, "f4")), [2, 2, 2])
    np.testing.assert_array_equal(
        compiled["product"](np.ones((2, 3), "f4"), np.ones((3, 2), "f4")), [[3, 3], [3, 3]]
    )
    assert list(seconds) == ["doubling", "product"] and all(s > 0 for s in seconds.values())
    assert ("compiling product" in screen.getvalue()) == terminal


def test_an_error_of_the_compiler_is_raised():
    class Stubborn:
        def compile(self):
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_all({"stubborn": Stubborn()}, Console(file=io.StringIO()))


# The cache


PROGRAM = """
from nanogpt.devices.compilation import use_compilation_cache
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 3)(14.0), sum("cache_hits" in name for name in hits) > 0)
print(jax.config.jax_compilation_cache_dir)
"""


def run(**environment):
    """Run PROGRAM in a new process; return the lines it prints."""
    command = [sys.executable, "-c", PROGRAM]
    base = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": "/nonexistent"}
    done = subprocess.run(command, env=base | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_second_run_takes_what_the_first_compiled_and_damage_costs_only_a_compilation(tmp_path):
    first, folder = run(XDG_CACHE_HOME=str(tmp_path))
    second, _ = run(XDG_CACHE_HOME=str(tmp_path))
    assert (first, second) == ("42.0 False", "42.0 True")
    assert folder.startswith(str(tmp_path / "nanogpt-jax"))
    files = list(tmp_path.rglob("*-cache"))
    for file in files:
        file.write_bytes(file.read_bytes()[:40])
    assert files and run(XDG_CACHE_HOME=str(tmp_path))[0] == "42.0 False"


def test_a_cache_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert run(XDG_CACHE_HOME=str(tmp_path / "file"))[0] == "42.0 False"


def test_the_programs_that_were_not_used_for_longest_are_deleted(tmp_path):
    for age, name in enumerate(("new", "host/middle", "host/old")):
        path = tmp_path / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 + age))  # last used; written
    (tmp_path / "other").write_bytes(bytes(1000))
    prune(tmp_path, 250)
    assert sorted(x.name for x in tmp_path.rglob("*-cache")) == ["middle-cache", "new-cache"]
    assert (tmp_path / "other").exists()
    prune(tmp_path / "nowhere", 250)


def test_a_cache_folder_of_the_users_own_is_kept(tmp_path):
    own = str(tmp_path / "own")
    _, folder = run(XDG_CACHE_HOME=str(tmp_path / "other"), JAX_COMPILATION_CACHE_DIR=own)
    assert folder == own
