"""Training with several processes, on one machine or many.

Each runs the same program and owns some of the devices; JAX's distributed runtime connects them.
Process 0 prints and writes files.
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

LOST_AFTER = 30  # seconds without a heartbeat after which a process counts as lost
SEEN_WITHIN = 70  # seconds within which all processes see a written file; NFS takes up to 60


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    patience: int = 300,
) -> None:
    """Join the other processes of this run. Call it before using JAX for anything else.

    Without arguments, the launcher provides them: Slurm, Open MPI, Kubernetes or a TPU pod.

    Args:
        coordinator_address: host:port of process 0, if no launcher provides it.
        patience: seconds to wait for the other processes.

    If they do not join, the process says so and ends with exit status 2. If one is lost later, JAX
    ends the others within LOST_AFTER seconds, and says why.

    Raises:
        ConfigError: if arguments are missing or invalid, or JAX cannot join the others.
    """
    given = coordinator_address, num_processes, process_id
    if given != (None,) * 3 and None in given:
        raise ConfigError(
            "coordinator_address, num_processes and process_id belong together: give all three, or "
            "none if a launcher provides them."
        )
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        _check_place(coordinator_address, num_processes, process_id)

    def give_up() -> None:
        where = "" if coordinator_address is None else f" at {coordinator_address}"
        os.write(
            2,
            f"The processes of this run did not find each other{where} within {patience} s: check "
            "that all were started with the same coordinator address and number of processes, and "
            "that the coordinator's port can be reached.\n".encode(),
        )
        os._exit(2)

    # Until there is something to save, SIGTERM ends each process at once.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own timeout would end the process with a stack trace.
    timer = Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *given,
            local_device_ids=[] if has_its_gpus_alone() else None,  # an empty list means all
            cluster_detection_method=None if None in given else "deactivate",
            initialization_timeout=2 * patience,
            heartbeat_timeout_seconds=LOST_AFTER,
            shutdown_timeout_seconds=LOST_AFTER,
        )
    except Exception as error:  # of JAX, or of the libraries it uses to query a launcher
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"JAX could not join the processes of this run ({reason}): see docs/many-machines.md, "
            "or give each --coordinator-address, --num-processes and --process-id."
        ) from error
    finally:
        timer.cancel()


def _check_place(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Raise ConfigError if the arguments are invalid, or process 0 cannot listen at its port."""
    host, _, port = coordinator_address.rpartition(":")
    address_is_whole = host and port.isdecimal() and int(port) < 2**16
    if not (0 <= process_id < num_processes and address_is_whole):
        raise ConfigError(
            f"process_id must be 0 to num_processes - 1 and coordinator_address host:port, not "
            f"{process_id} of {num_processes} and {coordinator_address}."
        )
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()  # JAX may crash if it cannot listen
        except OSError as error:
            raise ConfigError(
                f"Process 0 cannot listen at port {port} ({os.strerror(error.errno or 0)}): choose "
                "another in coordinator_address."
            ) from error


def tell_all_of_sigterm() -> None:
    """From now on, notify all processes if one gets SIGTERM, with the step after which to end."""
    sync_global_devices("SIGTERM is told")  # from here on SIGTERM must not end a single process
    jax.config.update("jax_enable_preemption_service", True)
    global_state.initialize_preemption_sync_manager()


def wait_for_others() -> None:
    """Wait until all processes have reached this point.

    A reduction does not work here: the first process to exit closes connections on which another
    may still be receiving its result. Nor does JAX's shutdown, which waits only LOST_AFTER seconds.
    """
    if (client := global_state.client) is not None:
        client.wait_at_barrier("end", timeout_in_ms=24 * 3600 * 1000)


def leave(status: int) -> int:
    """Return the exit status of a process that failed; one of several processes exits here.

    Python would wait for its threads, one of which may be waiting for a save that failed elsewhere.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def check_same(
    what: str,
    here: Sequence[tuple[str, str]],
    remedy: str = "give all the same arguments and files, in a shared folder",
) -> None:
    """Raise ConfigError in all processes if `here`, a list of (name, text), differs in any.

    The message names the first text that differs if all lists have the same length.
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
    raise ConfigError(f"Process {process} has different {what} from process 0{name}: {remedy}.")


def least(number: float | None) -> float | None:
    """Return the least number of all processes, in all of them; None if any has None."""
    if jax.process_count() == 1:
        return number
    found = float(process_allgather(np.float32(np.nan if number is None else number)).min())
    return None if np.isnan(found) else found


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(sha256(text.encode()).digest(), np.uint8)


def check_all_see(file: Path, text: str) -> None:
    """Raise ConfigError in all processes unless all see the text that process 0 wrote to a file."""
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
    """Return a summary: "2 processes, 4 devices each, coordinator 10.0.0.1:1234"."""
    # JAX has no public name for the address that it got from a launcher.
    address = getattr(global_state, "coordinator_address", None)
    return (
        f"{jax.process_count()} processes, {jax.local_device_count()} devices each, "
        f"coordinator {address}"
    )


def told_by_first(make: Callable[[], str]) -> str:
    """Return process 0's make() in all processes; if it raises, all raise.

    The other processes raise a ConfigError that refers to process 0's message.
    """
    if jax.process_count() == 1:
        return make()
    text, failure = "", None
    if jax.process_index() == 0:
        try:
            text = make()
        except Exception as error:
            failure = error
    text = _text(broadcast_one_to_all(_letters(text)))  # an empty text means failure
    if failure is not None:
        raise failure
    if not text:
        raise ConfigError("Process 0 could not start: see its error message.")
    return text


def told_by_all(text: str) -> list[str]:
    """Return the texts of all processes, in order."""
    if jax.process_count() == 1:
        return [text]
    return [_text(letters) for letters in process_allgather(_letters(text))]


def _letters(text: str) -> UInt8[np.ndarray, "4096"]:
    """Encode a text as an array of fixed shape, as required for exchange between processes."""
    return np.frombuffer(text.encode()[:4096].ljust(4096, b"\0"), np.uint8)


def _text(letters: UInt8[np.ndarray, "4096"]) -> str:
    return letters.tobytes().rstrip(b"\0").decode(errors="replace")
