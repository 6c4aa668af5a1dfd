"""Tokenize text into shards before training: `python3 prepare_data.py corpus/ --out shards`.

    python3 prepare_data.py corpus/ "more/*.jsonl.zst" --out shards
    python3 prepare_data.py --hub HuggingFaceFW/fineweb --subset sample-10BT --out fineweb

It uses all processors, and little memory whatever the size of the input. If it is interrupted, even
by kill -9, run the same command again: it continues where it stopped and writes the same bytes.
Then: python3 train_gpt.py --train-files "shards/text_train_*.bin" --val-files
"shards/text_val_*.bin". See docs/own-text.md for the formats it reads and the validation split.
"""

import nanogpt  # noqa: F401  (explains what to do if packages are missing)

# isort: split
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import tyro

from nanogpt.checks import Positive, UserError, checked
from nanogpt.command_line import parse, print_result
from nanogpt.config import TokenizerName
from nanogpt.data.hub import patiently
from nanogpt.data.text.documents import DataError, find_files
from nanogpt.data.text.encode import Inputs, usable_cpus
from nanogpt.data.text.eta import progress_line
from nanogpt.data.text.prepare import SHARD_TOKENS, Recipe, make_shards
from nanogpt.training.interruption import Interruption

CPUS = usable_cpus()


@dataclass(frozen=True)
class Options:
    """Tokenize text into shards."""

    out: Path
    """Output folder for the shards; it should contain nothing else."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, folders or globs."""
    hub: str | None = None
    """Instead of inputs: read the Parquet files of a dataset on the Hugging Face hub."""
    subset: str | None = None
    """Configuration of that dataset, or a folder in it; None: all of it."""
    keep_downloads: bool = False
    """Keep downloaded files; otherwise each is deleted once its documents are in the shards."""
    tokenizer: TokenizerName = "gpt2"
    """Tokenizer; train with the same one."""
    field: str = "text"
    """Field (JSON) or column (Parquet, CSV) that holds the text."""
    name: str | None = None
    """Prefix of the shards' names, as in text_train_000001.bin; None: the name of the dataset, or
    "text"."""
    shard_tokens: Positive = SHARD_TOKENS
    """Tokens per shard."""
    processes: Positive = CPUS
    """Number of encoding processes; does not change the shards."""

    def check(self) -> None:
        """Raise UserError, with a sentence for the user, if the options are invalid."""
        checked(asdict(self), Options)
        if bool(self.inputs) == bool(self.hub):
            raise DataError("Give either inputs, or a dataset with --hub.")
        if self.hub is None and (self.subset or self.keep_downloads):
            raise DataError("--subset and --keep-downloads need --hub.")
        if self.name is not None and not re.match(r"\w[^/]*$", self.name):
            raise DataError(
                f"name must start with a letter or digit and contain no slash: {self.name!r}."
            )


class DataFiles(TypedDict):
    """Files of a subset, as a dataset card lists them."""

    split: NotRequired[str]
    path: str | list[str]


class Subset(TypedDict):
    """A subset, as a dataset card declares it."""

    config_name: str
    data_files: NotRequired[str | DataFiles | list[str | DataFiles]]


def main(arguments: list[str] | None = None) -> int:
    """Write shards as the command line says; return the exit status."""
    options = parse(Options, arguments, description=__doc__)
    out = Path(os.path.abspath(options.out.expanduser()))
    name = options.name or (options.hub or "text").rpartition("/")[2]
    recipe = Recipe(options.tokenizer, options.field, name, options.shard_tokens)
    try:
        # A signal ends this at once: another process can continue from what is in the folder.
        with Interruption(), progress_line() as show:
            options.check()
            if options.hub:
                inputs = hub_files(options.hub, options.subset, out, options.keep_downloads)
            else:
                inputs = find_files(options.inputs, out)
            made = make_shards(inputs, out, recipe, options.processes, show)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; check the path.", file=sys.stderr)
        return 2
    train, val = (shlex.quote(f"{out}/{name}_{side}_*.bin") for side in ("train", "val"))
    return print_result(
        f"{made.summary()} The shards are in {out}.\nTrain on them with:\n  python3 train_gpt.py "
        f"--tokenizer {options.tokenizer} --train-files {train} --val-files {val}"
        + "\nOn a CPU, --tokenizer bytes trains about ten times faster."
        * (options.tokenizer == "gpt2")
    )


class HubFiles:
    """The Parquet files of a dataset, downloaded one by one, the next while one is encoded."""

    def __init__(self, repository: str, revision: str, names: list[str], out: Path, keep: bool):
        self.repository, self.revision, self.names = repository, revision, names
        self.weights = [1] * len(names)
        self.fingerprint = sha256("\n".join([repository, revision, *names]).encode()).hexdigest()
        self.folder, self.keep = out / ".downloads", keep

    def get(self, name: str) -> Path:
        """Download a file and return its path; raises DownloadError if that fails."""
        from huggingface_hub import hf_hub_download

        def download() -> str:
            return hf_hub_download(
                self.repository,
                name,
                repo_type="dataset",
                revision=self.revision,
                local_dir=self.folder,
            )

        return Path(patiently(name, download, came=lambda: 0))  # retries lost connections

    def release(self, names: Sequence[str]) -> None:
        """Delete these files, unless they are to be kept."""
        for name in names if not self.keep else ():
            (self.folder / name).unlink(missing_ok=True)


def hub_files(hub: str, subset: str | None, out: Path, keep_downloads: bool) -> Inputs:
    """Return the Parquet files of a dataset or a subset of it; raises DataError if there are none.

    After an interruption it uses the same revision of the dataset as before.
    """
    if find_spec("pyarrow") is None:
        raise DataError("To read a dataset from the hub, run `pip install pyarrow`.")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    note = out / f"{hub.replace('/', '--')}.revision"
    known = note.read_bytes().strip().decode(errors="replace") if note.exists() else None
    if known is not None and not re.fullmatch("[0-9a-f]{40}", known):
        raise DataError(f"{note} does not contain a revision of {hub}: delete {out}.")
    info = patiently(hub, lambda: HfApi().dataset_info(hub, revision=known))
    parquet = sorted(x.rfilename for x in info.siblings or () if x.rfilename.endswith(".parquet"))
    configs = (info.card_data or {}).get("configs") or []
    card = f"The card of {hub}"
    configs = checked(configs, list[Subset], card, "choose another dataset")
    patterns = patterns_of(configs, subset)
    names = [name for name in parquet if any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        subsets = ", ".join(config["config_name"] for config in configs) or "none"
        where = f" in subset {subset}" if subset else ""
        raise DataError(
            f"{hub} has no Parquet file{where}: its subsets are {subsets}; --subset can also "
            "be a folder in it."
        )
    out.mkdir(parents=True, exist_ok=True)
    assert info.sha is not None  # None only in listings of datasets
    note.write_text(info.sha + "\n")
    return HubFiles(hub, info.sha, names, out, keep_downloads)


def patterns_of(configs: list[Subset], subset: str | None) -> list[str]:
    """Return globs of a subset's training files: those in the dataset card, else a folder's."""
    if subset is None:
        return ["*"]
    for config in configs:
        if config["config_name"] == subset and "data_files" in config:
            patterns = []
            for files in as_list(config["data_files"]):
                if not isinstance(files, dict):
                    patterns.append(files)
                elif files.get("split", "train") == "train":
                    patterns += as_list(files["path"])
            return patterns
    return [f"{subset.strip('/')}/*"]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


if __name__ == "__main__":
    sys.exit(main())
