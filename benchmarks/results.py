"""Where a benchmark's figures go: `results/<name>.json`, with what is needed to repeat them."""

import json
from pathlib import Path
from typing import Any

from nanogpt.runs.environment import environment

FOLDER = Path(__file__).resolve().parent / "results"


def save(name: str, figures: dict[str, Any], tiny: bool = False) -> None:
    """Write the figures beside command, date, commit, hardware and versions, and say where.

    Those of a script that was only tried with --tiny go to `<name>_tiny.json`.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}{'_tiny' if tiny else ''}.json"
    path.write_text(json.dumps(environment() | figures, indent=2) + "\n")
    print(f"written to {path}")
