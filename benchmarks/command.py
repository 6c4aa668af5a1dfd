"""The start of every benchmark: options are parsed before anything slow is imported.

A script has a frozen dataclass Options and `main(arguments) -> status`, and imports JAX inside the
functions that use it, so that `--help` and errors in the arguments appear at once.
"""

import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from nanogpt.checks import UserError
from nanogpt.command_line import parse

ROOT = Path(__file__).resolve().parent.parent
Options = TypeVar("Options")


class Mistake(UserError):
    """A mistake that the user can correct: one sentence, then the last lines of an output."""

    def __init__(self, sentence: str, output: str = ""):
        super().__init__("\n".join([sentence, *output.splitlines()[-10:]]))

    __str__ = Exception.__str__  # keeps the line breaks


def run(
    options: type[Options], work: Callable[[Options], int | None], arguments: list[str] | None
) -> int:
    """Parse the arguments, do the work and return the exit status: 2 for a mistake."""
    script = Path(inspect.getfile(options)).resolve().relative_to(ROOT).with_suffix("")
    chosen = parse(options, arguments, prog=f"python3 -m {'.'.join(script.parts)}")
    try:
        return work(chosen) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def check_positive(options: Any, *names: str) -> None:
    """Raise Mistake unless each of these options is above 0 or None."""
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not number > 0:
                raise Mistake(f"--{name.replace('_', '-')} must be above 0, not {number}.")


def require(what: str, extra: str, *modules: str) -> None:
    """Raise Mistake unless one of these modules is installed; `extra` is the extra to install."""
    if not any(map(find_spec, modules)):
        raise Mistake(f'This benchmark needs {what}: pip install -e ".[{extra}]"')
