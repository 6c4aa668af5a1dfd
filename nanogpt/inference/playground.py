"""A local web page to play with a trained model: `make_app` is the site, `serve` runs it.

GET / is the page, playground.html. POST /generate takes the fields of `_order` as JSON and answers
with one JSON object a line: {"waiting": n} while n others come first, then every `Token`,
then {"done": "length" | "end" | "time limit"} or {"error": "a sentence"}.

Pages of other sites run in the same browser and must not reach the model. So the Host header must
name this machine (else a foreign name may point here: DNS rebinding), an Origin must be that host,
and only application/json is read, which no form of another site can send.
"""

import asyncio
import json
import logging
import re
import socket
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from hashlib import sha256
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from nanogpt.config import ConfigError
from nanogpt.inference.sampling import Sampling, Token

try:
    import anyio
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise ConfigError('The page needs Starlette and Uvicorn: pip install -e ".[serve]"') from None

Write = Callable[[str, int, Sampling], Generator[Token, None, None]]
"""Continues a prompt by at most so many tokens. It may block; closing the generator stops it."""

_Order = tuple[str, int, Sampling]

_LARGEST_BODY = 64 * 1024  # bytes
_MOST_TOKENS = 1024
_MOST_WAITING = 4
_PATIENCE = 10  # seconds that a request has to arrive


def serve(write: Write, title: str, port: int, **page: Any) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; port 0 takes any free one. `page`: see `make_app`.

    Raises:
        ConfigError: the port is taken.
    """
    app = make_app(write, title, **page)
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError):
        raise ConfigError(
            f"Port {port} is in use or not permitted; choose another with --port."
        ) from None
    port = listener.getsockname()[1]
    print(f"{title}: http://127.0.0.1:{port} (Ctrl-C to quit)")
    print(f"From another machine: ssh -L {port}:127.0.0.1:{port} <this machine>", flush=True)
    with suppress(KeyboardInterrupt):
        _Server(app).run(sockets=[listener])


class _Connection(H11Protocol):
    """A connection that is closed if its next request is not complete in time.

    Otherwise a hundred of them that never send it would lock out everyone.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_another(None)

    def on_response_complete(self) -> None:
        self._timer.cancel()
        answered = self.cycle
        super().on_response_complete()  # may begin with the next request, if that is here
        self._expect_another(answered)

    def _expect_another(self, answered: object) -> None:
        """Give up if, in a while, the request after `answered` has not begun, or has not ended."""

        def give_up() -> None:
            if self.cycle is answered or self.cycle.more_body:
                self.transport.close()

        self._timer = self.loop.call_later(_PATIENCE, give_up)


class _Server(uvicorn.Server):
    """Uvicorn on behalf of the page. At its end, streams end with the token that they are at."""

    def __init__(self, app: Starlette):
        headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        config = uvicorn.Config(
            app,
            http=_Connection,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            headers=list(headers.items()),
            log_level="warning",
            limit_concurrency=100,
            timeout_graceful_shutdown=10,
        )
        super().__init__(config)
        self._line = app.state.line

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._line.close()
        await super().shutdown(sockets)


def make_app(
    write: Write,
    title: str,
    about: str = "",
    start: Mapping[str, Any] | None = None,
    seconds: float = 120,
) -> Starlette:
    """The page and its stream.

    Args:
        write: called in a thread, for one client at a time; a few others wait, the rest get 503.
        about: a line below the title.
        start: the first values of the page's fields, by the names of `_order`.
        seconds: no generation takes longer, but for the token it is at.
    """
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    for name, text in {"title": title, "about": about, "start": json.dumps(start or {})}.items():
        page = page.replace("{{" + name + "}}", escape(text))
    headers = {"Content-Security-Policy": _only_its_own(page)}
    line = _Line()

    async def show(request: Request) -> Response:
        _check_origin(request)
        return HTMLResponse(page, headers=headers)

    async def generate(request: Request) -> Response:
        _check_origin(request)
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "The request must be application/json.")
        try:
            order = _order(await request.body())
        except ConfigError as error:
            raise HTTPException(400, str(error)) from None
        except ClientDisconnect:
            return Response()  # to nobody
        return _Reply(line, _told(write, order, seconds), seconds)

    app = Starlette(
        routes=[Route("/", show), Route("/generate", generate, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, ["127.0.0.1", "localhost", "[::1]"])],
        max_body_size=_LARGEST_BODY,
    )
    app.router.redirect_slashes = False
    app.state.line = line
    return app


def _check_origin(request: Request) -> None:
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers['host']}":
        raise HTTPException(403, "Only this page itself may ask.")


def _order(body: bytes) -> _Order:
    """What a request asks for, or ConfigError, in a sentence, for one that makes no sense."""
    kinds = {
        "prompt": (str, "text"),
        "num_tokens": (int, "a whole number"),
        "temperature": (int | float, "a number"),
        "top_k": (int | None, "a whole number or null"),
        "top_p": (int | float, "a number"),
        "seed": (int, "a whole number"),
    }
    try:
        fields = json.loads(body.decode())
        # Python reads NaN, infinity and half characters, but does not write them like this.
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ConfigError("The request is not JSON in UTF-8.") from None
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise ConfigError(f"The request must be an object of {', '.join(kinds)}.")
    for name, (kind, words) in kinds.items():
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, kind):  # True is an int, to Python
            raise ConfigError(f"{name} must be {words}.")
        if isinstance(value, int | float) and abs(value) >= 2**32:
            raise ConfigError(f"{name} is out of all bounds.")
    prompt, num_tokens = fields.pop("prompt"), fields.pop("num_tokens")
    if not 1 <= num_tokens <= _MOST_TOKENS:
        raise ConfigError(f"num_tokens must be 1 to {_MOST_TOKENS:,}, not {num_tokens}.")
    sampling = Sampling(**fields)
    sampling.check()
    return prompt, num_tokens, sampling


def _told(write: Write, order: _Order, seconds: float) -> Generator[str, None, None]:
    """The lines of the answer once it is the client's turn; for a thread, since `write` blocks."""
    end = time.monotonic() + seconds
    _, num_tokens, _ = order
    written = 0
    try:
        with closing(write(*order)) as tokens:
            for token in islice(tokens, num_tokens):
                yield _line_of(asdict(token))
                written += 1
                if time.monotonic() > end:
                    yield _line_of({"done": "time limit"})
                    return
        yield _line_of({"done": "length" if written == num_tokens else "end"})
    except ConfigError as error:
        yield _line_of({"error": str(error)})
    except Exception:
        logging.getLogger(__name__).exception("The model failed.")
        yield _line_of({"error": "The model failed; the terminal says how."})


def _line_of(fact: dict) -> str:
    return json.dumps(fact, allow_nan=False) + "\n"


class _Line:
    """Those who want the model, in the order they came: the first has it, the others wait."""

    def __init__(self):
        self.closed = False
        self._places: list[object] = []
        self._moved = anyio.Event()

    def join(self) -> object:
        if len(self._places) > _MOST_WAITING:
            raise HTTPException(503, "Too many are waiting for the model; try again in a minute.")
        place = object()
        self._places.append(place)
        return place

    def leave(self, place: object) -> None:
        self._places.remove(place)
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = anyio.Event()

    async def until_first(self, place: object) -> AsyncIterator[int]:
        """How many are before `place`, again whenever that may have changed, until it is 0."""
        while (before := self._places.index(place)) and not self.closed:
            moved = self._moved
            yield before
            await moved.wait()


class _Reply(StreamingResponse):
    """Streams `told` when it is its turn.

    However that ends (the client may be gone, even while it waits or does not read), `told` is
    closed and the place in the line is free. That cannot be left to `lines`: an asynchronous
    generator that was never begun, or is stopped between two values, is not closed at once.
    """

    def __init__(self, line: _Line, told: Generator[str, None, None], seconds: float):
        self.line, self.told, self.seconds = line, told, seconds
        self.place = line.join()
        super().__init__(self.lines(), media_type="application/x-ndjson")

    async def lines(self) -> AsyncIterator[str]:
        async for before in self.line.until_first(self.place):
            yield _line_of({"waiting": before})
        # `told` minds the time between tokens; this ends what a client that does not read holds up.
        self.patience.deadline = anyio.current_time() + 2 * self.seconds
        texts = iterate_in_threadpool(self.told)
        while not self.line.closed and (text := await anext(texts, None)):
            yield text
        if self.line.closed:
            yield _line_of({"error": "The server was ended."})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.CancelScope() as self.patience:
                await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self.told.close)
            self.line.leave(self.place)


def _only_its_own(page: str) -> str:
    """The Content-Security-Policy under which `page` runs its script and style and nothing else."""

    def only(tag: str) -> str:
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"{tag}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; {only('script')}; {only('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
