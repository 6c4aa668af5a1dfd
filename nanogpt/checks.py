"""Validation of settings against their declared types.

The range of a field is part of its type, such as Positive. `checked` validates values against it,
whether they come from the command line or from a file. JAX is not imported here, so that `--help`
and errors in the arguments appear at once.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta

Kind = TypeVar("Kind")

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # within int32, as used on devices
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Total = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
MOST = sys.float_info.max  # excludes infinities; NaN fails any bound
Finite = Annotated[float, Meta(ge=-MOST, le=MOST)]
NotNegative = Annotated[float, Meta(ge=0, le=MOST)]
AboveZero = Annotated[float, Meta(gt=0, le=MOST)]
Share = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]

KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
BOUNDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
DEEPEST = 100  # most levels of nested lists and objects


def shown(name: object) -> str:
    """Return a name for messages, on one line and encodable whatever characters it has."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


class UserError(Exception):
    """A mistake that the user can correct; the message says how in one sentence."""

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(UserError):
    """Settings that are invalid, by themselves or together."""


class DoesNotFit(ConfigError):
    """Settings that need more memory than there is."""


def checked(
    values: Any, kind: type[Kind], where: object = "", remedy: str = "", others: bool = False
) -> Kind:
    """Convert the values of settings (`asdict`) or of a file (JSON) to `kind`.

    Every field of a dataclass must be present, but for those in its `ADDED`, and no other; fields
    that a TypedDict does not declare are dropped.

    Args:
        kind: a dataclass, or any other type msgspec converts to.
        where: the file with the values, for the message; empty for the command line.
        remedy: what the user can do, for the message.
        others: whether the values may have more fields than `kind`.

    Raises ConfigError, which names the first invalid field.
    """
    before, after = (f"{where}: " if where else "", f": {remedy}." if remedy else ".")
    try:
        made = msgspec.convert(values, kind)
        _compare(values, made, others)
        return made
    except msgspec.ValidationError as error:
        flaw = _flaw(str(error), values, kind, _json if where else repr)
    except _Flaw as error:
        flaw = str(error)
    if flaw.startswith("must "):  # the values as a whole
        before = f"{where or 'What is given'} "
    raise ConfigError(f"{before}{flaw}{after}")


class _Flaw(Exception):
    """A value that msgspec accepts but we do not; the message starts a sentence."""


def can_be_utf8(text: str) -> bool:
    """Return whether a text can be encoded; text from a command line not in UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _compare(given: Any, made: Any, others: bool, path: Sequence[str | int] = ()) -> None:
    """Raise _Flaw if a dataclass lacks fields or has undeclared ones.

    A missing field would get its default, which may be that of another preset. The defaults of
    fields in `ADDED`, which older files lack, mean what those files mean.
    """
    if len(path) > DEEPEST:
        raise _Flaw(f"{_named(path[:1])} is nested more than {DEEPEST} levels deep")
    if is_dataclass(made):
        absent = getattr(made, "ADDED", frozenset()) - given.keys()
        made = {
            each.name: getattr(made, each.name) for each in fields(made) if each.name not in absent
        }
        for name in sorted(made.keys() - given.keys()):
            raise _Flaw(f"{_named([*path, name])} is missing")
        for name in sorted(given.keys() - made.keys()) if not others else ():
            value = _short(_json(given[name]))
            raise _Flaw(f"{_named([*path, name])}, {value}, is unknown to this version")
    if isinstance(made, Mapping):
        for key, value in made.items():
            _compare(given[key], value, False, [*path, key])
    elif isinstance(made, list | tuple):
        for number, value in enumerate(made):
            _compare(given[number], value, False, [*path, number])


def _named(path: Sequence[str | int]) -> str:
    """Return a field in code notation, such as stages[0].rate."""
    parts = (f"[{x}]" if isinstance(x, int) else f".{json.dumps(x)[1:-1]}" for x in path)
    return "".join(parts).removeprefix(".")


def _flaw(message: str, values: Any, kind: Any, show: Callable[[Any], str]) -> str:
    """Turn msgspec's message into the start of a sentence, with the value."""
    what, _, place = message.rstrip("`").partition(" - at `$")
    if missing := re.search("missing required field `([^`]+)", what):
        return f"{place}.{missing[1]} is missing".removeprefix(".")
    field = place.removeprefix(".")
    place, an_entry, _ = place.partition("[...]")  # an unknown entry of a dict
    path = [int(i) if i else name for i, name in re.findall(r"\[(\d+)\]|(\w+)", place)]
    for name in path:
        values = values[name]
    value = "" if an_entry else f", not {_short(show(values))}"
    return f"{field} must {_expected(what, kind, path)}{value}".lstrip()


def _expected(what: str, kind: Any, path: Sequence[str | int]) -> str:
    """Return what a value must be or have, from msgspec's message."""
    if what.startswith("Invalid enum value"):
        for name in path:
            kind = get_args(kind)[0] if isinstance(name, int) else get_type_hints(kind)[name]
        return f"be {' or '.join(map(str, get_args(kind)))}"
    expected = re.fullmatch(r"Expected `([^`]+)`(.*)", what)
    if expected is None:
        return "be a number"  # it is beyond the range of a float
    kinds, bound = expected.groups()
    if found := re.fullmatch(r"( of length)? ?([<>]=?|) (\d+)(?:\.0)?(?:, got .*)?", bound):
        length, relation, number = found.groups()
        limit = f"{BOUNDS[relation]} {int(number):,}" if relation else number
        return f"have {limit} entr{'y' if number == '1' else 'ies'}" if length else f"be {limit}"
    return f"be {' or '.join(KINDS.get(name, name) for name in kinds.split(' | '))}"


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
