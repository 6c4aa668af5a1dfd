"""Export a trained model in open formats: `python3 export.py runs/<name> --out gpt`.

nanogpt/inference/export.py describes the folder. nanogpt/inference/model_note.py writes its
MODEL.md, and nanogpt/inference/huggingface.py the files for Hugging Face's libraries.
"""

import nanogpt  # explains what to do if packages are missing

# isort: split
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from nanogpt.checks import UserError
from nanogpt.command_line import parse, print_result


@dataclass(frozen=True)
class Options:
    """Export a run's weights as safetensors, with everything needed to use them."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, runs/<name>, for its newest weights, or of one of its checkpoints."""
    out: Path
    """Output folder; must be new or empty."""
    push_to_hub: str | None = None
    """Also upload the folder to this repository on the Hugging Face hub, user/name. It is created
    as a public repository if needed; log in with `hf auth login`, or set HF_TOKEN."""


def main(arguments: list[str] | None = None) -> int:
    """Export the run; return the exit status."""
    options = parse(Options, arguments)
    try:
        return print_result(export(options.run, options.out, options.push_to_hub))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # The arrays are the last file: only the upload is missing.
        written = any(options.out.glob("*.safetensors"))
        told = f"{options.out} is complete" if written else "nothing was written"
        print(f"Interrupted: {told}.", file=sys.stderr)
        return 130


def export(run: Path, out: Path, repository: str | None = None) -> str:
    """Write a run's newest weights, or a checkpoint's, to the folder `out`; return a summary.

    If a repository is given, the folder is also uploaded there.

    Raises ConfigError if there are no weights or `out` cannot be written, TokenizerError if the
    tokenizer's vocabulary is not available, and DownloadError if the hub fails.
    """
    # Allocate GPU memory only as needed: a training run may be using the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from flax import nnx

    from nanogpt.devices.accelerator import use_device
    from nanogpt.devices.mesh import make_mesh
    from nanogpt.inference.export import NOTE, check_free, save_model
    from nanogpt.inference.hub import check_name, make_repository, push
    from nanogpt.inference.huggingface import huggingface_files
    from nanogpt.inference.model_note import note
    from nanogpt.inference.weights import load_run, origin_of
    from nanogpt.training.checkpoint import run_of

    nanogpt.imported()
    check_free(out)
    if repository is not None:
        check_name(repository)
    use_device()
    hp, graph, params, checkpoint = load_run(run, make_mesh(1))
    model = nnx.merge(graph, params).config
    names = "tokenizer", "sequence_length", "dtype"
    settings = {name: getattr(hp, name) for name in names} | {"from": origin_of(checkpoint)}
    texts = {NOTE: note(model, settings, params)} | huggingface_files(model, settings, run_of(run))
    address = make_repository(repository) if repository is not None else None
    save_model(out, model, params, settings, texts)
    if repository is not None:
        push(out, repository)
    return (
        f"the weights of {run} after step {checkpoint.step:,} are in {out}"
        + (f" and at {address}" if address else "")
        + f"\nUse them with:\n  python3 sample.py {quote(str(out))}"
        + f"\n  python3 train_gpt.py --init-from {quote(str(out))}"
        + f"\nor with Hugging Face's transformers: see {out}/README.md."
    )


if __name__ == "__main__":
    sys.exit(main())
