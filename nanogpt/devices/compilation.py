"""Before the clock of a run starts: everything is compiled, and one step tried for its memory."""

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

from nanogpt.config import ConfigError
from nanogpt.files import cache_folder

CACHE_BYTES = 5_000_000_000  # of compiled programs that are kept

Name = TypeVar("Name", bound=str | tuple)
Result = TypeVar("Result")
Plan = TypeVar("Plan")


def use_compilation_cache() -> None:
    """Keep what is compiled in the user's cache folder, so that the next run need not compile it.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=0 does without. A folder that cannot be used costs a warning.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder() / "compiled"
        prune(folder)
        if jax.default_backend() == "cpu":  # code for one processor may not run on the next
            folder /= platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def prune(folder: Path, limit: int = CACHE_BYTES) -> None:
    """Delete the least recently used programs in a folder until `limit` bytes are left.

    JAX has such a limit, too, but keeps the time of each program in a second file: if a process is
    killed between writing the two, no later one can write to the cache.
    """
    with suppress(OSError):  # another process deletes, too, or it is not ours to delete
        files = [(path, path.stat()) for path in folder.rglob("*-cache")]
        for path, stat in sorted(files, key=lambda file: file[1].st_atime, reverse=True):
            limit -= stat.st_size
            if limit < 0:
                path.unlink(missing_ok=True)


def compile_all(
    functions: Mapping[Name, Lowered], console: Console
) -> tuple[dict[Name, Compiled], dict[Name, float]]:
    """Compile functions by name, all at the same time, with a line of progress for each.

    Returns the compiled functions, and how many seconds each took.
    """
    columns = SpinnerColumn(), TextColumn("compiling {task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)

    def compile_one(name: Name) -> tuple[Compiled, float]:
        start = time.perf_counter()
        told = name if isinstance(name, str) else " ".join(map(str, name))
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
    """Bytes that a program needs on each device: its input, and what it keeps while it runs."""
    planned = compiled.memory_analysis()
    if planned is None:  # the backend does not tell
        return 0.0
    return planned.argument_size_in_bytes + planned.temp_size_in_bytes


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a program of JAX ended for want of memory; CPUs say it in words of their own."""
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))


def first_that_fits(
    prepare: Callable[[Plan], Result], plan: Plan, smaller: Callable[[Plan], Plan | None]
) -> Result:
    """`prepare(plan)`, with a smaller plan as long as memory runs out.

    Args:
        prepare: what uses the memory; it must leave nothing behind when it fails.
        plan: what to begin with.
        smaller: what to try after a plan that did not fit; None where nothing is left.

    Raises ConfigError when none fits.
    """
    while True:
        try:
            return prepare(plan)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            told = str(error).splitlines()[0]
        # Here the error is gone, and with its traceback what the attempt had allocated.
        less = smaller(plan)
        if less is None:
            raise ConfigError(
                "The device has too little memory for a single row: use a smaller model or a "
                f"shorter sequence_length ({told})."
            )
        plan = less
