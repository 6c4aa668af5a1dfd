"""Signals that end a run: on the first it saves before exiting, on the second it exits at once.

A process that is asked to end (SIGTERM from a scheduler, Ctrl-C from the user, SIGHUP from a closed
terminal) has some seconds left. While there is something to save, the first signal only sets a
request, which the training loop checks after the current step. At other times, and on a second
signal, the process exits at once.

Signals are handled in a separate thread: the main thread may be waiting in a compiler or for
another process, where Python does not call handlers.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import TracebackType

SIGNALS = [getattr(signal, x) for x in ("SIGINT", "SIGHUP", "SIGTERM") if hasattr(signal, x)]


class Interruption:
    """Context manager that handles the signals.

    `patient` is whether there is something to save; `signal` is the signal received, or None.
    """

    def __init__(self):
        self.patient = False
        self.signal: int | None = None
        self._asked, self._agreed = 0, False

    def __enter__(self) -> "Interruption":
        self._before = {}
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
            return self
        # Signals that are already ignored, as with nohup, stay ignored.
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
        """Wait for a save on the first signal: from now on there is something to save."""
        if _distributed():
            from nanogpt.devices.processes import tell_all_of_sigterm

            tell_all_of_sigterm()
        self.patient = True

    @property
    def exit_status(self) -> int:
        """The status that a shell reports for a process killed by this signal: 130 for Ctrl-C."""
        return 128 + (self.signal or signal.SIGTERM)

    def hurries(self) -> bool:
        """Return whether to cut work short: on a signal, if there is only one process."""
        return self.signal is not None and not _distributed()

    def requested(self) -> bool:
        """Return whether to end after this step. Call exactly once per step.

        Several processes agree on a step, a few after the signal; JAX reports only that step.
        """
        if _distributed():
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            # Counted from this process's first step: JAX assumes that a process which has not
            # asked yet is at step 0.
            self._asked += 1
            self._agreed = reached_preemption_sync_point(self._asked) or self._agreed
            return self._agreed
        return self.signal is not None

    def _watch(self, arrived: int) -> None:
        """Handle each signal as soon as it arrives; runs in a thread."""
        with open(arrived, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in SIGNALS:
                    self._handle(number[0])

    def _handle(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.patient or self.signal is not None:
            _write(f"\n{name}: quitting immediately.\n")
            os._exit(128 + number)
        self.signal = number
        _write(f"\n{name}: finishing this step, then saving. A second signal quits immediately.\n")
        if _distributed():
            signal.raise_signal(signal.SIGTERM)


def _distributed() -> bool:
    """Return whether several processes train together; JAX then reports a signal to all."""
    import jax

    return jax.distributed.is_initialized()


def _write(text: str) -> None:
    """Write to standard error, without print, which the main thread may be executing."""
    with suppress(OSError, ValueError):  # the console may be gone
        os.write(sys.stderr.fileno(), text.encode())
