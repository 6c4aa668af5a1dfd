"""Exported models on the Hugging Face hub, given as hf://user/name.

The user's token is found by the hub's own library.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from nanogpt.data.hub import DownloadError, into_cache, patiently
from nanogpt.files import sha256_of
from nanogpt.inference.huggingface import check_kind

HUB, NAME = "hf://", r"[\w-][\w.-]*/[\w-][\w.-]*"
CHECK = "check the name and the network connection, and log in with `hf auth login` if needed"


@cache  # so that one process uses one revision
def folder_of(name: str) -> Path:
    """Return the folder `name`, or for hf://user/name the model's folder in the hub's cache.

    Weights and settings are downloaded if they are not cached yet, code never. Without a network
    the cached files are used. Raises DownloadError if there are none, or if they are damaged.
    """
    if not re.match("(hf|https?):", name, re.IGNORECASE):
        return Path(name)
    if not re.fullmatch(HUB + NAME, name):
        raise DownloadError(f"A model on the Hugging Face hub is hf://user/name, not {name!r}.")
    from huggingface_hub import snapshot_download

    get = partial(snapshot_download, name.removeprefix(HUB))
    folder = into_cache(name, partial(get, allow_patterns="config.json"), CHECK)
    check_kind(name, folder / "config.json")  # before large files are downloaded
    arrays = ["model.safetensors*", "model-*.safetensors"]
    into_cache(name, partial(get, allow_patterns=arrays, revision=folder.name), CHECK)
    if not [*folder.glob("model*.safetensors")]:
        raise DownloadError(f"{name} has no weights (model.safetensors): {CHECK}.")
    for file in folder.glob("*.safetensors"):
        content = file.resolve()  # the cache names a file by its digest
        if re.fullmatch("[0-9a-f]{64}", content.name) and sha256_of(content) != content.name:
            content.unlink()
            raise DownloadError(
                f"{file.name} of {name} was damaged (its SHA-256 is not the hub's) and was deleted:"
                " run this again to download it anew."
            )
    return folder


def check_name(repository: str) -> None:
    """Raise DownloadError unless it is user/name."""
    if not re.fullmatch(NAME, repository):
        raise DownloadError(f"--push-to-hub takes user/name, not {repository!r}.")


def make_repository(name: str) -> str:
    """Create the public repository user/name if it does not exist; return its address.

    Raises DownloadError if that fails.
    """
    from huggingface_hub import create_repo

    return str(_upload(name, partial(create_repo, name, exist_ok=True), CHECK))


def push(folder: Path, name: str) -> None:
    """Upload a folder to the repository user/name; DownloadError if that fails."""
    from huggingface_hub import upload_folder

    upload = partial(upload_folder, repo_id=name, folder_path=folder)
    _upload(name, upload, f"{folder} is complete; upload it later with `hf upload {name} {folder}`")


def _upload(name: str, ask: Callable[[], object], remedy: str) -> object:
    """Return what `ask` gets from the hub; DownloadError if that fails."""
    try:
        return patiently(name, ask, remedy=remedy, verb="upload to")
    except OSError as error:  # such as a token that cannot be read
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise DownloadError(f"Cannot upload to {name} ({reason}): {remedy}.") from error
