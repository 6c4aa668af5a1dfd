"""JAX/Flax NanoGPT. Scripts import this first: it explains what to do if packages are missing."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT, default_int_handler, getsignal, signal
from types import FrameType

NEEDED = ("flax", "jax", "msgspec", "numpy", "optax", "orbax", "rich", "tyro")

if sys.version_info < (3, 11):  # noqa: UP036
    print(f"Python 3.11 or newer is needed; {sys.executable} is older.", file=sys.stderr)
    raise SystemExit(2)
if missing := [name for name in NEEDED if find_spec(name) is None]:
    activate = Path(__file__).resolve().parents[1] / ".venv/bin/activate"
    install = "make train` or `pip install -r requirements.txt"
    remedy = f"source {activate}" if activate.exists() else install
    what = f"Python ({sys.executable}) does not have {', '.join(missing)}"
    print(f"This {what}. Run `{remedy}` first.", file=sys.stderr)
    raise SystemExit(2)


def leave(number: int, frame: FrameType | None) -> None:
    """Exit on Ctrl-C, without an exception, which could break any import it is raised in."""
    os.write(2, b"\nInterrupted.\n")
    os._exit(130)


def imported() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, once a script has imported everything."""
    if getsignal(SIGINT) is leave:
        signal(SIGINT, default_int_handler)


if (
    (script := getattr(sys.modules["__main__"], "__file__", None))
    and Path(script).resolve().parent == Path(__file__).resolve().parents[1]
    and getsignal(SIGINT) is default_int_handler
):
    signal(SIGINT, leave)
