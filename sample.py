"""Continue a prompt with a trained model: `python3 sample.py runs/<name> --prompt "def "`."""

import nanogpt  # explains what to do if packages are missing

# isort: split
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from msgspec import Meta

from nanogpt.checks import ConfigError, Positive, UserError, checked
from nanogpt.command_line import discard_output, parse
from nanogpt.data.tokenizer import load_tokenizer
from nanogpt.inference.sampling import Sampling, Token

MOST_SAMPLES = 1024  # so that a typo cannot use up the machine's memory


@dataclass(frozen=True)
class Options:
    """Continue a prompt with a trained model."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a run, runs/<name>, of one of its checkpoints, or one written by export.py; or
    hf://user/name, such a folder on the Hugging Face hub."""
    prompt: str = ""
    """Text to continue; empty: start a new document."""
    prompt_file: Path | None = None
    """File with the prompt; - for standard input."""
    num_samples: Annotated[int, Meta(ge=1, le=MOST_SAMPLES)] = 1
    """Number of texts, generated as one batch."""
    max_new_tokens: Positive = 500
    """Maximum number of tokens per text."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()  # noqa: RUF009
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop before this string; can be given several times. <|endoftext|> ends a document."""
    serve: bool = False
    """Serve a web page to play with the model; the sampling settings are on the page."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port of that page, reachable from this machine only."""

    def check(self) -> None:
        """Raise ConfigError, with a sentence for the user, if the options are invalid."""
        self.sampling.check()  # first: its options have no prefix on the command line
        checked(asdict(self), Options)
        if self.prompt and self.prompt_file:
            raise ConfigError("Give either --prompt or --prompt-file, not both.")
        if "" in self.stop:
            raise ConfigError("stop must not be empty.")


Write = Callable[..., Iterator[tuple[int, Token]]]  # nanogpt.inference.text.write for one model


def main(arguments: list[str] | None = None) -> int:
    """Print the prompt and its continuation, or serve a page; return the exit status."""
    options = parse(Options, arguments)
    try:
        options.check()
        if options.serve:
            serve_page(options)
        else:
            prompt = read_prompt(options)
            with enough_memory(options.num_samples):
                print_samples(options, prompt)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` may stop early
            print(f"The text cannot be written ({error.strerror}).", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def read_prompt(options: Options) -> str:
    """Return the prompt, however it is given; raises ConfigError if it cannot be read."""
    path = options.prompt_file
    try:
        if path is None:
            return os.fsencode(options.prompt).decode("utf-8")
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"The prompt cannot be read from {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        where = "The prompt" if path is None or str(path) == "-" else f"The prompt in {path}"
        raise ConfigError(f"{where} is not UTF-8 (byte {error.start:,}): convert it.") from error


def print_samples(options: Options, prompt: str) -> None:
    """Print the samples, generated as one batch: the first token by token, then the others."""
    write, _ = load_writer(options.model)
    later = [""] * options.num_samples

    def heading(number: int) -> None:
        if options.num_samples > 1:
            print(f"--- sample {number + 1} ---")

    heading(0)
    print(prompt, end="", flush=True)
    for number, token in write(
        prompts=[prompt] * options.num_samples,
        num_tokens=options.max_new_tokens,
        sampling=options.sampling,
        stop=options.stop,
    ):
        if number == 0:
            print(token.text, end="", flush=True)
        else:
            later[number] += token.text
    print()
    for number in range(1, options.num_samples):
        heading(number)
        print(prompt + later[number])


@contextmanager
def enough_memory(num_samples: int) -> Generator[None, None, None]:
    """Turn an out-of-memory error of the device into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        from nanogpt.devices.compilation import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"The device has too little memory for {num_samples:,} texts at once: use a smaller "
            "num_samples, or generate on the CPU with JAX_PLATFORMS=cpu."
        ) from error


def serve_page(options: Options) -> None:
    """Serve the playground until Ctrl-C."""
    from nanogpt.inference.playground import serve

    write, about = load_writer(options.model)

    def one(prompt: str, max_new_tokens: int, sampling: Sampling) -> Generator[Token, None, None]:
        for _, token in write(
            prompts=[prompt], num_tokens=max_new_tokens, sampling=sampling, alternatives=6
        ):
            yield token

    chosen = asdict(options.sampling)
    start = chosen | {"prompt": read_prompt(options), "num_tokens": options.max_new_tokens}
    start["top_k"] = start["top_k"] or 0  # the slider's "all"
    serve(one, options.model, options.port, about=about, start=start)


def load_writer(name: str) -> tuple[Write, str]:
    """Load a model from a folder or the hub; return its text generator and a line about it.

    Raises ConfigError if there is none.
    """
    # Allocate GPU memory only as needed: a training run may be using the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from functools import partial

    import jax

    from nanogpt.devices.accelerator import use_device
    from nanogpt.devices.compilation import use_compilation_cache
    from nanogpt.devices.mesh import make_mesh
    from nanogpt.inference.hub import folder_of
    from nanogpt.inference.text import write
    from nanogpt.inference.weights import load_model

    nanogpt.imported()
    device = use_device()
    use_compilation_cache()
    settings, graph, params, origin = load_model(folder_of(name), make_mesh(1))
    parameters = sum(array.size for array in jax.tree.leaves(params))
    about = f"{parameters:,} parameters, {settings.sequence_length:,}-token context, "
    about += f"trained for {origin['step']:,} steps"
    if "val_loss" in origin:
        about += f", val loss {origin['val_loss']:.4f}"
    return partial(
        write,
        graph,
        params,
        load_tokenizer(settings.tokenizer),
        context=settings.sequence_length,
        # CPUs emulate bfloat16.
        dtype="float32" if device == "cpu" else settings.dtype,
    ), about


if __name__ == "__main__":
    sys.exit(main())
