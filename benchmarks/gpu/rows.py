"""A row of figures, or the reason why there is none."""

import gc
from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]  # of one row, as saved


class Unmeasured(Exception):
    """There are no figures; the message is a sentence that says why."""


def attempt(measure: Callable[[], Figures]) -> Figures:
    """Return the figures of `measure`, or why it failed, in a sentence; frees its memory."""
    try:
        return measure()
    except Unmeasured as reason:
        return {"failed": str(reason)}
    except Exception as failure:  # from the driver, a library or the compiler
        first_lines = " ".join(str(failure).split("\n")[:3]).strip()[:600] or "no message"
        return {"failed": f"It failed with {type(failure).__name__}: {first_lines}"}
    finally:
        gc.collect()
