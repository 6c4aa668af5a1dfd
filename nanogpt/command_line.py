"""The command line of every script: tyro parses the options from their declarations."""

import os
import sys
from collections.abc import Sequence
from functools import cache
from io import TextIOWrapper
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")

# Names of options in nanoGPT, litgpt and modded-nanogpt, and ours for them.
ELSEWHERE = {
    "lr": "learning-rate",
    "max-lr": "learning-rate",
    "batch": "batch-size",
    "micro-batch-size": "batch-size",
    "global-batch-size": "total-batch-size",
    "gradient-accumulation-steps": "total-batch-size",
    "block-size": "sequence-length",
    "seq-len": "sequence-length",
    "steps": "num-steps",
    "max-steps": "num-steps",
    "max-iters": "num-steps",
    "num-iterations": "num-steps",
    "eval-interval": "val-loss-every",
    "eval-iters": "val-tokens",
    "save-interval": "checkpoint-every",
    "out-dir": "run-name",
    "cpu": "device",
    "n-layer": "model.num-layers",
    "n-head": "model.num-heads",
    "n-embd": "model.width",
    "vocab-size": "model.vocab-size",
    "wandb-log": "wandb",
    "max-tokens": "max-new-tokens",
    "start": "prompt",
}
# Options there that have no counterpart here, and why.
NEEDLESS = {
    "compile": "every program is compiled",
    "gpu": "all GPUs are used; choose some with CUDA_VISIBLE_DEVICES",
    "gpus": "all GPUs are used; choose some with CUDA_VISIBLE_DEVICES",
    "epochs": "give --num-steps; --dry-run shows the epochs",
}


def parse(options: type[Options], arguments: Sequence[str] | None, **settings: Any) -> Options:
    """Parse the arguments (None: those of this process); `settings` are passed to `tyro.cli`.

    `--help` and errors end the process, with status 0 and 2.
    """
    if sys.stdout is None:
        print("Standard output is closed: send it to a file, or to /dev/null.", file=sys.stderr)
        raise SystemExit(2)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console may not support all characters
    arguments = sys.argv[1:] if arguments is None else arguments
    names = {name.replace("_", "-") for name in options.__annotations__}
    for argument in arguments:
        given = argument.partition("=")[0].replace("_", "-")
        here = ELSEWHERE.get(given.removeprefix("--"), "")
        if given.startswith("--") and here.partition(".")[0] in names:
            print(f"{given} is called --{here} here; see --help.", file=sys.stderr)
            raise SystemExit(2)
        why = NEEDLESS.get(given.removeprefix("--"), "")
        if given.startswith("--") and why and "num-steps" in names:
            print(f"{given} is not an option here: {why}.", file=sys.stderr)
            raise SystemExit(2)
    try:
        try:
            return _parsed(options, tuple(arguments), **settings)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the help, such as `head`, has ended
        discard_output()
        raise SystemExit(0) from None


@cache  # the settings of training take a tenth of a second, and start from several defaults
def _parsed(options: type[Options], arguments: tuple[str, ...], **settings: Any) -> Options:
    return tyro.cli(options, args=arguments, **settings)


def print_result(text: str) -> int:
    """Print a result; return the exit status, which is 2, with a sentence, if that fails."""
    try:
        print(text, flush=True)
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            print(f"The result cannot be printed ({error.strerror}).", file=sys.stderr)
            return 2
    return 0


def discard_output() -> None:
    """Discard all further output; otherwise Python would try to write it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
