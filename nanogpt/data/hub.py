"""Requests to the Hugging Face hub, with retries and clear errors."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nanogpt.checks import UserError
from nanogpt.files import cannot_write

Answer = TypeVar("Answer")

WAITS = (1, 2, 4, 8, 16)  # seconds before each retry when the hub is overloaded or fails
LONGEST_WAIT = 60  # longest wait in seconds that the hub may ask for
AGAIN = (
    "check the network connection and HF_ENDPOINT, then run this again to continue where it stopped"
)


class DownloadError(UserError):
    """A download that failed; the message is one sentence for the user."""


class HubBusy(DownloadError):
    """The hub asks to wait (429), fails (5xx) or the connection is lost: a retry may succeed."""

    seconds: int | None = None  # how long the hub asks to wait, if it does


def patiently(
    name: str,
    ask: Callable[[], Answer],
    came: Callable[[], int] | None = None,
    remedy: str = AGAIN,
    verb: str = "download",
) -> Answer:
    """Return what `ask` gets from the hub, retried with growing waits while the hub is busy.

    If `came` returns the number of bytes received, lost connections are also retried, and the waits
    start again from the shortest whenever more bytes have arrived.
    """
    waits, had = [*WAITS], came() if came else 0
    while True:
        try:
            with hub_errors(f"{verb} {name}", HubBusy if came else DownloadError, remedy):
                return ask()
        except HubBusy as error:
            if came and came() > had:
                waits, had = [*WAITS], came()
            wait = max(error.seconds or 0, waits.pop(0)) if waits else LONGEST_WAIT + 1
            if wait > LONGEST_WAIT:
                raise
            left = f"{len(waits)} more time{'s' * (len(waits) != 1)} after that"
            left = f", and {left}" if waits else " for the last time"
            print(f"{error} Trying again in {wait} s{left}.", flush=True)
            time.sleep(wait)


def into_cache(name: str, get: Callable[[], str], remedy: str = AGAIN) -> Path:
    """Return what `get` downloads into the hub's cache or finds there.

    Raises DownloadError if that fails.
    """
    from huggingface_hub import logging

    logging.set_verbosity_error()  # hide the library's retries; failures are reported below
    try:
        return Path(patiently(name, get, remedy=remedy))
    except OSError as error:
        where = error.filename or "The hub's cache"
        raise DownloadError(cannot_write(where, error, "set HF_HOME to another folder")) from error


@contextmanager
def hub_errors(what: str, lost: type[DownloadError], remedy: str) -> Generator[None, None, None]:
    """Turn any failure to do `what` into a DownloadError, lost connections into `lost`.

    Errors of the disk pass through.
    """
    try:
        yield
    except DownloadError:
        raise
    except Exception as error:  # the hub's library and its dependencies share no base class
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk, not of the hub
        # Without a local copy of a file the library reports that; the hub's answer is its cause.
        response = getattr(error, "response", getattr(error.__cause__, "response", None))
        status = getattr(response, "status_code", None)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"the hub answered HTTP {status}" if status else lines[0].rstrip(".")
        busy = status is not None and (status in (408, 429) or status >= 500)
        later = str(getattr(response, "headers", {}).get("Retry-After", ""))
        seconds = int(later) if later.isdecimal() else None
        if busy and seconds:
            reason += f" and asks to wait {seconds:,} s"
        told = (HubBusy if busy else DownloadError if status else lost)(
            f"Cannot {what} ({reason}): {remedy}."
        )
        if isinstance(told, HubBusy):
            told.seconds = seconds
        raise told from error
