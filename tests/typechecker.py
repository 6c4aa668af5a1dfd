"""Checks annotations at run time, for tests run with

pytest --jaxtyping-packages=nanogpt,tests.typechecker.check tests/model
"""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# Pytrees hold shapes or shardings in place of arrays while JAX maps over them.
PYTREES = ("TrainState.__init__", "Cache.__init__")

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may pass as a float


def check(function: Callable) -> Callable:
    """Return the function with checks of its arguments and its result."""
    return function if function.__qualname__ in PYTREES else _check(function)
