"""The local page: hostile requests to a real server, and a browser if one is installed.

The model is a stub: it generates given words, and counts how often it is started and stopped.
"""

import base64
import hashlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from nanogpt.config import ConfigError
from nanogpt.inference import playground
from nanogpt.inference.sampling import Sampling, Token

ORDER = {
    "prompt": "Once",
    "num_tokens": 5,
    "temperature": 0.8,
    "top_k": None,
    "top_p": 1.0,
    "seed": 7,
}
LONG = {**ORDER, "num_tokens": 1024}
WORDS = [" upon", " a", " time", ",", " there", " was", "\n", " <script>alert(1)</script>", "", "é"]


class Model:
    """Generates WORDS repeatedly, a token every `pause` seconds, and records what happens."""

    def __init__(self, pause=0.0, words=WORDS, error=None, padding=""):
        self.pause, self.words, self.error, self.padding = pause, words, error, padding
        self.orders = []
        self.running = self.most_running = self.closed = 0

    def __call__(self, prompt, num_tokens, sampling):
        self.orders.append((prompt, num_tokens, sampling))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for at in range(num_tokens):
                time.sleep(self.pause)
                if self.error is not None:
                    raise self.error
                yield self.token(at)
        except GeneratorExit:
            self.closed += 1
            raise
        finally:
            self.running -= 1

    def token(self, at):
        text = self.words[at % len(self.words)]
        probability = (at % 10 + 1) / 16
        return Token(text, probability, [(" else" + self.padding, 0.25), (text, probability)])


@contextmanager
def serving(model, title="runs/test", **options):
    """Run a server in a thread while in this context; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = playground._Server(playground.make_app(model, title, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def port(model):
    with serving(model) as port:
        yield port


def ask(port, method="GET", path="/", body=None, **headers):
    """Send a request, with a dictionary as JSON; return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    if isinstance(body, dict):
        body = json.dumps(body)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if method == "POST":
        headers = {"Content-Type": "application/json"} | headers
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, reply.headers, text


def told(port, order=ORDER):
    """Return the objects that /generate answers with."""
    status, _, text = ask(port, "POST", "/generate", order)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def raw(port, *pieces):
    """Send these bytes on a socket; return all that is received until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        reply = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while data := connection.recv(65536):
                reply += data
        except ConnectionError:
            pass  # the server may close the connection before reading everything
        return reply


def begin(port, order=LONG):
    """Return an open socket with the answer to `order`, after its first line was received."""
    body = json.dumps(order).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(post(f"Content-Length: {len(body)}") + body)
    reply = b""
    while b"}\n" not in reply and (data := connection.recv(4096)):
        reply += data
    return connection, reply.decode()


def post(*headers):
    lines = ["POST /generate HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*lines, "Connection: close", *headers, "", ""]).encode()


def eventually(true, seconds=10):
    """Wait for a condition; return whether it became true."""
    end = time.monotonic() + seconds
    while not (came := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return came


# The page and its stream.


def test_the_page_is_one_document_whose_headers_allow_only_its_own_script_and_style(port):
    status, headers, page = ask(port)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not re.search(r"https?:|innerHTML|\son\w+=|style=", page)


def test_the_title_is_text_and_not_markup():
    with serving(Model(), title="<b>&") as port:
        page = ask(port)[2]
    assert page.count("&lt;b&gt;&amp;") == 2
    assert "<b>" not in page


def test_tokens_come_one_a_line_and_then_the_reason_of_the_end(model, port):
    lines = told(port)
    assert lines == [
        {
            "text": WORDS[at],
            "probability": (at + 1) / 16,
            "alternatives": [[" else", 0.25], [WORDS[at], (at + 1) / 16]],
        }
        for at in range(5)
    ] + [{"done": "length"}]
    assert model.orders[-1] == ("Once", 5, Sampling(0.8, None, 1.0, 7))


def test_a_model_that_ends_early_says_so_and_one_that_goes_on_is_stopped():
    short = serving(lambda *order: (Token("a", 0.5) for _ in range(1)))
    endless = serving(lambda *order: Model()(order[0], 10**9, order[2]))
    with short as port:
        assert told(port)[1:] == [{"done": "end"}]
    with endless as port:
        assert len(told(port)) == 6


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConfigError("The prompt is odd."), "The prompt is odd."),
        (RuntimeError("secret"), "The model failed; see the terminal."),
    ],
)
def test_an_error_of_the_model_is_a_sentence_and_the_next_one_is_served(error, sentence, caplog):
    model = Model(error=error)
    with serving(model) as port:
        assert told(port) == [{"error": sentence}]
        model.error = None
        assert told(port)[-1] == {"done": "length"}
    assert ("secret" in caplog.text) == ("terminal" in sentence)


def test_a_probability_that_json_does_not_have_is_an_error_and_no_broken_line():
    with serving(lambda *order: (Token("a", float("nan")) for _ in range(1))) as port:
        assert [list(line) for line in told(port)] == [["error"]]


# What hostile clients send.


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..\\..\\etc\\passwd",
        "/....//etc/passwd",
        "//etc/passwd",
        "/playground.html",
        "/static/../playground.py",
        "/generate/",
        "/%00",
        "http://127.0.0.1/",
    ],
)
def test_no_other_path_is_there(port, path):
    reply = raw(
        port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    )
    assert reply.startswith(b"HTTP/1.1 404 ")
    assert reply.endswith(b"Not Found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/generate"), ("OPTIONS", "/generate"), ("PUT", "/generate"), ("POST", "/")],
)
def test_no_other_method_is_there(port, method, path):
    status, headers, _ = ask(port, method, path)
    assert status == 405
    assert not [name for name in headers if name.lower().startswith("access-control")]


def without(name):
    return {key: value for key, value in ORDER.items() if key != name}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
        (json.dumps(ORDER).encode("utf-16"), "JSON"),
        (b"[" * 60_000, "JSON"),
        (b'{"a":' * 10_000, "JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
        (b"[]", "object with prompt, num_tokens"),
        (b"null", "object with prompt, num_tokens"),
        (without("seed"), "object with prompt, num_tokens"),
        ({**ORDER, "file": "/etc/passwd"}, "object with prompt, num_tokens"),
        ({**ORDER, "prompt": None}, "prompt must be text"),
        ({**ORDER, "prompt": ["a"]}, "prompt must be text"),
        ({**ORDER, "prompt": "\ud800"}, "JSON"),
        ({**ORDER, "num_tokens": 0}, "num_tokens must be 1 to 1,024"),
        ({**ORDER, "num_tokens": 1025}, "num_tokens must be 1 to 1,024"),
        ({**ORDER, "num_tokens": True}, "num_tokens must be a whole number"),
        ({**ORDER, "num_tokens": 5.0}, "num_tokens must be a whole number"),
        ({**ORDER, "num_tokens": "5"}, "num_tokens must be a whole number"),
        ({**ORDER, "num_tokens": None}, "num_tokens must be a whole number"),
        ({**ORDER, "temperature": float("nan")}, "JSON"),
        ({**ORDER, "temperature": float("inf")}, "JSON"),
        (json.dumps(ORDER).replace("0.8", "1e999").encode(), "JSON"),
        ({**ORDER, "temperature": 10**400}, "temperature is out of range"),
        ({**ORDER, "temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({**ORDER, "temperature": False}, "temperature must be a number"),
        ({**ORDER, "temperature": None}, "temperature must be a number"),
        ({**ORDER, "top_k": 0}, "top_k must be at least 1"),
        ({**ORDER, "top_k": True}, "top_k must be a whole number or null"),
        ({**ORDER, "top_k": 2**40}, "top_k is out of range"),
        ({**ORDER, "top_p": 0}, "top_p must be above 0, not 0"),
        ({**ORDER, "top_p": 1.1}, "top_p must be at most 1, not 1.1"),
        ({**ORDER, "seed": -1}, "seed must be at least 0, not -1"),
        ({**ORDER, "seed": 2**32}, "seed is out of range"),
    ],
)
def test_a_request_that_makes_no_sense_gets_one_sentence(model, port, body, sentence):
    before = len(model.orders)
    status, _, text = ask(port, "POST", "/generate", body)
    assert status == 400
    assert sentence in text
    assert text.endswith(".")
    assert len(text) < 150
    assert "Traceback" not in text
    assert len(model.orders) == before


def test_whole_numbers_may_stand_for_temperature_and_top_p(model, port):
    told(port, {**ORDER, "temperature": 0, "top_k": 3, "top_p": 1})
    assert model.orders[-1][2] == Sampling(0, 3, 1, 7)


def chunks(size):
    return [
        b"%x\r\n%b\r\n" % (len(part), part)
        for part in [b"x" * min(size, 65536)] * -(-size // 65536)
    ]


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([post("Content-Length: 10000000"), b"x" * 10_000_000], id="declared"),
        pytest.param([post("Content-Length: 10000000"), b"x" * 10], id="declared and not sent"),
        pytest.param([post("Content-Length: 65537"), b"x" * 65537], id="one byte too many"),
        pytest.param([post("Transfer-Encoding: chunked"), *chunks(10**7)], id="chunked"),
        pytest.param([post("Transfer-Encoding: chunked"), *chunks(65536), b"1\r\nx\r\n0\r\n\r\n"]),
    ],
)
def test_a_body_above_64_kb_is_refused_unread(model, port, pieces):
    before = len(model.orders)
    reply = raw(port, *pieces)
    # If the server closed the connection while bytes were in flight, its answer may be lost.
    assert reply.startswith(b"HTTP/1.1 413 ") or (reply == b"" and sum(map(len, pieces)) > 10**6)
    assert len(model.orders) == before
    assert ask(port)[0] == 200


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([post("Content-Length: 5"), b"x" * 10_000_000], id="longer than it says"),
        pytest.param([post("Content-Length: -5"), b"x" * 5], id="negative"),
        pytest.param([post("Content-Length: 5", "Content-Length: 6"), b"x" * 6], id="two"),
        pytest.param(
            [post("Content-Length: 5", "Transfer-Encoding: chunked"), b"zz\r\n"], id="both"
        ),
        pytest.param([post("Transfer-Encoding: chunked"), b"zz\r\n"], id="not a chunk"),
        pytest.param([post(), b"x" * 5], id="absent"),
        pytest.param([b"\x16\x03\x01\x02\x00\x01" * 50, b"\r\n\r\n"], id="not HTTP"),
        pytest.param([post("X: " + "y" * 200_000)], id="endless header"),
    ],
)
def test_a_lying_or_broken_request_is_refused(model, port, pieces):
    before = len(model.orders)
    reply = raw(port, *pieces)
    assert reply.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")) or reply == b""
    assert len(model.orders) == before
    assert ask(port)[0] == 200


def test_a_body_of_64_kb_is_read(model, port):
    order = {**ORDER, "prompt": ""}
    order["prompt"] = "x" * (64 * 1024 - len(json.dumps(order)))
    told(port, order)
    assert model.orders[-1][0] == order["prompt"]


def test_a_client_that_leaves_within_its_body_is_forgotten(capsys):
    with serving(Model()) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(post("Content-Length: 1000") + b"x")
            time.sleep(0.1)
        assert ask(port)[0] == 200
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost",
        post("Content-Length: 50") + b"{",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT",
    ],
)
def test_a_hundred_requests_that_never_end_lock_nobody_out_for_long(half, monkeypatch, caplog):
    monkeypatch.setattr(playground, "_PATIENCE", 0.5)
    with serving(Model()) as port, ExitStack() as stack:
        for _ in range(100):
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            stack.enter_context(connection).sendall(half)
        assert eventually(lambda: ask(port)[0] == 200)
        while connection.recv(65536):
            pass  # until the server has closed it
    assert not caplog.records


def test_a_request_that_came_with_the_one_before_may_take_longer(monkeypatch):
    monkeypatch.setattr(playground, "_PATIENCE", 0.25)
    body = json.dumps(ORDER | {"num_tokens": 20}).encode()
    with serving(Model(pause=0.05)) as port:
        first = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        reply = raw(port, first + post(f"Content-Length: {len(body)}") + body)
    assert b'{"done": ' in reply  # the page does not show it


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "LOCALHOST", "[::1]:8000"])
def test_the_names_of_this_machine_are_served(port, host):
    assert ask(port, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil",
        "",
        "::1",
    ],
)
def test_a_foreign_name_that_points_here_is_refused(model, port, host):
    before = len(model.orders)
    assert ask(port, Host=host)[0] == 400
    assert ask(port, "POST", "/generate", ORDER, Host=host)[0] == 400
    assert raw(port, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert len(model.orders) == before


def test_a_page_of_another_origin_is_refused_and_the_own_one_served(model, port):
    own = f"http://127.0.0.1:{port}"
    assert ask(port, "POST", "/generate", ORDER, Origin=own)[0] == 200
    before = len(model.orders)
    for origin in ("https://evil.example", "null", "", own + ".evil.example", "http://127.0.0.1:1"):
        assert ask(port, "POST", "/generate", ORDER, Origin=origin)[0] == 403
        assert ask(port, Origin=origin)[0] == 403
    assert len(model.orders) == before


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_of_another_site_could_send_is_refused(port, kind):
    assert ask(port, "POST", "/generate", ORDER, Content_Type=kind)[0] == 415
    assert (
        ask(port, "POST", "/generate", ORDER, Content_Type="application/json; charset=utf-8")[0]
        == 200
    )


# One at a time.


def test_of_fifty_at_once_one_runs_at_a_time_and_the_rest_waits_or_is_sent_away():
    model = Model(pause=0.01)
    with serving(model) as port, ThreadPoolExecutor(50) as clients:
        asked = [clients.submit(ask, port, "POST", "/generate", ORDER) for _ in range(50)]
        replies = [future.result() for future in asked]
    served = [text for status, _, text in replies if status == 200]
    refused = [text for status, _, text in replies if status == 503]
    assert len(served) + len(refused) == 50
    assert len(served) == len(model.orders) >= 5
    assert refused
    assert model.most_running == 1
    assert {text.splitlines()[-1] for text in served} == {'{"done": "length"}'}
    assert set(refused) == {"Too many requests are waiting; try again in a minute."}


def test_those_who_wait_are_told_how_many_are_before_them_and_come_in_order():
    model = Model(pause=0.01)
    with serving(model) as port:
        first, _ = begin(port)
        others = [begin(port, {**ORDER, "seed": seed}) for seed in range(1, 5)]
        for before, (_, reply) in enumerate(others, 1):
            assert f'{{"waiting": {before}}}' in reply
        assert ask(port, "POST", "/generate", ORDER)[0] == 503
        first.close()
        last, reply = others[-1]
        while '"done"' not in reply:
            reply += last.recv(65536).decode()
        waits = [int(number) for number in re.findall(r'"waiting": (\d)', reply)]
        assert waits == sorted(waits, reverse=True)
        assert waits[-1] == 1
        for connection, _ in others:
            connection.close()
    assert [sampling.seed for _, _, sampling in model.orders] == [7, 1, 2, 3, 4]
    assert model.most_running == 1


def test_a_client_that_goes_away_stops_the_model_and_frees_it():
    model = Model(pause=0.02)
    with serving(model) as port:
        connection, _ = begin(port)
        connection.close()
        assert eventually(lambda: model.closed == 1)
        assert told(port)[-1] == {"done": "length"}


def test_a_client_that_goes_away_while_it_waits_is_never_served():
    model = Model(pause=0.02)
    with serving(model) as port:
        first, _ = begin(port)
        for _ in range(4):
            begin(port, {**ORDER, "seed": 1})[0].close()

        def comes_next():
            connection, reply = begin(port, {**ORDER, "seed": 1})
            connection.close()
            return '{"waiting": 1}' in reply

        assert eventually(comes_next)
        first.close()
        assert told(port)[-1] == {"done": "length"}
    assert [sampling.seed for _, _, sampling in model.orders] == [7, 7]


def test_a_client_that_does_not_read_does_not_keep_the_model():
    model = Model(padding="x" * 100_000)
    with serving(model, seconds=0.5) as port:
        connection, _ = begin(port)
        assert eventually(lambda: model.closed == 1)
        assert told(port)[-1] == {"done": "length"}
        connection.close()


def test_a_generation_ends_at_its_time_limit():
    model = Model(pause=0.05)
    with serving(model, seconds=0.2) as port:
        lines = told(port, LONG)
    assert lines[-1] == {"done": "time limit"}
    assert 2 <= len(lines) <= 6
    assert model.closed == 1


# The command.


def test_the_command_serves_one_address_and_ctrl_c_ends_it_and_its_streams_without_a_traceback():
    script = """if True:
        import time
        from nanogpt.inference import playground
        from nanogpt.inference import sampling
        def write(prompt, num_tokens, sampled):
            while True:
                time.sleep(0.05)
                yield sampling.Token("a", 0.5)
        playground.serve(write, "runs/test", 0)
        print("ended")
    """
    server = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(playground.__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline()
        port = int(re.fullmatch(r"runs/test: http://127.0.0.1:(\d+) \(.*\)\n", address)[1])
        assert f"ssh -L {port}:127.0.0.1:{port} " in server.stdout.readline()
        if sys.platform == "linux":  # where each address of 127.0.0.0/8 is this machine
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), 5)
        (running, _), (waiting, _) = begin(port), begin(port)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        for connection in (running, waiting):
            rest = b""
            while data := connection.recv(65536):
                rest += data
            assert b'{"error": "The server was stopped."}' in rest
            connection.close()
        assert server.stdout.read() == "ended\n"
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("kind", ["taken", "impossible"])
def test_a_port_that_cannot_be_had_is_one_sentence(kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if kind == "taken" else 65536
        with pytest.raises(ConfigError, match=f"Port {port} is in use or not permitted; choose "):
            playground.serve(Model(), "runs/test", port)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_the_server_packages_the_advice_is_one_sentence(package, monkeypatch):
    monkeypatch.delitem(sys.modules, "nanogpt.inference.playground")
    for name in [package, *(name for name in sys.modules if name.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[serve\]"'):
        __import__("nanogpt.inference.playground")


# The page in a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a server's page; afterwards there must be no errors and no requests elsewhere."""
    pages = []

    def visit(port, **options):
        page = browser.new_page(**options)
        page.set_default_timeout(10_000)
        complaints, elsewhere, own = [], [], f"http://127.0.0.1:{port}/"
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on(
            "request",
            lambda request: request.url.startswith((own, "data:")) or elsewhere.append(request.url),
        )
        pages.append((page, complaints, elsewhere))
        page.goto(own)
        return page

    yield visit
    for page, complaints, elsewhere in pages:
        page.close()
        assert complaints == elsewhere == []


def status(page, text):
    """Wait until the page shows this status."""
    from playwright.sync_api import expect

    expect(page.get_by_role("status")).to_have_text(text, timeout=10_000)


def write_text(page, prompt="Once", num_tokens=10):
    page.get_by_label("Prompt").fill(prompt)
    page.locator("#num_tokens").fill(str(num_tokens))
    page.get_by_role("button", name="Generate").click()


def test_what_is_asked_on_the_page_is_what_the_model_gets(visit):
    model = Model()
    with serving(model) as port:
        page = visit(port)
        page.locator("#temperature").fill("1.25")
        page.locator("#top_p").fill("0.5")
        page.locator("#top_k").fill("40")
        page.locator("#seed").fill("123")
        write_text(page, "Once é", 3)
        status(page, "3 tokens.")
        # What a screen reader says for a slider, and its label.
        assert page.locator("#top_k").evaluate("slider => slider.ariaValueText") == "40"
        page.locator("#top_k").fill("0")
        assert page.locator("#top_k").evaluate("slider => slider.ariaValueText") == "all"
        for times in (1, 2):  # without and with the seed of the text before
            for _ in range(times):
                write_text(page, "", 1)
                status(page, "1 token.")
            page.get_by_label("Keep the seed").check()
        page.get_by_label("Keep the seed").uncheck()
        page.locator("#seed").fill("55")
        page.get_by_label("Keep the seed").check()  # as typed
        write_text(page, "", 1)
        status(page, "1 token.")
    assert [sampling.seed for _, _, sampling in model.orders] == [123, 124, 124, 124, 55]
    assert model.orders[:2] == [
        ("Once é", 3, Sampling(1.25, 40, 0.5, 123)),
        ("", 1, Sampling(1.25, None, 0.5, 124)),
    ]


def test_the_page_starts_with_what_the_command_line_says(visit):
    model = Model()
    start = {"prompt": '<Once> "é"', "num_tokens": 7, "temperature": 0.5, "top_k": 3, "seed": 9}
    with serving(model, about="step 3 & more", start=start) as port:
        page = visit(port)
        assert page.get_by_text("step 3 & more").count() == 1
        page.get_by_role("button", name="Generate").click()
        status(page, "7 tokens.")
    assert model.orders == [('<Once> "é"', 7, Sampling(0.5, 3, 1.0, 9))]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_appear_as_text_on_a_colour_of_their_probability(visit, port, scheme):
    page = visit(port, color_scheme=scheme)
    write_text(page, "<b>Once</b>")
    status(page, "10 tokens.")
    assert page.locator(".token").all_text_contents() == WORDS
    assert page.locator("#text").text_content() == "<b>Once</b>" + "".join(WORDS)
    assert page.locator("#text b, #text script").count() == 0
    shown = page.locator(".token").evaluate_all(
        """tokens => tokens.map(token => {
            const canvas = new OffscreenCanvas(1, 1).getContext(
                "2d", { willReadFrequently: true });
            return [getComputedStyle(token).backgroundColor, getComputedStyle(token).color].map(
                colour => {
                    canvas.fillStyle = colour;
                    canvas.fillRect(0, 0, 1, 1);
                    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
                });
        })"""
    )
    assert len({tuple(background) for background, _ in shown}) == 10
    assert all(contrast(*colours) > 4.5 for colours in shown)


def contrast(*colours):
    """WCAG 2.2's contrast ratio of two sRGB colours."""

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_a_token_tells_its_probability_and_what_else_could_have_followed(visit, port):
    page = visit(port)
    write_text(page)
    status(page, "10 tokens.")
    tip, tokens = page.get_by_role("tooltip"), page.locator(".token")
    assert tip.count() == 0
    tokens.nth(2).hover()
    assert tip.locator("p").inner_text().split() == ["·time", "18.8%"]
    assert tip.locator("li").all_text_contents() == ["·else25.0%", "·time18.8%"]
    page.mouse.move(0, 0)
    assert tip.count() == 0
    # With the keyboard only: the text is one tab stop, and arrow keys move through it.
    page.locator("#seed").focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("ArrowRight")
    assert "·upon" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "·a" in tip.inner_text()
    page.keyboard.press("ArrowLeft")
    assert "·upon" in tip.inner_text()
    focused = page.locator(".token:focus")
    assert focused.get_attribute("aria-describedby") == "tip"
    assert focused.evaluate("token => getComputedStyle(token).outlineStyle") == "solid"
    page.keyboard.press("Escape")
    assert tip.count() == 0
    page.keyboard.press("End")
    assert "é" in tip.inner_text()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_and_escape_stop_the_model(visit, how):
    model = Model(pause=0.02)
    with serving(model) as port:
        page = visit(port)
        stop = page.get_by_role("button", name="Stop")
        assert stop.is_disabled()
        page.locator("#num_tokens").fill("1024")
        page.get_by_label("Prompt").fill("Once")
        page.keyboard.press("Control+Enter")
        page.locator(".token").nth(3).wait_for()
        assert page.get_by_role("status").inner_text() == "Generating…"
        page.keyboard.press("Control+Enter")  # does nothing during generation
        stop.click() if how == "button" else page.keyboard.press("Escape")
        page.get_by_text(re.compile(r"Stopped after \d+ tokens\.")).wait_for()
        assert eventually(lambda: model.closed == 1)
        assert len(model.orders) == 1
        assert stop.is_disabled()


def test_waiting_and_errors_are_told_in_words(visit):
    model = Model(pause=0.01)
    with serving(model) as port:
        page = visit(port)
        first, _ = begin(port)
        write_text(page, num_tokens=2)
        status(page, "Waiting: 1 ahead of you.")
        first.close()
        status(page, "2 tokens.")
        model.error = ConfigError("The prompt is odd.")
        write_text(page)
        status(page, "The prompt is odd.")


def test_a_server_that_is_gone_is_told_in_words(browser):
    with serving(Model()) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
    write_text(page)
    status(page, "No response from the server. Is it still running?")
    page.close()


def test_spaces_break_the_line_where_it_ends(visit):
    # As in code, and more: by default spaces at the end of a line overflow its box.
    with serving(lambda *order: (Token(" ", 0.5) for _ in range(300))) as port:
        page = visit(port, viewport={"width": 360, "height": 740})
        write_text(page, "x", 300)
        status(page, "300 tokens.")
        for at in (100, 299):
            box = page.locator(".token").nth(at).bounding_box()
            assert box["x"] + box["width"] <= 360


def test_a_long_text_is_followed_to_its_end(visit):
    with serving(lambda *order: (Token("line\n", 0.5) for _ in range(100))) as port:
        page = visit(port, viewport={"width": 800, "height": 600})
        write_text(page, "x", 100)
        status(page, "100 tokens.")
        box = page.locator(".token").last.bounding_box()
        assert 0 <= box["y"] <= 601 - box["height"]  # to a pixel
        assert page.evaluate("scrollY") > 600


def test_a_phone_shows_it_all_in_its_width_and_a_tap_tells_the_alternatives(visit, port):
    page = visit(port, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    write_text(page, "x" * 200)
    status(page, "10 tokens.")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for at in (0, 7, 9):
        page.locator(".token").nth(at).tap()
        box = page.get_by_role("tooltip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") == 360
