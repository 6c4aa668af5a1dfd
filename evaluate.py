"""Evaluate a trained run: `python3 evaluate.py runs/<name>`.

Prints the loss on its validation tokens, the same in bits per byte of text, and with `--hellaswag`
its accuracy on HellaSwag, and saves them in the run's folder. docs/evaluation.md explains each.
"""

import nanogpt  # explains what to do if packages are missing

# isort: split
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import fsum, log
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Required, TypedDict, TypeVar

import numpy as np
import tyro
from jaxtyping import Int64
from rich.console import Console
from rich.progress import track

from nanogpt.checks import ConfigError, Count, Positive, UserError, checked, shown
from nanogpt.command_line import discard_output, parse
from nanogpt.data.canonical import impossible_next
from nanogpt.data.corpus import embedded_corpus
from nanogpt.data.dataset import difference, look_into
from nanogpt.data.hub import DownloadError, into_cache
from nanogpt.data.shards import find_shards, read_shard
from nanogpt.data.tokenizer import Tokenizer, load_tokenizer
from nanogpt.files import cannot_write, read_json, write_whole

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh
    from jaxtyping import Array, UInt8

    from nanogpt.config import GPTConfig, ModelSettings
    from nanogpt.data.validation import ValidationRows
    from nanogpt.inference.hellaswag import Item
    from nanogpt.training.step import Params

Step = TypeVar("Step")

SPEEDRUN_TOKENS = 10_485_760  # the number that the speedrun's records are validated on
TOKENS_PER_PASS = 8192  # per device: enough to keep a GPU busy, and fits beside a training run


@dataclass(frozen=True)
class Options:
    """Evaluate a trained model."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a run, runs/<name>, of one of its checkpoints, or one written by export.py; or
    hf://user/name, such a folder on the Hugging Face hub."""
    val_files: str | None = None
    """Glob of other validation shards, with the same tokenizer; None: those of the run. An
    exported model does not name any."""
    val_tokens: Positive | None = None
    """Number of validation tokens, from the start of the shards; None: as many as the run used, or
    10,485,760 for an exported model."""
    canonical_masking: bool = False
    """Leave out the ids that the tokenizer cannot produce next, as runs that were validated so do
    anyway; see docs/evaluation.md."""
    hellaswag: bool = False
    """Also score HellaSwag; on a CPU this takes hours for a model of the speedrun's size."""
    hellaswag_items: Positive | None = None
    """Score only the first N items; None: all 10,042."""
    batch_size: Positive | None = None
    """Rows per device and pass; None: 8,192 tokens' worth. Does not change the results."""

    def check(self) -> None:
        """Raise ConfigError, with a sentence for the user, if the options are invalid."""
        checked(asdict(self), Options)
        if self.hellaswag_items is not None and not self.hellaswag:
            raise ConfigError("--hellaswag-items needs --hellaswag.")


class Results(TypedDict, total=False):
    """The contents of evaluation.json: results for the step that was evaluated last."""

    step: Required[Count]
    val_files: str
    val_tokens: Positive
    val_loss: float
    bits_per_byte: float
    canonical_masking: bool
    hellaswag: dict[str, float]
    environment: dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a model as the command line says; return the exit status."""
    options = parse(Options, arguments)
    try:
        options.check()
        evaluate(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the figures printed so far are saved.", file=sys.stderr)
        return 130
    return 0


def evaluate(options: Options) -> None:
    """Print the results, and write each to the run's folder as soon as it is known."""
    # Allocate GPU memory only as needed: a training run may be using the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from nanogpt.data.validation import ValidationRows
    from nanogpt.devices.accelerator import use_device
    from nanogpt.devices.compilation import first_that_fits, use_compilation_cache
    from nanogpt.devices.mesh import REPLICATED, make_mesh, put
    from nanogpt.inference.hellaswag import read_items, retokenized
    from nanogpt.inference.hub import HUB, folder_of

    nanogpt.imported()
    use_device()
    use_compilation_cache()
    run = load(folder_of(options.model), make_mesh())

    # Check for everything that may be missing before the long work begins.
    if (options.val_files or run.val_files) is None and run.hp.tokenizer != "bytes":
        raise ConfigError(
            f"{options.model} does not say what it was validated on: give a glob of shards with "
            f"{run.hp.tokenizer} tokens, such as --val-files 'fineweb10B/fineweb_val_*.bin'."
        )
    files, name = validation_files(options.val_files or run.val_files)
    if options.val_files is None and run.shards:
        shards = [look_into(file, run.hp.model.vocab_size)[0] for file in files]
        if what := difference(run.shards["val"], shards):
            print(f"WARNING: the run was validated on other data: {what}.", file=sys.stderr)
    count = options.val_tokens or run.val_tokens or most_tokens(files)
    rows = ValidationRows(
        files,
        run.row_length,
        count,
        run.hp.model.vocab_size,
        separator=run.hp.model.document_separator,
        context=run.model.reach(run.row_length),
    )
    tokenizer = load_tokenizer(run.hp.tokenizer)
    num_bytes = int(bytes_per_token(tokenizer)[rows.tokens[1:]].sum())
    items, failure = [], None
    if options.hellaswag:
        try:
            with Console(stderr=True).status("fetching HellaSwag"):
                file = hellaswag_file()
            items = retokenized(read_items(file)[: options.hellaswag_items], tokenizer)
        except DownloadError as error:
            failure = error  # the loss can be measured without it

    def fitting(measure: Callable[[int], Any]) -> Any:
        """Return measure(rows per device), with fewer rows if memory runs out."""

        def smaller(rows: int) -> int | None:
            if less := rows // 2:
                print(f"out of memory with {rows} rows per device: trying {less}", file=sys.stderr)
            return less or None

        batch_size = options.batch_size or max(1, TOKENS_PER_PASS // run.row_length)
        return first_that_fits(measure, batch_size, smaller)

    def tell(line: str) -> None:
        try:
            print(f"step {run.step} | {line}", flush=True)
        except OSError:  # a closed or full console does not stop the work: results are saved
            discard_output()

    def keep(results: dict[str, Any]) -> None:
        if not options.model.startswith(HUB):  # never write into the hub's cache
            write_results(run.folder, run.step, results)

    impossible, masking = None, options.canonical_masking or run.canonical_masking
    if masking:
        table = impossible_next(tokenizer, run.hp.model.padded_vocab_size)
        impossible = put(run.mesh, REPLICATED, table.shape, table.__getitem__)
    nats = fitting(partial(validation_nats, run, rows, impossible))
    results = {"val_files": name, "val_tokens": count, "val_loss": nats / count}
    results["bits_per_byte"] = nats / log(2) / num_bytes
    results["canonical_masking"] = masking
    masked = ", canonical masking" * masking
    tell(f"val loss {nats / count:.4f} | {count:,} tokens of {name}{masked}")
    tell(f"bits per byte {results['bits_per_byte']:.4f} | {num_bytes:,} bytes of text")
    keep(results)

    if failure:
        raise failure
    if options.hellaswag:
        results = fitting(partial(hellaswag, run, items, tokenizer.separator))
        tell(
            f"hellaswag accuracy_norm {results['accuracy_norm']:.4f} +- "
            f"{results['standard_error']:.4f} | accuracy {results['accuracy']:.4f} | "
            f"{results['items']:,} items"
        )
        keep({"hellaswag": results})
    with suppress(OSError):  # as in `tell`
        print(f'Next:\n  python3 sample.py {quote(options.model)} --prompt "The"', flush=True)


class Trained(NamedTuple):
    """The weights of a run or an exported model, and what is needed to use them."""

    folder: Path  # of the run, or of the export
    step: int  # the step after which the weights were saved
    hp: "ModelSettings"  # from config.json
    row_length: int  # tokens per row, T, in the stage of that step
    model: "GPTConfig"  # as used after that stage
    graph: "nnx.GraphDef"
    params: "Params"  # replicated
    mesh: "Mesh"
    # The run's validation data, and its training and validation shards, if known.
    val_files: str | None = None
    val_tokens: int | None = None
    shards: dict[str, Any] | None = None
    canonical_masking: bool = False


def load(folder: Path, mesh: "Mesh") -> Trained:
    """Load the weights in a folder; raises ConfigError if there are none."""
    from nanogpt.inference.export import is_exported
    from nanogpt.inference.weights import load_model, load_run, schedule_in
    from nanogpt.training.checkpoint import run_of

    if is_exported(folder):
        hp, graph, params, origin = load_model(folder, mesh)
        step, T = origin["step"], hp.sequence_length
        return Trained(folder, step, hp, T, hp.model, graph, params, mesh)
    hp, graph, params, checkpoint = load_run(folder, mesh)
    step, schedule = checkpoint.step, schedule_in(run_of(folder))
    stage = schedule.stage(min(step, schedule.num_steps))
    T, model = schedule.row_length(stage), schedule.used(hp.model, stage)
    shards = checkpoint.facts.get("shards")
    validation = hp.val_files, hp.val_tokens, shards, hp.canonical_masking
    return Trained(run_of(folder), step, hp, T, model, graph, params, mesh, *validation)


def most_tokens(files: list[Path]) -> int:
    """Return the default number of validation tokens: all, but at most the speedrun's."""
    return max(1, min(SPEEDRUN_TOKENS, sum(len(read_shard(file)) for file in files) - 1))


def validation_files(pattern: str | None) -> tuple[list[Path], str]:
    """Return the validation shards matching a glob, or the embedded corpus's, and their name."""
    if pattern is not None:
        return find_shards(pattern), shown(pattern)
    corpus = embedded_corpus()
    return find_shards(corpus.val_files), f"embedded corpus {corpus.fingerprint}"


def bytes_per_token(tokenizer: Tokenizer) -> Int64[np.ndarray, "65536"]:
    """Return the number of UTF-8 bytes of each token; 0 for separators and unused ids."""
    lengths = np.zeros(2**16, np.int64)
    texts = map(tokenizer.token_bytes, range(tokenizer.separator))
    lengths[: tokenizer.separator] = [*map(len, texts)]
    return lengths


def validation_nats(
    run: Trained,
    rows: "ValidationRows",
    impossible: "UInt8[Array, 'V V8'] | None",
    batch_size: int,
) -> float:
    """Return the summed loss of all targets in the rows, in nats, computed in the run's dtype."""
    from nanogpt.config import Kernels
    from nanogpt.devices.mesh import ROWS, put
    from nanogpt.model.attention import choose_attention
    from nanogpt.training.step import graph_of, make_eval_step

    T, dtype = run.row_length, run.hp.dtype
    attention, _ = choose_attention([run.model], T, dtype)
    eval_step = make_eval_step(graph_of(run.model, Kernels(attention)), run.mesh, dtype)
    devices = run.mesh.size
    R = min(batch_size, -(-len(rows) // devices)) * devices

    def nats(first: int) -> float:
        batch = put(run.mesh, ROWS, (R, T + 1), partial(rows, first, R))
        return float(eval_step(run.params, batch, impossible))

    return fsum(map(nats, progress(range(0, len(rows), R), "validation")))


def hellaswag_file() -> Path:
    """Return the path of HellaSwag in the hub's cache, downloading it if necessary.

    Raises DownloadError if that fails.
    """
    from huggingface_hub import hf_hub_download

    from nanogpt.inference.hellaswag import FILE, REPOSITORY, REVISION

    get = partial(hf_hub_download, REPOSITORY, FILE, repo_type="dataset", revision=REVISION)
    return into_cache(FILE, get)


def hellaswag(
    run: Trained, items: "Sequence[Item]", separator: int, batch_size: int
) -> dict[str, float | int]:
    """Return the run's accuracy on HellaSwag, for JSON."""
    from nanogpt.inference.hellaswag import losses_of, make_row_losses, row_of, scores

    T = run.row_length
    rows = [row_of(item.context, end, separator, T) for item in items for end in item.endings]
    losses = losses_of(
        rows,
        make_row_losses(run.graph, run.mesh, run.hp.dtype),
        run.params,
        run.mesh,
        tokens_per_device=batch_size * T,
        progress=partial(progress, description="hellaswag"),
    )
    return scores(losses.reshape(len(items), -1), items)


def progress(passes: Sequence[Step], description: str) -> Iterable[Step]:
    """Iterate over the passes, with a progress bar if there is a terminal."""
    console = Console(stderr=True)
    return track(passes, description, console=console, disable=not console.is_terminal)


def write_results(folder: Path, step: int, results: dict[str, Any]) -> None:
    """Add results to evaluation.json, atomically; results of another step are dropped."""
    from nanogpt.runs.environment import environment

    path = folder / "evaluation.json"
    earlier = {}
    with suppress(ConfigError):  # missing or unreadable
        earlier = read_json(path, Results, "")
        earlier = earlier if earlier["step"] == step else {}
    everything = {"step": step, **earlier, **results, "environment": environment()}
    try:
        write_whole(path, json.dumps(everything, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(cannot_write(path, error, "copy the run to another folder")) from error


if __name__ == "__main__":
    sys.exit(main())
