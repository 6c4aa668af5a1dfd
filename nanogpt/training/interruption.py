"""Signals that end a run: the first asks it to save before, the second ends it at once.

A process that is told to go (SIGTERM by a scheduler, Ctrl-C by its user, SIGHUP by a terminal that
closes) gets some seconds. While there is something to save, the first signal only leaves a request,
which the training loop sees after the step under way. At other times, and at a second signal, the
process ends at once.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType


class Interruption:
    """Handles the signals while it is entered.

    `patient` says whether there is something to save; `signal` is the one that asked, or None.
    """

    def __init__(self):
        self.patient = False
        self.signal: int | None = None
        self._agreed = False

    def __enter__(self) -> "Interruption":
        names = ["SIGINT", "SIGHUP", "SIGTERM"]
        if "jax" in sys.modules and _distributed():  # then JAX takes SIGTERM
            names.remove("SIGTERM")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # What is ignored already, as by nohup, stays ignored.
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that ended by this signal: 130 for Ctrl-C, ..."""
        return 128 + (self.signal or signal.SIGTERM)

    def hurries(self) -> bool:
        """Whether this process may leave out what only it would leave out."""
        return self.signal is not None and not _distributed()

    def requested(self, step: int) -> bool:
        """Whether to end after this step. To be asked once, at every step.

        Several processes agree on one, some steps after the signal; JAX says so at that step only.
        """
        if _distributed():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self._agreed = reached_preemption_sync_point(step) or self._agreed
            return self._agreed
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.patient or self.signal is not None:
            _write(f"\n{name}: ended at once.\n")
            # Not by an exception: what runs may be a compiler, which would not notice for minutes.
            os._exit(128 + number)
        self.signal = number
        _write(f"\n{name}: saving after this step, then ending; once more ends at once.\n")
        if _distributed():
            signal.raise_signal(signal.SIGTERM)


def _distributed() -> bool:
    """Whether several processes train together, so that JAX tells all what is told to one."""
    import jax

    return jax.distributed.is_initialized()


def _write(text: str) -> None:
    """Not by print, which must not be called while it is being interrupted."""
    with suppress(OSError, ValueError):  # the console may be gone
        os.write(sys.stderr.fileno(), text.encode())
