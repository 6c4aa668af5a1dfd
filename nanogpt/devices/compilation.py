"""Compilation, its cache, and retries with less memory, before the clock of a run starts."""

import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import jax
from jax.stages import Compiled, Lowered
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nanogpt.checks import DoesNotFit
from nanogpt.files import cache_folder

CACHE_BYTES = 5_000_000_000  # most bytes of compiled programs to keep

Name = TypeVar("Name", bound=str | tuple)
Result = TypeVar("Result")
Plan = TypeVar("Plan")


def use_compilation_cache() -> None:
    """Cache compiled programs in the user's cache folder, for later runs.

    JAX's own settings take precedence: JAX_COMPILATION_CACHE_DIR sets another folder, and
    JAX_ENABLE_COMPILATION_CACHE=0 disables the cache. An unusable folder only causes a warning.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder() / "compiled"
        prune(folder)
        if jax.default_backend() == "cpu":  # code for one processor may not run on another
            folder /= platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def prune(folder: Path, limit: int = CACHE_BYTES) -> None:
    """Delete the least recently used programs in a folder until `limit` bytes are left.

    JAX has such a limit, too, but stores the time of each program in a second file: if a process is
    killed between writing the two, later processes cannot write to the cache.
    """
    with suppress(OSError):  # another process deletes files, too, or we lack permission
        files = [(path, path.stat()) for path in folder.rglob("*-cache")]
        for path, stat in sorted(files, key=lambda file: file[1].st_atime, reverse=True):
            limit -= stat.st_size
            if limit < 0:
                path.unlink(missing_ok=True)


def compile_all(
    functions: Mapping[Name, Lowered], console: Console
) -> tuple[dict[Name, Compiled], dict[Name, float]]:
    """Compile functions by name, in parallel, with a progress line for each.

    Returns the compiled functions, and how many seconds each took.
    """
    columns = SpinnerColumn(), TextColumn("compiling {task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)

    def compile_one(name: Name) -> tuple[Compiled, float]:
        start = time.perf_counter()
        told = name if isinstance(name, str) else f"{name[0]}, stage {name[1] + 1}"
        task = progress.add_task(told, total=1)
        compiled = functions[name].compile()
        progress.advance(task)
        return compiled, time.perf_counter() - start

    with progress, ThreadPoolExecutor() as threads:
        results = dict(zip(functions, threads.map(compile_one, functions), strict=True))
    return (
        {name: compiled for name, (compiled, _) in results.items()},
        {name: seconds for name, (_, seconds) in results.items()},
    )


def memory_of(compiled: Compiled) -> float:
    """Return the bytes a program needs on each device: its inputs and its temporary buffers."""
    planned = compiled.memory_analysis()
    if planned is None:  # not reported by this backend
        return 0.0
    return planned.argument_size_in_bytes + planned.temp_size_in_bytes


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a JAX program ran out of memory; CPUs have a message of their own."""
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))


def first_that_fits(
    prepare: Callable[[Plan], Result], plan: Plan, smaller: Callable[[Plan], Plan | None]
) -> Result:
    """Return `prepare(plan)`, with smaller plans as long as memory runs out.

    Args:
        prepare: allocates the memory; it must leave nothing behind when it fails.
        plan: the first plan to try.
        smaller: returns the plan to try after one that did not fit, or None if there is none.

    Raises DoesNotFit if no plan does.
    """
    while True:
        try:
            return prepare(plan)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            told = str(error).splitlines()[0]
        # The error is freed here, and with its traceback everything the attempt had allocated.
        less = smaller(plan)
        if less is None:
            raise DoesNotFit(
                "The device has too little memory for a single row: use a smaller model or a "
                f"shorter sequence_length ({told})."
            )
        plan = less
