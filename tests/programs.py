"""The main job, and other programs, in processes that tests start, pause, signal and kill.

They are forked from a process that has imported everything (tests/imports.py) and used no device:
importing takes longer than the rest of so small a run. `python3 train_gpt.py` itself is what
`as_a_user_starts_it` runs.
"""

import atexit
import fcntl
import multiprocessing.forkserver
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import chdir
from multiprocessing.connection import Connection
from pathlib import Path

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
PATIENCE = 120  # seconds to wait for a process before the test fails
NO_LIMIT = resource.RLIM_INFINITY
# Python that Ctrl-C stops; processes started by tests in the background would ignore it.
PYTHON = ("env", "--default-signal=INT", sys.executable)

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.imports"])


def settings(cache, devices):
    """Return the environment of a run with this many devices, without pytest's own settings.

    Runs compile each program once for all that have the same cache.
    """
    left_out = ("FORCE_COLOR", "COLUMNS", "PYTHONUNBUFFERED")
    return {k: v for k, v in os.environ.items() if k not in left_out} | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def as_a_user_starts_it(arguments, cwd, cache, devices=1, python_options=()):
    """Run `python3 train_gpt.py` in a new Python, to its end."""
    return subprocess.run(
        [sys.executable, *python_options, SCRIPT, *arguments],
        cwd=cwd,
        env=settings(cache, devices),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def run_to_end(arguments, cwd, cache, devices=1, main=train_gpt.main):
    """Run it in a forked process."""
    with Process(arguments, cwd, cache, devices, main=main) as process:
        status = process.end()
    return subprocess.CompletedProcess(arguments, status, process.output, process.stderr)


class Process:
    """A program in its own process, which can get only one line ahead of its reader.

    Its console is a pipe that holds a single write. When step k's line has been read, that of step
    k + 1 is in the pipe, and the run blocks before that of k + 2 until more is read.
    """

    def __init__(
        self,
        arguments,
        cwd,
        cache,
        devices=1,
        environment=(),
        ignored=(),
        limit=NO_LIMIT,
        main=train_gpt.main,
    ):
        """Start main(arguments) in a folder, without this process's settings.

        It ignores the signals `ignored`, and its files cannot grow beyond `limit` bytes.
        """
        self._read, write = os.pipe2(os.O_DIRECT)
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        self._errors, errors = os.pipe()  # not a file, to which the limit would also apply
        self.stderr = ""
        self.lines, self._rest = [], ""  # what was read from the console
        with chdir(ROOT):  # for imports
            multiprocessing.forkserver.ensure_running()
        with Connection(write, readable=False) as out, Connection(errors, readable=False) as err:
            env = settings(cache, devices) | dict(environment)
            given = main, [*map(str, arguments)], cwd, env, [*ignored], limit, out, err
            self._process = FORKED.Process(target=_become, args=given, daemon=True)
            self._process.start()
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()
        self.close_console()
        os.close(self._errors)

    def read_until(self, text):
        """Read until the next line that contains `text`, and return that line."""
        read = len(self.lines)
        while True:
            for line in self.lines[read:]:
                read += 1
                if text in line:
                    return line
            assert self._read_more(), (text, self.lines, self.end(), self.stderr)

    def read(self, count):
        """Read until there are this many characters."""
        while len(self.output) < count:
            assert self._read_more(), (self.output, self.end(), self.stderr)

    @property
    def output(self):
        """All output read so far."""
        return "\n".join([*self.lines, self._rest])

    def send(self, number):
        os.kill(self.pid, number)

    def wait_for_word(self):
        """Wait until it has written to its standard error."""
        assert select.select([self._errors], [], [], PATIENCE)[0]

    def allow(self, limit=NO_LIMIT):
        """Limit all its files to `limit` bytes from now on, as on a full disk."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit, NO_LIMIT))

    def poll(self):
        return self._process.exitcode

    def close_console(self):
        if self._read is not None:
            os.close(self._read)
            self._read = None

    def end(self):
        """Read the rest of the output, and return the exit status."""
        while self._read is not None and self._read_more():
            pass
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, f"no end after {self.lines}"
        while piece := os.read(self._errors, 1 << 16):
            self.stderr += piece.decode()
        return self._process.exitcode

    def _read_more(self):
        """Read some output; return False at its end."""
        readable, _, _ = select.select([self._read], [], [], PATIENCE)
        assert readable, f"nothing came after {self.lines}"
        piece = os.read(self._read, 1 << 16)
        *lines, self._rest = (self._rest + piece.decode()).split("\n")
        self.lines += lines
        return bool(piece)


def _become(main, arguments, cwd, environment, ignored, limit, output, errors):
    """Turn a forked process into a program that has everything imported."""
    import jax

    for descriptor, pipe in enumerate((output, errors), start=1):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # JAX read the environment when it was imported.
    jax.config.update("jax_num_cpu_devices", int(environment["JAX_NUM_CPU_DEVICES"]))
    cached = environment["JAX_ENABLE_COMPILATION_CACHE"] == "1"
    jax.config.update("jax_enable_compilation_cache", cached)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # Signals as in a terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    sys.argv = [str(SCRIPT), *arguments]
    try:
        sys.exit(main(arguments))
    finally:  # as when Python exits, which multiprocessing skips
        threading._shutdown()
        atexit._run_exitfuncs()
        # Newer forkservers forget what imported modules registered. Without JAX's shutdown, the
        # first process would exit, and with it the service that others may still be waiting for.
        jax.distributed.shutdown()


def wait_until(true):
    """Wait for something done by another process."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
