"""Exported models on the Hugging Face hub, given as hf://user/name.

The user's token is found by the hub's own library.
"""

import re
from functools import cache, partial
from pathlib import Path

from nanogpt.data.hub import DownloadError, into_cache, patiently
from nanogpt.files import sha256_of

HUB = "hf://"
CHECK = "check the name and the network connection, and log in with `hf auth login` if needed"


@cache  # so that one process uses one revision
def folder_of(name: str) -> Path:
    """Return the folder `name`, or for hf://user/name the model's folder in the hub's cache.

    Weights and settings are downloaded if they are not cached yet, code never. Without a network
    the cached files are used. Raises DownloadError if there are none, or if they are damaged.
    """
    if not name.startswith(HUB):
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors"]
    get = partial(snapshot_download, name.removeprefix(HUB), allow_patterns=wanted)
    folder = into_cache(name, get, CHECK)
    for file in folder.glob("*.safetensors"):
        content = file.resolve()  # the cache names a file by its digest
        if re.fullmatch("[0-9a-f]{64}", content.name) and sha256_of(content) != content.name:
            content.unlink()
            raise DownloadError(
                f"{file.name} of {name} was damaged (its SHA-256 is not the hub's) and was deleted:"
                " run this again to download it anew."
            )
    return folder


def make_repository(name: str) -> str:
    """Create the public repository user/name if it does not exist; return its address.

    Raises DownloadError if that fails.
    """
    from huggingface_hub import create_repo

    make = partial(create_repo, name, exist_ok=True)
    return str(patiently(name, make, remedy=CHECK, verb="upload to"))


def push(folder: Path, name: str) -> None:
    """Upload a folder to the repository user/name; DownloadError if that fails."""
    from huggingface_hub import upload_folder

    upload = partial(upload_folder, repo_id=name, folder_path=folder)
    remedy = f"{folder} is complete; upload it later with `hf upload {name} {folder}`"
    patiently(name, upload, remedy=remedy, verb="upload to")
