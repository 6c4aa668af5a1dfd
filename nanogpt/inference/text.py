"""Generated tokens as text: characters that span several tokens, and stop strings."""

import codecs
from collections.abc import Iterator, Sequence

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from nanogpt.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from nanogpt.devices.mesh import REPLICATED
from nanogpt.inference.generate import generate
from nanogpt.inference.sampling import Sampling, Token
from nanogpt.training.plan import Plan
from nanogpt.training.step import Params, graph_of


def write(
    graph: nnx.GraphDef,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    context: int,
    sampling: Sampling,
    dtype: str = "float32",
    stop: Sequence[str] = (),
    alternatives: int = 0,
) -> Iterator[tuple[int, Token]]:
    """Generate continuations; yields each token as it is generated, with its prompt's number.

    A prompt is the beginning of a document; with an empty one the model starts a new document. A
    text ends after `num_tokens` tokens, or before the first of the `stop` strings.

    Args: see `generate`.
    """
    texts = [_Text(tokenizer, stop) for _ in prompts]
    left = num_tokens
    for written in generate(
        graph,
        params,
        [[tokenizer.separator, *tokenizer.encode(prompt)] for prompt in prompts],
        num_tokens=num_tokens,
        context=context,
        sampling=sampling,
        dtype=dtype,
        alternatives=alternatives,
    ):
        for tokens, probabilities, likeliest, theirs in zip(*written, strict=True):
            left -= 1
            for number, text in enumerate(texts):
                if not text.ended:
                    shown = text.add(int(tokens[number])) + (text.rest() if left == 0 else "")
                    others = [
                        tokenizer.token_bytes(int(token)).decode(errors="replace")
                        for token in likeliest[number]
                    ]
                    odds = map(float, theirs[number])
                    told = tuple(zip(others, odds, strict=True))
                    yield number, Token(shown, float(probabilities[number]), told)
        if all(text.ended for text in texts):
            return


def sample(plan: Plan, params: Params, mesh: Mesh) -> str:
    """Return a continuation of a finished run's `sample_prompt`, or why there is none."""
    hp = plan.hp
    try:
        tokenizer = load_tokenizer(hp.tokenizer)
    except TokenizerError as error:
        return f"no sample: {error}"
    whole = jax.jit(lambda params: params, out_shardings=NamedSharding(mesh, REPLICATED))
    tokens = write(
        graph_of(plan.stages[hp.schedule.stage(hp.num_steps)].used_model),
        whole(params),
        tokenizer,
        [hp.sample_prompt],
        num_tokens=hp.sample_tokens,
        context=hp.sequence_length,
        sampling=Sampling(seed=hp.seed),
        dtype=hp.dtype,
    )
    return f"sample:\n{hp.sample_prompt}{''.join(token.text for _, token in tokens)}"


class _Text:
    """Decodes one text's tokens, one at a time."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text held back because it may be the beginning of a stop string
        self.ended = False

    def add(self, token: int) -> str:
        """Add a token; return the text that can now be shown."""
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            return self._held[: min(found)]
        held = max(
            (n for stop in self._stop for n in range(len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        shown = self._held[: len(self._held) - held]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """Return the text still held back after the last token."""
        return "" if self.ended else self._held + self._decoder.decode(b"", final=True)
