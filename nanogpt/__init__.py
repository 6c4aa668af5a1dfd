"""JAX/Flax NanoGPT. Scripts import this first: it explains what to do if packages are missing."""

import sys
from importlib.util import find_spec
from pathlib import Path

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
