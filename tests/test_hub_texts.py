"""Texts of datasets on the hub: huggingface_hub against a small server that stands in for it."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.test_documents import TEXTS, jsonl
from tinygpt.errors import DataError, MissingExtraError, UsageError
from tinygpt.text.corpus import open_corpus
from tinygpt.text.shards import is_tokens

COMMIT = "a1" * 20
FILES = {
    "README.md": "A dataset.",
    "data/part-1.jsonl": jsonl(TEXTS[:2]),
    "data/part-2.jsonl": jsonl(TEXTS[2:]),
    "data/notes.txt": "Notes.",
    "other/a.txt": "Another text.",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Lists and serves the files of one dataset, as the hub's API does."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/datasets/me/texts/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(text.encode()), "oid": "0" * 40}
                for name, text in FILES.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/datasets/me/texts/revision/"):
            files = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "me/texts", "sha": COMMIT, "siblings": files}).encode())
        elif found := re.fullmatch(r"/datasets/me/texts/resolve/[^/]+/(.*)", path):
            self.answer(FILES[found[1]].encode())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_texts_of_a_dataset_are_fetched_once(hub: http.server.HTTPServer) -> None:
    corpus = open_corpus("hf://datasets/me/texts")
    read = "".join(corpus.pieces())
    assert corpus.name == "texts" and f"bytes, commit {COMMIT[:12]}" in corpus.description
    assert all(text.strip() in read for text in TEXTS) and "Notes" not in read
    assert read == "".join(open_corpus("hf://datasets/me/texts@main/data").pieces())
    assert "".join(open_corpus("hf://datasets/me/texts/other").pieces()) == "Another text."
    assert "".join(open_corpus("hf://datasets/me/texts/data/notes.txt").pieces()) == "Notes."
    assert "".join(open_corpus("hf://datasets/me/texts/*/part-*").pieces()) == read
    assert not is_tokens("hf://datasets/me/texts")


def test_what_was_fetched_needs_no_network(
    hub: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = "".join(open_corpus("hf://datasets/me/texts/data").pieces())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "".join(open_corpus("hf://datasets/me/texts/data").pieces()) == read
    with pytest.raises(DataError, match="hf://datasets/me/others could not be fetched"):
        open_corpus("hf://datasets/me/others")


def test_what_is_not_there_is_said(
    hub: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no such dataset or revision"):
        open_corpus("hf://datasets/me/nothing")
    with pytest.raises(DataError, match=r"no file with text is there\. .*data, other"):
        open_corpus("hf://datasets/me/texts/nowhere")
    monkeypatch.setattr("tinygpt.text.hub_texts.free_space", lambda _: 10)
    with pytest.raises(DataError, match=r"in 2 files, and 0\.0 MB are free\. Name a part"):
        open_corpus("hf://datasets/me/texts")


@pytest.mark.parametrize("source", ["hf://me/texts", "hf://datasets/me", "hf://datasets/a/b/../c"])
def test_what_is_no_address_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="Wanted: hf://datasets/OWNER/NAME"):
        open_corpus(source)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("huggingface_hub", "huggingface_hub.errors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="the extra 'hub'"):
        open_corpus("hf://datasets/me/texts")
