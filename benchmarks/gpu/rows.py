"""A row of figures, or why there is none."""

import gc
from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]  # of one row, as they are saved


class Unmeasured(Exception):
    """Why there are no figures: a sentence."""


def attempt(measure: Callable[[], Figures]) -> Figures:
    """What `measure` returns, or why it failed, in a sentence; its memory is free again."""
    try:
        return measure()
    except Unmeasured as reason:
        return {"failed": str(reason)}
    except Exception as failure:  # whatever the driver, the library or the compiler says
        first_lines = " ".join(str(failure).split("\n")[:3]).strip()[:600] or "no message"
        return {"failed": f"It failed with {type(failure).__name__}: {first_lines}"}
    finally:
        gc.collect()
