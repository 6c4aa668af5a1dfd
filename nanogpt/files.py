"""Files that are written atomically and validated when read. JAX is not imported here, so that
`--help` and errors in the arguments appear at once.
"""

import json
import os
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EFBIG, EINVAL, ENOLCK, ENOSPC, EOPNOTSUPP, EPERM
from hashlib import file_digest
from pathlib import Path
from typing import Any

from filelock import FileLock

from nanogpt.checks import ConfigError, Kind, checked


def cache_folder() -> Path:
    """Return the folder for recreatable files: nanogpt-jax in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt-jax"


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: whatever happens, it contains either the old text or the new.

    For one writer at a time: the next one overwrites what a killed one left.

    Raises OSError if it cannot be written.
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


def cannot_write(path: object, error: OSError, otherwise: str) -> str:
    """Return the sentence for a file or folder that cannot be written.

    Args:
        otherwise: the remedy if the user cannot free space or get the permission.
    """
    first = ""
    if error.errno in (ENOSPC, EDQUOT, EFBIG):
        first = "make room there, or "
    elif error.errno in (EACCES, EPERM):
        first = "get permission to write there, or "
    return f"{path} cannot be written ({error.strerror or error}): {first}{otherwise}."


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def lock_file(path: Path, timeout: float = 0) -> FileLock:
    """Acquire the lock of a file; the system releases it when this process ends, even if killed.

    Raises filelock's Timeout if another process holds it for longer, ConfigError if the file system
    does not support locks, OSError if the file cannot be written.
    """
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (EINVAL, ENOLCK, EOPNOTSUPP):
            raise
        raise ConfigError(
            f"{path} cannot be locked ({error.strerror}): its file system does not support locks; "
            "use a folder on another."
        ) from error
    return lock


def read_json(
    path: Path,
    kind: type[Kind],
    remedy: str,
    others: bool = False,
) -> Kind:
    """Read a JSON file as a `kind`; see `nanogpt.checks.checked`.

    Args:
        remedy: what the user can do if the file is damaged, such as "restore it".
        others: whether the file may have more fields than `kind`.

    Raises ConfigError, with a sentence that names file, field, value and what was expected. Its
    cause is the OSError if there was one.
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
    """Parse JSON in UTF-8 as a `kind`; arguments and errors are those of `read_json`."""
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
    """Add the file's name to a ConfigError about settings that were read from it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removesuffix('.')}: {remedy}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raises ValueError if a name is given twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{json.dumps(twice)} is given twice")
    return made
