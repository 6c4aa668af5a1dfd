"""Files that programs keep. No JAX here, so that `--help` and mistakes answer at once."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for files that can be made again: $XDG_CACHE_HOME or ~/.cache, / nanogpt-jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt-jax"
