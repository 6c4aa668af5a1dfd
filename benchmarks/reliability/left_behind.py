"""What a killed run leaves behind: checkpoints, unfinished saves and metrics."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

TIMES = ("time_s", "step_time_s", "tokens_per_s")


def unfinished(run: Path) -> set[tuple[str, int]]:
    """Return the unfinished saves, by name and inode, since names are used again."""
    folder, found = run / "checkpoints", set()
    for path in folder.iterdir() if folder.exists() else []:
        with suppress(FileNotFoundError):  # it was just renamed to its final name
            if not (path / "manifest.json").exists():
                found.add((path.name, path.stat().st_ino))
    return found


def checkpoints(run: Path) -> dict[int, Path]:
    """Return the complete checkpoints, by step."""
    found = (path.parent for path in (run / "checkpoints").glob("*/manifest.json"))
    return {int(path.name): path for path in found}


def digest(checkpoint: Path) -> str:
    """Return the SHA-256 of all arrays of a checkpoint, with their names, dtypes and shapes."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever they were saved from

    def on_one_device(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)

    saved = ocp.checkpointables_metadata(checkpoint).metadata
    tree = ocp.load_checkpointables(checkpoint, jax.tree.map(on_one_device, saved))
    total = hashlib.sha256()
    for name, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(name)} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def metrics(run: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl, without times."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
