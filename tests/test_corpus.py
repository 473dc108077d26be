"""Where text comes from, and all that can be wrong with it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from tinygpt.errors import DataError
from tinygpt.files import atomic, download
from tinygpt.text import compressed
from tinygpt.text import corpus as corpus_module
from tinygpt.text.corpus import Corpus, auto, open_corpus, pydocs, shakespeare
from tinygpt.text.documents import read_text


def text_of(source: str | Path, **options: str) -> str:
    return "".join(open_corpus(source, **options).pieces())


# Files ------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_is_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "a text.txt"
    path.write_bytes("Grüße\r\n日本語 \u2028😀\n".encode())
    corpus = open_corpus(str(path))
    for _ in range(2):
        assert "".join(corpus.pieces()) == "Grüße\r\n日本語 \u2028😀\n"
    assert corpus.name == "a text" and str(path) in corpus.description
    assert corpus.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfab")
    assert text_of(path) == "ab"
    path.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(DataError, match="0xff at offset 5"):
        text_of(path)


@hypothesis.given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_size_of_block_gives_the_same_text(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "t.txt"
    path.write_bytes(b"x" + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 2, 3, 5):
            patch.setattr(compressed, "BLOCK", size)
            assert "".join(read_text(path)) == "x" + text


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_other_encodings_are_named_with_the_offset_and_a_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(compressed, "BLOCK", block)
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve 日本語 caf".encode() + "é au lait".encode("latin-1"))
    offset = len("naïve 日本語 caf".encode())
    message = rf"latin\.txt is not UTF-8.*0xe9 at offset {offset}\b.*iconv"
    with pytest.raises(DataError, match=message):
        list(open_corpus(path).pieces())
    path.write_bytes("cut in a character: é".encode()[:-1])
    with pytest.raises(DataError, match="0xc3 at offset 20"):
        list(open_corpus(path).pieces())


def test_utf16_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    path.write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=r"UTF-16.*iconv -f UTF-16 -t UTF-8"):
        open_corpus(path)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(b"ELF\0\0")
    with pytest.raises(DataError, match="not a text file: it has a zero byte at offset 3"):
        open_corpus(path)


def test_empty_files_are_refused(tmp_path: Path) -> None:
    for name, content in [("e.txt", b""), ("bom.txt", b"\xef\xbb\xbf"), ("e.jsonl", b"\n \n")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="holds no text: it is empty"):
            open_corpus(tmp_path / name)


def test_a_missing_file_suggests_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "novel.txt").write_text("text")
    with pytest.raises(DataError, match=r"nvel\.txt'\. Did you mean '.*novel\.txt'"):
        open_corpus(tmp_path / "nvel.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"Did you mean 'novel\.txt'"):
        open_corpus("novl.txt")
    with pytest.raises(DataError, match="Did you mean 'shakespeare'"):
        open_corpus("shakespear")
    with pytest.raises(DataError, match="the folder 'no/such' does not exist"):
        open_corpus("no/such/file.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "empty name"),
        ("https://example.org/a.txt", "is an address"),
        ("a\0b", "cannot be read|no file"),
        ("x" * 5000, "cannot be read|no file"),
    ],
)
def test_sources_that_are_no_paths(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_corpus(source)


def test_a_pipe_is_refused_because_it_cannot_be_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_corpus(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.txt"
    path.write_text("text")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod would not stop root
    with pytest.raises(DataError, match=r"may not be read.*chmod u\+r"):
        open_corpus(path)


def test_pieces_are_small_however_long_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"0123456789\n" * 300_000)
    lengths = [len(piece) for piece in open_corpus(path).pieces()]
    assert sum(lengths) == 3_300_000 and max(lengths) <= 1 << 20


# Folders ----------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_with_a_blank_line_between_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in [("b.txt", "B\n"), ("a.txt", "A"), ("sub/c.txt", "C"), ("e.txt", ""),
                       ("sub/d.md", "D")]:  # fmt: skip
        (tmp_path / name).write_text(text)
    assert text_of(tmp_path) == "A\n\nB\n\nC"
    assert text_of(tmp_path, glob="**/*.md") == "D"
    assert text_of(tmp_path, glob="*.txt") == "A\n\nB\n"
    assert "4 files matching **/*.txt" in open_corpus(tmp_path).description


def test_a_folder_without_matches_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No file in .* matches '\*\*/\*\.txt'"):
        open_corpus(tmp_path)
    for name in ("a.md", "b.md", "c.py"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"It has 2 \.md, 1 \.py\. .*'\*\*/\*\.md'"):
        open_corpus(tmp_path)
    for glob in ("/etc/*", ""):
        with pytest.raises(DataError, match="no pattern"):
            open_corpus(tmp_path, glob=glob)


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    corpus = open_corpus(tmp_path)
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8"):
        list(corpus.pieces())


# JSONL ------------------------------------------------------------------------------------------


def jsonl(path: Path, *records: object) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_jsonl_texts_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"text": "one\u2028\x85"}, "", {"text": "two\n", "n": 1},
                 {"text": ""}, {"text": "drei ü😀"})  # fmt: skip
    assert text_of(path) == "one\u2028\x85\n\ntwo\n\ndrei ü😀"
    path = jsonl(tmp_path / "e.NDJSON", {"body": "B"})
    assert text_of(path, field="body") == "B"


def test_jsonl_lines_may_be_cut_anywhere_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "d.jsonl", *[{"text": "é" * n} for n in range(1, 20)])
    whole = text_of(path)
    for size in (1, 2, 7):
        monkeypatch.setattr(compressed, "BLOCK", size)
        assert text_of(path) == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('"text"', "line 2 is a JSON str, wanted an object"),
        ({"txt": "a", "id": 1}, r"line 2 has no field 'text'\. Did you mean 'txt'\? .*'id'"),
        ({}, "It has: none"),
        ({"text": None}, "field 'text' is NoneType, wanted a text"),
        ('{"text": "\\ud800"}', "half a character"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: object, message: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"text": "fine"}, line)
    with pytest.raises(DataError, match=message):
        list(open_corpus(path).pieces())


# Texts with a name ------------------------------------------------------------------------------


def test_pydocs_is_the_prose_that_python_carries() -> None:
    corpus = open_corpus("pydocs")
    text = "".join(corpus.pieces())
    assert len(text) > 300_000 and "statement" in text
    assert corpus.fingerprint() == pydocs().fingerprint()
    assert "Python language reference" in corpus.description


CONTENT = bytes(range(256)) * 2000 + b"the end"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at every path, as badly as asked."""

    content = CONTENT
    ranges = True
    break_after: int | None = None
    breaks = 0
    hang = 0.0
    stall: int | None = None
    """Bytes after which nothing more comes as long as this is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.others: dict[str, bytes] = {}
        """Content of other paths."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}/text"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.asked.append(wanted)
        time.sleep(self.server.hang)
        if self.path == "/none":
            self.send_error(404)
            return
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and self.server.ranges else 0
        content = self.server.others.get(self.path, self.server.content)
        body = content[start:]
        if start and not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            total = len(content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.breaks > 0:
            self.server.breaks -= 1
            body = body[: self.server.break_after]
        if self.server.stall is not None:
            self.wfile.write(body[: self.server.stall])
            while self.server.stall is not None:
                time.sleep(0.01)
            return
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_arrives_whole_and_verified(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "text"
    assert download.download(server.url, path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path] and server.asked == [None]


def test_a_download_that_breaks_off_is_resumed(server: Server, tmp_path: Path) -> None:
    server.break_after, server.breaks = 8192 * 20, 2
    download.download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={8192 * 20}-", f"bytes={8192 * 40}-"]


def test_a_later_call_goes_on_where_the_last_one_ended(server: Server, tmp_path: Path) -> None:
    server.break_after, server.breaks = 8192, 10
    with pytest.raises(DataError, match="kept"):
        download.download(server.url, tmp_path / "text", SHA256)
    assert not (tmp_path / "text").exists()
    assert (tmp_path / "text.part").read_bytes() == CONTENT[: 8192 * download.ATTEMPTS]
    server.breaks = 0
    download.download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={8192 * download.ATTEMPTS}-"


def test_a_server_that_knows_no_ranges_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "text.part").write_bytes(CONTENT[:1000])
    download.download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT and server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("stale", [b"another", CONTENT + b"more", b"x" * len(CONTENT)])
def test_a_stale_beginning_is_thrown_away(server: Server, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "text.part").write_bytes(stale)
    download.download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT


def test_a_complete_beginning_only_needs_its_name(server: Server, tmp_path: Path) -> None:
    (tmp_path / "text.part").write_bytes(CONTENT)
    download.download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT


def test_a_wrong_file_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.content = b"a login page"
    with pytest.raises(DataError, match=rf"not the file it should be.*{SHA256}"):
        download.download(server.url, tmp_path / "text", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_server_is_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answered 404"):
        download.download(server.url.replace("/text", "/none"), tmp_path / "text", SHA256)


def test_a_server_that_does_not_answer_costs_no_more_than_the_deadline(
    server: Server, tmp_path: Path
) -> None:
    server.hang = 2.0
    began = time.monotonic()
    with pytest.raises(DataError, match=r"did not arrive within 0\.2 seconds"):
        download.download(server.url, tmp_path / "text", SHA256, deadline=0.2)
    assert time.monotonic() - began < 1.9
    time.sleep(2.2)
    assert not any(tmp_path.iterdir())  # what was given up writes nothing later


# Several downloads of one file -------------------------------------------------------------------


def at_once(*calls: Callable[[], object]) -> list[object]:
    """What each call returns or raises, all begun together."""
    gate = threading.Barrier(len(calls))

    def call(work: Callable[[], object]) -> object:
        gate.wait()
        try:
            return work()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def test_two_downloads_of_one_file_are_one_transfer(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "text"
    server.hang = 0.1  # so that both are under way
    assert at_once(*[lambda: download.download(server.url, path, SHA256)] * 3) == [path] * 3
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert server.asked == [None]


def test_two_contents_for_one_name_both_arrive(server: Server, tmp_path: Path) -> None:
    path, other = tmp_path / "text", CONTENT[::-1]
    server.hang = 0.05
    server.others = {"/other": other}
    found = at_once(
        lambda: download.download(server.url, path, SHA256),
        lambda: download.download(
            server.url.replace("/text", "/other"), path, hashlib.sha256(other).hexdigest()
        ),
    )
    assert found == [path, path] and path.read_bytes() in (CONTENT, other)
    assert list(tmp_path.iterdir()) == [path] and server.asked == [None, None]


def test_who_waits_for_another_download_gives_up_in_time(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "text.part"
    with part.open("wb") as held:
        held.write(CONTENT[:5000])
        held.flush()
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"did not arrive within 0\.2 seconds"):
            download.download(server.url, tmp_path / "text", SHA256, deadline=0.2)
        assert part.read_bytes() == CONTENT[:5000] and not server.asked
    download.download(server.url, tmp_path / "text", SHA256)  # whoever had it is gone
    assert server.asked == ["bytes=5000-"] and (tmp_path / "text").read_bytes() == CONTENT


def test_a_wrong_file_is_each_callers_own_error(server: Server, tmp_path: Path) -> None:
    server.content, server.hang = b"a login page", 0.05
    found = at_once(*[lambda: download.download(server.url, tmp_path / "text", SHA256)] * 2)
    assert all("not the file it should be" in str(error) for error in found)
    assert list(tmp_path.iterdir()) == []


def test_on_a_disk_without_locks_downloads_leave_each_other_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "text"
    server.hang = 0.05
    assert at_once(*[lambda: download.download(server.url, path, SHA256)] * 3) == [path] * 3
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_resumed(server: Server, tmp_path: Path) -> None:
    server.stall = 8192 * 10
    code = "import sys; from pathlib import Path; from tinygpt.files.download import download; "
    code += "download(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"
    command = [sys.executable, "-c", code, server.url, str(tmp_path / "text"), SHA256]
    part = tmp_path / "text.part"
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 30
        while (not part.exists() or part.stat().st_size < 8192) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    server.stall = None
    arrived = part.stat().st_size
    assert arrived >= 8192
    download.download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT and server.asked == [
        None,
        f"bytes={arrived}-",
    ]


def unused_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/"


def test_an_unreachable_server_is_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"could not be downloaded.*Is there a network"):
        download.download(unused_address(), tmp_path / "text", SHA256)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"REQUESTS_CA_BUNDLE": "/no/such/file"}, r"no file of certificates at /no/such/file"),
        ({"HTTPS_PROXY": "socks5://127.0.0.1:9"}, r"needs PySocks: .* -m pip install 'PySocks"),
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, r"The proxy does not answer"),
    ],
)
def test_what_keeps_from_a_server_is_told_with_its_cure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    message: str,
) -> None:
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "socks", None)
    with pytest.raises(DataError, match=message):
        download.download("https://127.0.0.1:9/file", tmp_path / "text", SHA256)


def test_a_place_that_cannot_be_written_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        download.download(server.url, tmp_path / "file" / "text", SHA256)


@pytest.fixture
def small_shakespeare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> Server:
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    server.content = b"ROMEO: text\n"
    digest = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setattr(corpus_module, "SHAKESPEARE_SHA256", digest)
    return server


def test_shakespeare_is_downloaded_once_and_mended(
    small_shakespeare: Server, tmp_path: Path
) -> None:
    url = small_shakespeare.url
    for _ in range(2):
        assert "".join(shakespeare(url).pieces()) == "ROMEO: text\n"
    assert len(small_shakespeare.asked) == 1
    (tmp_path / "shakespeare.txt").write_bytes(b"damaged")
    assert "".join(shakespeare(url).pieces()) == "ROMEO: text\n"


def test_shakespeare_without_a_network_names_what_needs_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="'pydocs' is a text that needs no network"):
        shakespeare(unused_address())


def test_auto_takes_shakespeare_where_it_can_and_says_which(small_shakespeare: Server) -> None:
    nowhere = unused_address()
    corpus = auto(nowhere)
    assert corpus.name == "pydocs" and "could not be downloaded" in corpus.description
    corpus = auto(small_shakespeare.url)
    assert corpus.name == "shakespeare" and "Shakespeare" in corpus.description
    assert auto(nowhere).name == "shakespeare"  # it is here now


def test_auto_does_not_wait_for_long(small_shakespeare: Server) -> None:
    small_shakespeare.hang = 0.6
    began = time.monotonic()
    assert auto(small_shakespeare.url, deadline=0.1).name == "pydocs"
    assert time.monotonic() - began < 0.5


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with atomic.replacing(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), atomic.replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_beginning_of_a_text_is_a_share_of_its_characters():
    corpus = Corpus("a", "a", lambda: iter(["abc", "défg", "hi"]))
    for share, wanted in ((0.1, "a"), (0.5, "abcdé"), (0.9, "abcdéfghi"), (1.0, "abcdéfghi")):
        assert "".join(corpus.beginning(share)) == wanted
    assert "".join(corpus.beginning(7 / 9)) == "abcdéfg"
