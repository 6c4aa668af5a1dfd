"""Several processes that train together, on one machine or many.

Each runs this same program and owns some of the devices; JAX's distributed runtime joins them. The
first of them, process 0, prints and writes.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Timer

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    process_allgather,
    sync_global_devices,
)
from jaxtyping import UInt8

from nanogpt.config import ConfigError
from nanogpt.devices.launchers import has_its_gpus_alone

LOST_AFTER = 30  # seconds without a sign of life after which a process counts as lost
SEEN_WITHIN = 70  # seconds after which a file system shows all what one wrote; NFS takes up to 60


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    patience: int = 300,
) -> None:
    """Join the other processes of this run, before JAX is used for anything else.

    Without arguments the launcher is asked: Slurm, Open MPI, Kubernetes, or a TPU pod.

    Args:
        coordinator_address: host:port of process 0, where no launcher tells it.
        patience: seconds that the others have to come.

    If they do not, the process tells so and ends with exit status 2. When one is lost later, JAX
    ends the others within LOST_AFTER seconds, and tells why.

    Raises:
        ConfigError: arguments are missing or make no sense, or JAX cannot join the others.
    """
    given = coordinator_address, num_processes, process_id
    if given != (None,) * 3 and None in given:
        raise ConfigError(
            "coordinator_address, num_processes and process_id belong together: give all three, or "
            "none where a launcher tells them."
        )
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        _check_place(coordinator_address, num_processes, process_id)

    def give_up() -> None:
        where = "" if coordinator_address is None else f" at {coordinator_address}"
        os.write(
            2,
            f"The processes of this run did not find each other{where} within {patience} s: check "
            "that all were started, that they agree on the coordinator's address and on how many "
            "they are, and that its port can be reached.\n".encode(),
        )
        os._exit(2)

    # Until there is something to save, SIGTERM ends each process at once.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would end the process with a stack trace.
    timer = Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *given,
            local_device_ids=[] if has_its_gpus_alone() else None,  # none named: all
            cluster_detection_method=None if None in given else "deactivate",
            initialization_timeout=2 * patience,
            heartbeat_timeout_seconds=LOST_AFTER,
            shutdown_timeout_seconds=LOST_AFTER,
        )
    except Exception as error:  # JAX's own, or of what it asks a launcher with
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"JAX could not join the processes of this run ({reason}): see docs/many-machines.md, "
            "or give each --coordinator-address, --num-processes and --process-id."
        ) from error
    finally:
        timer.cancel()


def _check_place(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Raise ConfigError where the arguments make no sense, or process 0 cannot listen there."""
    host, _, port = coordinator_address.rpartition(":")
    address_is_whole = host and port.isdecimal() and int(port) < 2**16
    if not (0 <= process_id < num_processes and address_is_whole):
        raise ConfigError(
            f"process_id must be 0 to num_processes - 1 and coordinator_address host:port, not "
            f"{process_id} of {num_processes} and {coordinator_address}."
        )
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()  # where JAX cannot, it may crash
        except OSError as error:
            raise ConfigError(
                f"Process 0 cannot listen at port {port} ({os.strerror(error.errno or 0)}): name "
                "another in coordinator_address."
            ) from error


def tell_all_of_sigterm() -> None:
    """From now on SIGTERM to one process ends none, but is told to all, at a step to end after."""
    sync_global_devices("SIGTERM is told")  # none may end any more at a SIGTERM that others outlive
    jax.config.update("jax_enable_preemption_service", True)
    global_state.initialize_preemption_sync_manager()


def wait_for_others() -> None:
    """Return when all processes have come this far.

    A reduction cannot serve for this: whoever leaves first closes the connections on which another
    may still be receiving its result. Nor can JAX's shutdown, which waits LOST_AFTER seconds only.
    """
    if (client := global_state.client) is not None:
        client.wait_at_barrier("end", timeout_in_ms=24 * 3600 * 1000)


def leave(status: int) -> int:
    """The exit status of a process that failed; one of several ends here.

    Python would wait for its threads, and one of them may wait for a save that failed elsewhere.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def check_same(what: str, here: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigError in all processes if `here`, texts with their names, differs in any.

    It names the first text that differs, where there are as many.
    """
    if jax.process_count() == 1:
        return
    items = [*map(repr, here)]
    wholes = process_allgather(_digest("\n".join(items)))
    differs = (wholes != wholes[0]).any(axis=1)
    if not differs.any():
        return
    process, name = int(differs.argmax()), ""
    counts = process_allgather(np.int32(len(items)))
    if (counts == counts[0]).all():
        each = process_allgather(np.array([*map(_digest, items)]))
        name = f" ({here[int((each[process] != each[0]).any(axis=1).argmax())][0]})"
    raise ConfigError(
        f"Process {process} has other {what} than process 0{name}: give all the same "
        "arguments and files, in a folder that all see."
    )


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(sha256(text.encode()).digest(), np.uint8)


def check_all_see(file: Path, text: str) -> None:
    """Raise ConfigError in all processes unless each finds in a file what process 0 wrote there."""
    if jax.process_count() == 1:
        return
    end, seen = time.monotonic() + SEEN_WITHIN, False
    while not seen and time.monotonic() < end:
        with suppress(OSError, UnicodeDecodeError):
            seen = file.read_text(encoding="utf-8") == text
        time.sleep(0 if seen else 0.1)
    for process, sees in enumerate(process_allgather(np.array(seen))):
        if not sees:
            raise ConfigError(
                f"Process {process} does not see {file}, which process 0 wrote: start all in one "
                "folder, on a file system that they share."
            )


def processes_line() -> str:
    """Who trains together, such as "2 processes, 4 devices in each, coordinator 10.0.0.1:1234"."""
    # JAX has no public name for the address that a launcher told it.
    address = getattr(global_state, "coordinator_address", None)
    return (
        f"{jax.process_count()} processes, {jax.local_device_count()} devices in each, "
        f"coordinator {address}"
    )


def told_by_first(make: Callable[[], str]) -> str:
    """make() of process 0, for all; where it raises, all raise.

    The others raise ConfigError, in whose words nothing is to be told again.
    """
    if jax.process_count() == 1:
        return make()
    text, failure = "", None
    if jax.process_index() == 0:
        try:
            text = make()
        except Exception as error:
            failure = error
    text = _text(broadcast_one_to_all(_letters(text)))  # an empty one stands for a failure
    if failure is not None:
        raise failure
    if not text:
        raise ConfigError("Process 0 could not begin; it says why.")
    return text


def told_by_all(text: str) -> list[str]:
    """What each process tells, in their order."""
    if jax.process_count() == 1:
        return [text]
    return [_text(letters) for letters in process_allgather(_letters(text))]


def _letters(text: str) -> UInt8[np.ndarray, "4096"]:
    """A text as an array: those that processes exchange must be of one shape."""
    return np.frombuffer(text.encode()[:4096].ljust(4096, b"\0"), np.uint8)


def _text(letters: UInt8[np.ndarray, "4096"]) -> str:
    return letters.tobytes().rstrip(b"\0").decode(errors="replace")
