# SPDX-License-Identifier: Apache-2.0
"""`vocabulary fetch` from a server that sends too much, too little or something else: one line, and nothing is kept."""

import gzip
import os
import pickle
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import here, one_line

LARGEST = 64 << 20  # bytes that may be taken of any answer; the largest published file has under 10 MB
ENDLESS = 4 * LARGEST  # bytes after which the server gives up
BLOCK = bytes(1 << 18)
TOKENS = "token_dictionary_gc30M.pkl"  # the file that is asked for first


class Server:
    """Answers every request in one hostile way; counts the bytes that were taken."""

    def __init__(self, answer: Callable, good: bytes):
        self.sent, self.good = 0, good
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                try:
                    answer(outer, self)
                except OSError:  # the other side has gone
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def begin(self, request, status: int = 200, **headers) -> None:
        """Send status and headers, whose names have underscores for hyphens."""
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), str(value))
        request.end_headers()

    def body(self, request, content: bytes) -> None:
        """Send a part of the body."""
        request.wfile.write(content)
        self.sent += len(content)


class Runs:
    """What a pickle can do: on reading, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def endless(server, request):
    server.begin(request)
    while server.sent < ENDLESS:
        server.body(request, BLOCK)


def endless_in_chunks(server, request):
    request.protocol_version = "HTTP/1.1"
    server.begin(request, Transfer_Encoding="chunked")
    while server.sent < ENDLESS:
        server.body(request, b"%x\r\n%s\r\n" % (len(BLOCK), BLOCK))


def endless_rest(server, request):
    """As if what is there were a part of it."""
    server.begin(request, 206, Content_Range="bytes 0-/*")
    while server.sent < ENDLESS:
        server.body(request, BLOCK)


def a_petabyte_is_announced(server, request):
    server.begin(request, Content_Length=10**15)
    while server.sent < ENDLESS:
        server.body(request, BLOCK)


def more_than_is_announced(server, request):
    server.begin(request, Content_Length=len(server.good) - 5)
    server.body(request, server.good)


def the_file_and_more_behind_it(server, request):
    server.begin(request, Content_Length=len(server.good) + 5)
    server.body(request, server.good + b"more.")


def nothing(server, request):
    server.begin(request, Content_Length=0)


def nothing_left(server, request):
    server.begin(request, 416)


def no_content(server, request):
    server.begin(request, 204)


def an_empty_rest(server, request):
    server.begin(request, 206, Content_Length=0)


def half(server, request):
    server.begin(request, Content_Length=len(server.good))
    server.body(request, server.good[: len(server.good) // 2])


def half_as_if_it_were_all(server, request):
    server.begin(request, Content_Length=len(server.good) // 2)
    server.body(request, server.good[: len(server.good) // 2])


def half_again_and_again(server, request):
    server.begin(request, 206, Content_Length=len(server.good))
    server.body(request, server.good[: len(server.good) // 2])


def no_answer(server, request):
    request.connection.close()


def a_negative_length(server, request):
    server.begin(request, Content_Length=-1)
    server.body(request, server.good[:100])


def a_length_that_is_no_number(server, request):
    server.begin(request, Content_Length="many")
    server.body(request, server.good[:100])


def a_length_of_5000_digits(server, request):
    server.begin(request, Content_Length="9" * 5000)
    server.body(request, server.good[:100])


def chunks_of_nonsense(server, request):
    request.protocol_version = "HTTP/1.1"
    server.begin(request, Transfer_Encoding="chunked")
    server.body(request, b"zz\r\n" + server.good[:100])


def not_http(server, request):
    request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def endless_headers(server, request):
    request.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for number in range(100_000):
        request.wfile.write(b"X-%d: %s\r\n" % (number, b"x" * 100))


def a_status_that_is_no_number(server, request):
    request.wfile.write(b"HTTP/1.0 fine OK\r\n\r\n")


def an_escape_in_the_status(server, request):
    """A terminal would take it for its title."""
    request.wfile.write(b"HTTP/1.0 503 \x1b]0;owned\x07 OK\r\n\r\n")


def a_pickle_that_runs(server, request):
    content = pickle.dumps(Runs(Path(os.environ["MEGACELL_CACHE"]) / "was-run"))
    server.begin(request, Content_Length=len(content))
    server.body(request, content)


def the_file_zipped(server, request):
    content = gzip.compress(server.good)
    server.begin(request, Content_Length=len(content), Content_Encoding="gzip")
    server.body(request, content)


def one_bit_of_the_file_changed(server, request):
    content = bytearray(server.good)
    content[len(content) // 2] ^= 1
    server.begin(request, Content_Length=len(content))
    server.body(request, bytes(content))


def a_page_to_log_in(server, request):
    content = b"<!doctype html><title>Sign in</title>"
    server.begin(request, Content_Length=len(content), Content_Type="text/html")
    server.body(request, content)


def elsewhere(place: str) -> Callable:
    def redirect(server, request):
        server.begin(request, 302, Location=place.replace("SELF", server.address))

    return redirect


TOO_MUCH = [endless, endless_in_chunks, endless_rest, a_petabyte_is_announced, more_than_is_announced,
            the_file_and_more_behind_it, endless_headers]  # fmt: skip
TOO_LITTLE = [nothing, nothing_left, no_content, an_empty_rest, half, half_as_if_it_were_all, half_again_and_again,
              no_answer]  # fmt: skip
ELSE = [a_negative_length, a_length_that_is_no_number, a_length_of_5000_digits, chunks_of_nonsense, not_http,
        a_status_that_is_no_number, an_escape_in_the_status, a_pickle_that_runs, the_file_zipped,
        one_bit_of_the_file_changed, a_page_to_log_in]  # fmt: skip
PLACES = ["file:///etc/passwd", "ftp://127.0.0.1:9/x", "SELF/again", "//", "http://127.0.0.1:99999/", "data:,x", "\x00"]
ANSWERS = {answer.__name__.replace("_", " "): answer for answer in [*TOO_MUCH, *TOO_LITTLE, *ELSE]}
ANSWERS |= {f"look at {place!r} instead": elsewhere(place) for place in PLACES}


@pytest.fixture
def server(request, data, monkeypatch, tmp_path):
    """A server that answers as the test's parameter says, where HF_ENDPOINT points."""
    served = Server(ANSWERS[request.param], (data / "geneformer" / "V1" / TOKENS).read_bytes())
    monkeypatch.setenv("HF_ENDPOINT", served.address)
    monkeypatch.setenv("MEGACELL_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.mark.parametrize("server", list(ANSWERS), indirect=True)
def test_what_a_hostile_server_sends_is_refused_in_one_line_and_not_kept(server, tmp_path):
    code, _, err = here("vocabulary", "fetch", "geneformer-v1", "--out", tmp_path / "v")
    one_line(err, "megacell vocabulary: error: ", server.address)
    assert code == 1
    assert err.strip().isprintable(), "what a server says reaches the terminal as it is"
    assert server.sent <= LARGEST + 8 * len(BLOCK), "it takes whatever comes"  # a few are on their way
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= LARGEST
    assert not any(path.suffix == ".pkl" for path in kept), "as if it were the published file"
    assert not (tmp_path / "cache" / "was-run").exists(), "it was run"
    assert not (tmp_path / "v").exists()


def test_the_pickle_of_the_test_does_what_it_says(tmp_path):
    pickle.loads(pickle.dumps(Runs(tmp_path / "was-run")))  # it is to run: it makes a folder
    assert (tmp_path / "was-run").exists()
