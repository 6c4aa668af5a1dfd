"""Saving results in `results/<name>.json`, with what is needed to repeat them."""

import json
from pathlib import Path
from typing import Any

from benchmarks.command import Mistake
from nanogpt.files import cannot_write, write_whole
from nanogpt.runs.environment import environment

FOLDER = Path(__file__).resolve().parent / "results"


def save(
    name: str, figures: dict[str, Any], tiny: bool = False, *, shown: bool = True
) -> dict[str, Any]:
    """Save the results with command, date, commit, hardware and versions, and print the path.

    Results of a test with --tiny are saved in `<name>_tiny.json`. Returns all that is saved.
    """
    path = FOLDER / f"{name}{'_tiny' if tiny else ''}.json"
    saved = environment() | figures
    try:
        FOLDER.mkdir(exist_ok=True)
        write_whole(path, json.dumps(saved, indent=2) + "\n")
    except OSError as error:
        raise Mistake(cannot_write(path, error, "use a clone in another folder")) from error
    if shown:
        print(f"written to {path}")
    return saved
