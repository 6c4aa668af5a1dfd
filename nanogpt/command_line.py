"""The command line of every script: options from their declarations, read by tyro."""

import os
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")

# What options of ours are called by nanoGPT, litgpt and modded-nanogpt.
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
    "gpu": "device",
    "cpu": "device",
    "n-layer": "model.num-layers",
    "n-head": "model.num-heads",
    "n-embd": "model.width",
    "vocab-size": "model.vocab-size",
    "wandb-log": "wandb",
    "max-tokens": "max-new-tokens",
    "start": "prompt",
}


def parse(options: type[Options], arguments: Sequence[str] | None, **settings: Any) -> Options:
    """What the arguments (None for those of this process) say; see `tyro.cli` for `settings`.

    `--help` and a mistake end the process, with status 0 and 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    names = {name.replace("_", "-") for name in options.__annotations__}
    for argument in arguments:
        given = argument.partition("=")[0].replace("_", "-")
        here = ELSEWHERE.get(given.removeprefix("--"), "")
        if given.startswith("--") and here.partition(".")[0] in names:
            print(f"{given} is called --{here} here; see --help.", file=sys.stderr)
            raise SystemExit(2)
    try:
        try:
            return tyro.cli(options, args=arguments, **settings)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the help has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
