"""One optimizer step of the laptop preset, cut into micro-batches of different sizes.

    .venv/bin/python -m benchmarks.cpu_micro_batch

The arithmetic is the same, only accumulated in more or fewer parts. The sizes take turns, three
short runs of train_gpt.py each; the table gives the least of their median times per step.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.results import save

ROOT = Path(__file__).resolve().parent.parent
SIZES = (16, 8, 4, 2)  # rows per micro-batch; a step has 16
ROUNDS, STEPS = 3, 60


def main() -> None:
    """Time each size, print a table, and save the figures."""
    best = dict.fromkeys(SIZES, float("inf"))
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(ROUNDS):
            for size in SIZES:
                best[size] = min(best[size], step_time(Path(scratch), f"{turn}-{size}", size))
    for size, seconds in best.items():
        ratio = seconds / best[SIZES[0]]
        print(f"{size:3} rows, Ng = {SIZES[0] // size:2}: {1e3 * seconds:6.1f} ms{ratio:6.2f}")
    save("cpu_micro_batch", {"ms_by_rows": {size: 1e3 * best[size] for size in SIZES}})


def step_time(folder: Path, name: str, size: int) -> float:
    """Median seconds per step with `size` rows per micro-batch, without the first ten steps."""
    arguments = (
        f"--preset laptop --batch-size {size} --num-steps {STEPS} --val-loss-every 0 "
        f"--val-tokens 1024 --sample-tokens 0 --run-name {name}"
    ).split()
    command = [sys.executable, str(ROOT / "train_gpt.py"), *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["step_time_s"] for line in lines[10:])


if __name__ == "__main__":
    main()
