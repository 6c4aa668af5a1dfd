"""Signals that end a run: the first asks it to save before, the second ends it at once.

A process that is told to go (SIGTERM by a scheduler, Ctrl-C by its user, SIGHUP by a terminal that
closes) gets some seconds. While there is something to save, the first signal only leaves a request,
which the training loop sees after the step under way. At other times, and at a second signal, the
process ends at once.

A thread of its own acts on them: the main thread may be waiting in a compiler or for another
process, where Python calls no handler.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import TracebackType

SIGNALS = [getattr(signal, x) for x in ("SIGINT", "SIGHUP", "SIGTERM") if hasattr(signal, x)]


class Interruption:
    """Handles the signals while it is entered.

    `patient` says whether there is something to save; `signal` is the one that asked, or None.
    """

    def __init__(self):
        self.patient = False
        self.signal: int | None = None
        self._asked, self._agreed = 0, False

    def __enter__(self) -> "Interruption":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():  # Python's rule for handlers
            return self
        # What is ignored already, as by nohup, stays ignored.
        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        arrived, self._arriving = os.pipe()
        os.set_blocking(self._arriving, False)
        self._woken_before = signal.set_wakeup_fd(self._arriving)
        threading.Thread(target=self._watch, args=(arrived,), daemon=True).start()
        self._before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._woken_before)
            os.close(self._arriving)

    def be_patient(self) -> None:
        """From now on there is something to save."""
        if _distributed():
            from nanogpt.devices.processes import tell_all_of_sigterm

            tell_all_of_sigterm()
        self.patient = True

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that ended by this signal: 130 for Ctrl-C, ..."""
        return 128 + (self.signal or signal.SIGTERM)

    def hurries(self) -> bool:
        """Whether this process may leave out what only it would leave out."""
        return self.signal is not None and not _distributed()

    def requested(self) -> bool:
        """Whether to end after this step. To be asked once, at every step.

        Several processes agree on one, some steps after the signal; JAX says so at that step only.
        """
        if _distributed():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            # Counted from the first step of this process: JAX takes one that was not yet asked
            # to be at 0.
            self._asked += 1
            self._agreed = reached_preemption_sync_point(self._asked) or self._agreed
            return self._agreed
        return self.signal is not None

    def _watch(self, arrived: int) -> None:
        """In a thread: act on each signal as soon as it arrives."""
        with open(arrived, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in SIGNALS:
                    self._handle(number[0])

    def _handle(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.patient or self.signal is not None:
            _write(f"\n{name}: quit immediately.\n")
            os._exit(128 + number)
        self.signal = number
        _write(f"\n{name}: finishing this step, then saving. A second signal quits immediately.\n")
        if _distributed():
            signal.raise_signal(signal.SIGTERM)


def _distributed() -> bool:
    """Whether several processes train together, so that JAX tells all what is told to one."""
    import jax

    return jax.distributed.is_initialized()


def _write(text: str) -> None:
    """Not by print, which the main thread may be in the middle of."""
    with suppress(OSError, ValueError):  # the console may be gone
        os.write(sys.stderr.fileno(), text.encode())
