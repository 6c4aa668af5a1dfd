"""Asking the Hugging Face hub, with patience, and what is said where it does not answer."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from nanogpt.checks import UserError

Answer = TypeVar("Answer")

WAITS = (1, 2, 4, 8, 16)  # seconds before another attempt where the hub is overloaded or broken
LONGEST_WAIT = 60  # seconds that it may ask for


class DownloadError(UserError):
    """A download that cannot go on; the message is one sentence for the user."""


class HubBusy(DownloadError):
    """The hub asks for patience (429), fails (5xx) or is lost: it may answer later."""

    seconds: int | None = None  # how much later, where it says so


def patiently(
    name: str, ask: Callable[[], Answer], came: Callable[[], int] | None = None
) -> Answer:
    """What `ask` gets from the hub, asked again after a while as long as the hub is busy.

    Where `came` tells how many bytes are here, also when the connection is lost, and from the
    first short wait on whenever more came.
    """
    waits, had = [*WAITS], came() if came else 0
    while True:
        try:
            with hub_errors(name, HubBusy if came else DownloadError):
                return ask()
        except HubBusy as error:
            if came and came() > had:
                waits, had = [*WAITS], came()
            wait = max(error.seconds or 0, waits.pop(0)) if waits else LONGEST_WAIT + 1
            if wait > LONGEST_WAIT:
                raise
            left = f"{len(waits)} more time{'s' * (len(waits) != 1)} after that"
            print(f"{error} Trying again in {wait} s, and {left}.", flush=True)
            time.sleep(wait)


@contextmanager
def hub_errors(name: str, lost: type[DownloadError]) -> Generator[None, None, None]:
    """Make one DownloadError of whatever goes wrong between us and the hub.

    `lost` is what a broken connection becomes.
    """
    try:
        yield
    except DownloadError:
        raise
    except Exception as error:  # the hub's library and those under it share no base class
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the hub but the disk
        # Where it has no copy of a file, the library says that, and what the hub said is its cause.
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
            f"Cannot download {name} ({reason}): check the network connection and HF_ENDPOINT, "
            "then run this again to continue where it stopped."
        )
        if isinstance(told, HubBusy):
            told.seconds = seconds
        raise told from error
