"""All imports of the main job, for the process from which tests/programs.py forks runs."""

import gc
import importlib
import pkgutil
from contextlib import suppress

import jax

import nanogpt
import train_gpt
from nanogpt.command_line import parse

for module in pkgutil.walk_packages(nanogpt.__path__, "nanogpt."):
    if not module.name.endswith("__main__"):
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(module.name)
for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
    with suppress(ImportError):
        importlib.import_module(name)
parse(train_gpt.Hyperparameters, [])  # tyro, too, imports much when it is first used

jax.config.update("jax_num_cpu_devices", 1)  # as on a laptop
# Garbage is collected rarely, as in pytest's own processes (see conftest.py).
gc.freeze()
gc.set_threshold(100_000, 50, 100)
