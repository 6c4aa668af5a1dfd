"""A local web page to play with a trained model: `make_app` is the site, `serve` runs it.

GET / returns the page, playground.html. POST /generate takes the fields of `_order` as JSON and
answers with one JSON object per line: {"waiting": n} while n others come first, then each `Token`,
then {"done": "length" | "end" | "time limit"} or {"error": "a sentence"}.

Other sites' pages run in the same browser and must not reach the model. So the Host header must
name this machine (another name could point to it: DNS rebinding), an Origin must be that host, and
only application/json is accepted, which forms on other sites cannot send.
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
"""Continues a prompt by at most this many tokens. May block; closing the generator stops it."""

_Order = tuple[str, int, Sampling]

_LARGEST_BODY = 64 * 1024  # bytes
_MOST_TOKENS = 1024
_MOST_WAITING = 4
_PATIENCE = 10  # seconds in which a request must arrive


def serve(write: Write, title: str, port: int, **page: Any) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; port 0 takes any free one. `page`: see `make_app`.

    Raises:
        ConfigError: the port is in use.
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
    """A connection that is closed if its next request does not arrive completely in time.

    Otherwise a hundred idle connections would lock out everyone.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_another(None)

    def on_response_complete(self) -> None:
        self._timer.cancel()
        answered = self.cycle
        super().on_response_complete()  # starts on the next request if it has arrived
        self._expect_another(answered)

    def _expect_another(self, answered: object) -> None:
        """Close the connection unless the request after `answered` arrives completely in time."""

        def give_up() -> None:
            if self.cycle is answered or self.cycle.more_body:
                self.transport.close()

        self._timer = self.loop.call_later(_PATIENCE, give_up)


class _Server(uvicorn.Server):
    """Uvicorn for the page. On shutdown, streams end after their current token."""

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
    """Create the site: the page and its stream of tokens.

    Args:
        write: called in a thread, for one client at a time; a few others wait, the rest get 503.
        about: a line below the title.
        start: initial values of the page's fields, by their names in `_order`.
        seconds: time limit of a generation, which ends after its current token.
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
            return Response()  # nobody receives it
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
        raise HTTPException(403, "Only this page may send requests.")


def _order(body: bytes) -> _Order:
    """Parse a request; raises ConfigError, with a sentence for the user, if it is invalid."""
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
        # Rejects NaN, infinity and lone surrogates, which Python's JSON reader accepts.
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ConfigError("The request is not valid UTF-8 JSON.") from None
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise ConfigError(f"The request must be an object with {', '.join(kinds)}.")
    for name, (kind, words) in kinds.items():
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, kind):  # True is an int in Python
            raise ConfigError(f"{name} must be {words}.")
        if isinstance(value, int | float) and abs(value) >= 2**32:
            raise ConfigError(f"{name} is out of range.")
    prompt, num_tokens = fields.pop("prompt"), fields.pop("num_tokens")
    if not 1 <= num_tokens <= _MOST_TOKENS:
        raise ConfigError(f"num_tokens must be 1 to {_MOST_TOKENS:,}, not {num_tokens}.")
    sampling = Sampling(**fields)
    sampling.check()
    return prompt, num_tokens, sampling


def _told(write: Write, order: _Order, seconds: float) -> Generator[str, None, None]:
    """Yield the lines of the answer when it is the client's turn; in a thread: `write` blocks."""
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
        yield _line_of({"error": "The model failed; see the terminal."})


def _line_of(fact: dict) -> str:
    return json.dumps(fact, allow_nan=False) + "\n"


class _Line:
    """The queue for the model: the first client has it, the others wait in order of arrival."""

    def __init__(self):
        self.closed = False
        self._places: list[object] = []
        self._moved = anyio.Event()

    def join(self) -> object:
        if len(self._places) > _MOST_WAITING:
            raise HTTPException(503, "Too many requests are waiting; try again in a minute.")
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
        """Yield how many are ahead of `place`, at first and after each change, until none is."""
        while (before := self._places.index(place)) and not self.closed:
            moved = self._moved
            yield before
            await moved.wait()


class _Reply(StreamingResponse):
    """Streams `told` when it is its turn.

    However that ends (a client can disappear at any time, even while it waits or does not read),
    `told` is closed and the place in the queue is freed. `lines` cannot do that: an asynchronous
    generator that was never started, or is stopped between two values, is not closed at once.
    """

    def __init__(self, line: _Line, told: Generator[str, None, None], seconds: float):
        self.line, self.told, self.seconds = line, told, seconds
        self.place = line.join()
        super().__init__(self.lines(), media_type="application/x-ndjson")

    async def lines(self) -> AsyncIterator[str]:
        async for before in self.line.until_first(self.place):
            yield _line_of({"waiting": before})
        # `told` checks the time limit between tokens; this one ends clients that do not read.
        self.patience.deadline = anyio.current_time() + 2 * self.seconds
        texts = iterate_in_threadpool(self.told)
        while not self.line.closed and (text := await anext(texts, None)):
            yield text
        if self.line.closed:
            yield _line_of({"error": "The server was stopped."})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.CancelScope() as self.patience:
                await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self.told.close)
            self.line.leave(self.place)


def _only_its_own(page: str) -> str:
    """Return the Content-Security-Policy that allows only the page's own script and style."""

    def only(tag: str) -> str:
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"{tag}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; {only('script')}; {only('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
