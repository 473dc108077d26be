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

import numpy as np
import pytest

from tests.test_documents import TEXTS, jsonl
from tinygpt.cli import main
from tinygpt.errors import DataError, MissingExtraError, UsageError
from tinygpt.text.corpus import open_corpus
from tinygpt.text.shards import Shards, is_tokens
from tinygpt.text.tokens import load_tokens

COMMIT = "a1" * 20
SHARDS = {"train_000001": range(7), "train_000002": range(7, 19), "val_000000": range(50, 60)}


def llmc(ids: range) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + np.array(ids, "<u2").tobytes()


FILES: dict[str, str | bytes] = {
    "README.md": "A dataset.",
    "data/part-1.jsonl": jsonl(TEXTS[:2]),
    "data/part-2.jsonl": jsonl(TEXTS[2:]),
    "data/notes.txt": "Notes.",
    "other/a.txt": "Another text.",
    # llm.c's: a magic number, its version, the number of tokens, and the tokens
    **{f"bin/x_{name}.bin": llmc(ids) for name, ids in SHARDS.items()},
    "ds/a.ds": np.arange(5, dtype="<u4").tobytes(),
    "ds/a.ds.metadata": "gpt2|4\n5\n5 tokens",
}


def content(name: str) -> bytes:
    found = FILES[name]
    return found.encode() if isinstance(found, str) else found


class Handler(http.server.BaseHTTPRequestHandler):
    """Lists and serves the files of one dataset, as the hub's API does."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/datasets/me/texts/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content(name)), "oid": "0" * 40}
                for name in FILES
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/datasets/me/texts/revision/"):
            files = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "me/texts", "sha": COMMIT, "siblings": files}).encode())
        elif found := re.fullmatch(r"/datasets/me/texts/resolve/[^/]+/(.*)", path):
            self.answer(content(found[1]))
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


def test_token_files_are_read_as_those_of_a_folder(hub: http.server.HTTPServer) -> None:
    source = "hf://datasets/me/texts/bin/*.bin"
    assert is_tokens(source) and is_tokens(f"{source[:-5]}x_val_000000.bin")
    tokens = load_tokens(source, 60)
    assert isinstance(tokens, Shards) and np.asarray(tokens).tolist() == [*range(19)]
    assert np.asarray(tokens.held_out).tolist() == [*range(50, 60)]
    only = load_tokens("hf://datasets/me/texts@main/bin/*_train_*.bin")
    assert np.asarray(only).tolist() == [*range(19)] and only.held_out is None
    with pytest.raises(DataError, match="token id 50"):
        load_tokens(source, 50)
    with pytest.raises(DataError, match="no file with text is there"):
        load_tokens("hf://datasets/me/texts/none/*.bin")


def test_what_datatrove_says_of_its_tokens_is_fetched_with_them(
    hub: http.server.HTTPServer,
) -> None:
    found = np.asarray(load_tokens("hf://datasets/me/texts/ds/a.ds"))
    assert found.tolist() == [0, 1, 2, 3, 4] and found.dtype == np.uint32


def test_a_run_learns_from_token_files_of_the_hub(
    hub: http.server.HTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "4",
            "--batch-size", "1", "--max-iters", "2", "--eval-iters", "1")  # fmt: skip
    source, out = "hf://datasets/me/texts/bin/*.bin", tmp_path / "run"
    words = ["train", source, "--tokenizer", "byte", *tiny, "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    assert f'source = "{source}"' in (out / "config.toml").read_text()
    again = ["train", "--resume", "--out", str(out), "--max-iters", "3"]
    assert main([*again, "--allow-change", "max_iters"]) == 0, capsys.readouterr().err


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
