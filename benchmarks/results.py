"""Saving results in `results/<name>.json`, with what is needed to repeat them."""

import json
from pathlib import Path
from typing import Any

from nanogpt.runs.environment import environment

FOLDER = Path(__file__).resolve().parent / "results"


def save(name: str, figures: dict[str, Any], tiny: bool = False) -> None:
    """Save the results with command, date, commit, hardware and versions, and print the path.

    Results of a test with --tiny are saved in `<name>_tiny.json`.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}{'_tiny' if tiny else ''}.json"
    path.write_text(json.dumps(environment() | figures, indent=2) + "\n")
    print(f"written to {path}")
