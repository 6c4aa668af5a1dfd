"""Exported models on the Hugging Face hub, where they are named hf://user/name.

The hub's library looks for the token of whoever is logged in.
"""

import re
from functools import cache, partial
from pathlib import Path

from nanogpt.data.hub import DownloadError, into_cache, patiently
from nanogpt.files import sha256_of

HUB = "hf://"
CHECK = "check the name and the network connection, and log in with `hf auth login` if need be"


@cache  # so that one process uses one revision
def folder_of(name: str) -> Path:
    """The folder `name`, or for hf://user/name the model's folder in the hub's cache.

    Arrays and settings are downloaded unless they are there; no code is. Without a network, what is
    there is used. Raises DownloadError if nothing is, or if it is damaged.
    """
    if not name.startswith(HUB):
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors"]
    get = partial(snapshot_download, name.removeprefix(HUB), allow_patterns=wanted)
    folder = into_cache(name, get, CHECK)
    for file in folder.glob("*.safetensors"):
        content = file.resolve()  # which the cache names by its digest
        if re.fullmatch("[0-9a-f]{64}", content.name) and sha256_of(content) != content.name:
            content.unlink()
            raise DownloadError(
                f"{file.name} of {name} was damaged (its SHA-256 is not the hub's) and was deleted:"
                " run this again to download it anew."
            )
    return folder


def make_repository(name: str) -> str:
    """Make the public repository user/name unless there is one; return its address.

    Raises DownloadError where that is not possible.
    """
    from huggingface_hub import create_repo

    make = partial(create_repo, name, exist_ok=True)
    return str(patiently(name, make, remedy=CHECK, verb="upload to"))


def push(folder: Path, name: str) -> None:
    """Upload a folder to the repository user/name. Raises DownloadError where it cannot be."""
    from huggingface_hub import upload_folder

    upload = partial(upload_folder, repo_id=name, folder_path=folder)
    remedy = f"{folder} is whole; upload it later with `hf upload {name} {folder}`"
    patiently(name, upload, remedy=remedy, verb="upload to")
