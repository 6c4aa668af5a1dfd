"""Files that programs write whole and read back, checked. No JAX here, so that `--help` and
mistakes answer at once.
"""

import json
import os
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from errno import EINVAL, ENOLCK, EOPNOTSUPP
from hashlib import file_digest
from pathlib import Path
from typing import Any

from filelock import FileLock

from nanogpt.checks import ConfigError, Kind, checked


def cache_folder() -> Path:
    """The folder for files that can be made again: $XDG_CACHE_HOME or ~/.cache, / nanogpt-jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt-jax"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it holds, whatever happens, either the old text or the new.

    For one writer at a time: what a killed one left is overwritten by the next.

    Raises OSError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def lock_file(path: Path, timeout: float = 0) -> FileLock:
    """The lock of a file, held; the system frees it when this process ends, however it ends.

    Raises filelock's Timeout if another process holds it for longer, ConfigError where files cannot
    be locked, OSError where this one cannot be written.
    """
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (EINVAL, ENOLCK, EOPNOTSUPP):
            raise
        raise ConfigError(
            f"{path} cannot be locked ({error.strerror}): its file system does not lock files; use "
            "a folder on another."
        ) from error
    return lock


def read_json(
    path: Path,
    kind: type[Kind],
    remedy: str,
    others: bool = False,
) -> Kind:
    """What a JSON file holds, as a `kind`; see `nanogpt.checks.checked`.

    Args:
        remedy: what the user can do when the file is damaged, such as "restore it".
        others: whether the file may have more fields than `kind`.

    Raises ConfigError, in a sentence that names file, field, value and what was expected. Its
    cause is the OSError if there is one.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({reason}): {remedy}.") from error
    return parsed(content, kind, path, remedy, others)


def parsed(
    content: bytes,
    kind: type[Kind],
    where: object,
    remedy: str,
    others: bool = False,
) -> Kind:
    """What JSON in UTF-8 means as a `kind`; arguments and errors are those of `read_json`."""
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
        return checked(values, kind, where, remedy, others)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start:,}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error).partition(";")[0] if content.strip() else "empty"
    raise ConfigError(f"{where} is not valid JSON ({reason}): {remedy}.")


@contextmanager
def found_in(path: Path, remedy: str) -> Generator[None, None, None]:
    """Make a ConfigError about settings that were read from a file name the file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removesuffix('.')}: {remedy}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose names must differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{json.dumps(twice)} is given twice")
    return made
