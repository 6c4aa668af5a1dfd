"""Create a record from runs that reach a validation loss of 3.28 on FineWeb.

    python3 -m benchmarks.records.record records/<date>-<name> runs/record-* \
        --description "What is new, in one sentence."

The runs must follow the rules of records/README.md, as far as their files show, and differ only in
their seeds. The folder then contains the logs of each, and a README.md with their results.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
import tyro

from benchmarks import command
from benchmarks.records.check import (
    SIGNIFICANT,
    TARGET,
    End,
    RecordError,
    Statistics,
    end,
    read_object,
    sentence,
    statistics,
)
from nanogpt.files import cannot_write
from nanogpt.runs.environment import PACKAGES

VAL_TOKENS = 10_485_760  # from the start of FineWeb's validation shard
FILES = ("config.json", "run.json", "log.txt", "metrics.jsonl")
MAY_DIFFER = {"seed", "run_name", "resume", "command", "date"}


@dataclass(frozen=True)
class Options:
    """Create a record from runs that reach a validation loss of 3.28 on FineWeb."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to create, records/<date>-<name>."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, runs/<name>."""
    description: str
    """What is new, in one sentence."""


class Settings(TypedDict):
    """The fields that are read from config.json by name."""

    model: dict[str, Any]
    num_steps: int
    seed: int
    shuffle: bool
    train_files: str | None
    val_files: str | None
    val_tokens: int


Circumstances = TypedDict(
    "Circumstances",
    dict.fromkeys(("command", "date", "commit", "hardware", "python", *PACKAGES), str)
    | {"accelerators": list[str]},
)


class Run(NamedTuple):
    """The contents of a run's folder."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]  # from nanogpt/runs/environment.py
    end: End


def main(arguments: list[str] | None = None) -> int:
    """Create the record; return the exit status."""
    return command.run(Options, make, arguments)


def make(options: Options) -> None:
    """Create the folder, and print the line for the history."""
    runs = [read_run(folder) for folder in options.runs]
    check(runs)
    found = statistics([run.end for run in runs], TARGET)
    if not found.p < SIGNIFICANT:
        raise RecordError(f"These runs are not a record: {sentence(found, TARGET)}")
    runs.sort(key=lambda run: run.config["seed"])
    write(options.folder, runs, page(options.folder.name, options.description, runs, found))
    print(sentence(found, TARGET))
    print(f"Created {options.folder}. For the table in README.md:")
    print(history_line(options.folder.name, options.description, runs))


def read_run(folder: Path) -> Run:
    """Read the run in a folder; raises RecordError if a file is missing or it is not finished."""
    for name in FILES:
        if not (folder / name).is_file():
            raise RecordError(f"{folder} has no {name}: give a run folder, runs/<name>.")
    config = read_object(folder / "config.json", Settings)
    environment = read_object(folder / "run.json", Circumstances)
    return Run(folder, config, environment, end(folder / "metrics.jsonl"))


def check(runs: Sequence[Run]) -> None:
    """Raise RecordError unless each run follows the rules and they differ only in the seed."""
    if not runs:
        raise RecordError("A record needs runs: give their folders after the record's.")
    for run in runs:
        check_rules(run)
    first, before = runs[0], {}
    for run in runs:
        settings, others = ({**flat(r.config), **r.environment} for r in (first, run))
        for name in sorted((settings.keys() | others.keys()) - MAY_DIFFER):
            if settings.get(name) != others.get(name):
                raise RecordError(
                    f"{first.folder} and {run.folder} differ in {name}, {settings.get(name)} and "
                    f"{others.get(name)}: the runs of a record may differ only in their seeds."
                )
        seed = run.config["seed"]
        if seed in before:
            raise RecordError(
                f"{before[seed]} and {run.folder} have the same seed, {seed}: give every run its "
                "own seed."
            )
        before[seed] = run.folder


def check_rules(run: Run) -> None:
    """Raise RecordError unless the run used FineWeb, in order, and its code is committed."""
    if run.config["val_tokens"] != VAL_TOKENS:
        raise RecordError(
            f"{run.folder} validates on {run.config['val_tokens']} tokens (val_tokens): a record "
            f"must use {VAL_TOKENS}."
        )
    for name, prefix in {"train_files": "fineweb_train_", "val_files": "fineweb_val_"}.items():
        if not Path(str(run.config[name])).name.startswith(prefix):
            raise RecordError(
                f"{run.folder} has {run.config[name]} for {name}: a record needs FineWeb's shards, "
                f"{prefix}*.bin."
            )
    if run.config["shuffle"]:
        raise RecordError(
            f"{run.folder} shuffles its data (shuffle): a record must use it in its order."
        )
    commit = run.environment["commit"]
    if commit == "unknown" or commit.endswith("-dirty"):
        raise RecordError(
            f"{run.folder} used code that is not committed (commit {commit}): commit the code and "
            "repeat the run."
        )


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, with those of the model named as on the command line, model.<name>."""
    model = {f"model.{name}": value for name, value in config["model"].items()}
    return {name: value for name, value in config.items() if name != "model"} | model


def write(folder: Path, runs: Sequence[Run], page: str) -> None:
    """Create the folder atomically; raises RecordError if it exists or cannot be written."""
    if folder.exists():
        raise RecordError(f"{folder} already exists: choose another name, or remove it.")
    try:
        # It is written beside its final place, then renamed.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
            record = Path(scratch) / "record"
            for run in runs:
                place = record / f"seed-{run.config['seed']}"
                place.mkdir(parents=True)
                for name in FILES:
                    shutil.copyfile(run.folder / name, place / name)
            (record / "README.md").write_text(page, encoding="utf-8")
            record.rename(folder)
    except OSError as error:
        raise RecordError(cannot_write(folder, error, "choose another folder")) from error


def page(name: str, description: str, runs: Sequence[Run], found: Statistics) -> str:
    """Return the README.md of a record, in Markdown."""
    rows = [
        f"| {run.config['seed']} | {run.end.val_loss:.4f} | {run.end.time_s:.1f} s | "
        f"{run.end.step:,} | {run.end.tokens:,} |"
        for run in runs
    ]
    place = runs[0].environment
    versions = ", ".join(f"{package} {place[package]}" for package in ("python", *PACKAGES))
    masking = ", with canonical masking" * runs[0].config.get("canonical_masking", False)
    return "\n".join(
        [
            f"# {name}",
            "",
            description,
            "",
            f"{mean_time(runs):.1f} s of training on {hardware(runs[0])}, on average, compilation "
            "and validation excluded.",
            "",
            "| seed | val loss | training time | steps | tokens |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"{sentence(found, TARGET)} (One-sided t-test; validation on the first {VAL_TOKENS:,} "
            f"tokens of FineWeb's validation shard{masking}.)",
            "",
            "```sh",
            *(run.environment["command"] for run in runs),
            f"python -m benchmarks.records.check records/{name}",
            "```",
            "",
            f"- commit: {place['commit']}",
            f"- processors: {place['hardware']}",
            f"- versions: {versions}",
            "",
        ]
    )


def history_line(name: str, description: str, runs: Sequence[Run]) -> str:
    """Return the record's line for the README's table: hardware, time, description, date."""
    date = max(run.environment["date"][:10] for run in runs)
    link = f"[{description}](records/{name}/README.md)"
    return f"| {hardware(runs[0])} | {mean_time(runs):.1f} s | {link} | {date} |"


def mean_time(runs: Sequence[Run]) -> float:
    """Return the mean seconds of training."""
    return float(np.mean([run.end.time_s for run in runs]))


def hardware(run: Run) -> str:
    """Return the accelerators, or the processors if there are none."""
    return ", ".join(run.environment["accelerators"]) or run.environment["hardware"]


if __name__ == "__main__":
    sys.exit(main())
