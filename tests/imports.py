"""Everything that the main job imports, for the process that tests/programs.py forks runs from."""

import importlib
import pkgutil
from contextlib import suppress

import nanogpt

for module in pkgutil.walk_packages(nanogpt.__path__, "nanogpt."):
    if not module.name.endswith("__main__"):
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(module.name)
for name in ("train_gpt", "matplotlib.figure", "matplotlib.backends.backend_agg"):
    with suppress(ImportError):
        importlib.import_module(name)
