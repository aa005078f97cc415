# SPDX-License-Identifier: Apache-2.0
"""Fetching the published dictionaries, from a server on this machine that breaks off, lies, or is not there."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megacell.core.cli import main as cli
from megacell.core.errors import DataError, UsageError
from megacell.geneformer.vocabulary import published as module
from megacell.geneformer.vocabulary.published import PUBLISHED_FILES, fetch_geneformer
from megacell.geneformer.vocabulary.vocabulary import Vocabulary


class Server:
    """Serves files by their name; remembers what was asked for."""

    def __init__(self):
        self.files, self.asked, self.break_after, self.ranges, self.status = {}, [], None, True, None
        self.tell_length, self.sent = True, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        content = self.files.get(request.path.rpartition("/")[2])
        if content is None or self.status:
            request.send_error(self.status or 404)
            return
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if first and first >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if first else 200)
        if self.tell_length:
            request.send_header("Content-Length", str(len(content) - first))
        request.end_headers()
        stop = len(content)
        if self.break_after is not None:
            stop, self.break_after = first + self.break_after, None
        with contextlib.suppress(OSError):  # who asked may have heard enough
            for at in range(first, stop, 1 << 20):
                request.wfile.write(content[at : min(at + (1 << 20), stop)])
                self.sent += 1 << 20


@pytest.fixture
def server(dictionaries, monkeypatch):
    """The published files, at the address that HF_ENDPOINT names."""
    served = Server()
    for paths in dictionaries.values():
        served.files |= {path.name: path.read_bytes() for path in paths.values()}
    monkeypatch.setenv("HF_ENDPOINT", served.address + "/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.mark.parametrize("edition", ["V1", "V2"])
def test_an_edition_is_fetched_once_and_read_offline_after(edition, server, published):
    name = f"geneformer-{edition.lower()}"
    assert fetch_geneformer(name).hash == published[edition].hash
    assert len(server.asked) == 4
    assert server.asked[0][0].startswith("/ctheodoris/Geneformer/resolve/main/geneformer/")
    assert fetch_geneformer(name).hash == published[edition].hash
    assert len(server.asked) == 4


def test_a_download_goes_on_where_it_broke_off(server, published):
    server.break_after = 1000
    assert fetch_geneformer("geneformer-v2").hash == published["V2"].hash
    assert [wanted for _, wanted in server.asked[:2]] == [None, "bytes=1000-"]


def test_a_download_that_was_killed_goes_on_at_the_next_try(server, cache, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    server.break_after = 1000
    with pytest.raises(DataError, match="what came is kept for the next try"):
        fetch_geneformer("geneformer-v2")
    fetch_geneformer("geneformer-v2")
    assert server.asked[1][1] == "bytes=1000-"
    assert not list((cache / "geneformer").glob("*.part"))


def test_a_server_that_knows_no_ranges_starts_anew(server, published):
    server.break_after, server.ranges = 1000, False
    assert fetch_geneformer("geneformer-v2").hash == published["V2"].hash


def test_a_finished_download_that_was_not_renamed_is_not_fetched_again(server, cache, published):
    path, sha256, _ = PUBLISHED_FILES["geneformer-v2"]["tokens"]
    name = path.rpartition("/")[2]
    (cache / "geneformer").mkdir(parents=True)
    (cache / "geneformer" / f"{sha256[:16]}-{name}.part").write_bytes(server.files[name])
    assert fetch_geneformer("geneformer-v2").hash == published["V2"].hash


def test_a_damaged_file_in_the_cache_is_fetched_again(server, cache, published):
    fetch_geneformer("geneformer-v2")
    next((cache / "geneformer").glob("*token*")).write_bytes(b"broken")
    assert fetch_geneformer("geneformer-v2").hash == published["V2"].hash
    assert len(server.asked) == 5


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>log in</html>"])
def test_anything_but_the_published_file_is_refused_and_not_kept(content, server, cache):
    server.files["token_dictionary_gc104M.pkl"] = content
    with pytest.raises(DataError, match="its SHA-256 is"):
        fetch_geneformer("geneformer-v2")
    assert not list((cache / "geneformer").iterdir())


@pytest.mark.parametrize("told", [True, False], ids=["a length that is too large", "no length"])
def test_a_server_that_sends_more_than_the_file_has_is_not_listened_to(told, server, cache):
    size = PUBLISHED_FILES["geneformer-v2"]["tokens"][2]
    server.files["token_dictionary_gc104M.pkl"] = bytes(64 << 20)
    server.tell_length = told
    with pytest.raises(DataError, match=f"sends more than the {size:,} bytes of the published file"):
        fetch_geneformer("geneformer-v2")
    assert server.sent < 8 << 20
    assert not list((cache / "geneformer").iterdir())


def test_a_part_that_is_longer_than_the_file_is_fetched_anew(server, cache, published):
    path, sha256, size = PUBLISHED_FILES["geneformer-v2"]["tokens"]
    (cache / "geneformer").mkdir(parents=True)
    (cache / "geneformer" / f"{sha256[:16]}-{path.rpartition('/')[2]}.part").write_bytes(bytes(size + 1))
    assert fetch_geneformer("geneformer-v2").hash == published["V2"].hash


def test_the_sizes_are_those_of_the_published_files(dictionaries):
    for edition, paths in dictionaries.items():
        for part, path in paths.items():
            assert PUBLISHED_FILES[f"geneformer-{edition.lower()}"][part][2] == path.stat().st_size


def test_a_refusing_server_is_named_with_its_answer(server):
    server.status = 403
    with pytest.raises(DataError, match="answered 403"):
        fetch_geneformer("geneformer-v1")
    assert len(server.asked) == 1


def test_without_a_network_the_message_says_what_to_do(server, monkeypatch):
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(DataError, match=r"cannot be fetched .*megacell vocabulary import.*HTTPS_PROXY"):
        fetch_geneformer("geneformer-v2")


def test_another_edition_is_wrong_usage():
    with pytest.raises(UsageError, match="there are geneformer-v1, geneformer-v2"):
        fetch_geneformer("geneformer-v3")


def test_the_command_makes_the_vocabulary(server, published, tmp_path, capsys):
    assert cli.main(["vocabulary", "fetch", "geneformer-v2", "--out", str(tmp_path / "v2")]) == 0
    assert Vocabulary.open(tmp_path / "v2").hash == published["V2"].hash
    assert "geneformer-v2" in capsys.readouterr().out
    command = ["vocabulary", "fetch", "geneformer-v1", "--bionemo", "--out", str(tmp_path / "bionemo")]
    assert cli.main(command) == 0
    assert Vocabulary.open(tmp_path / "bionemo").prefix == (published["V1"].size,)
