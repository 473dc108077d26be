"""Models by name, from a server on this machine: resumed, verified, refused."""

import hashlib
import http.server
import json
import re
import shutil
import threading

import numpy as np
import pytest
import requests

from tests.test_hf import SMALL, make_folder, make_index, random_model
from tinygpt import GPT, runtime
from tinygpt.cli import main
from tinygpt.errors import InteropError
from tinygpt.interop import hub

REPOSITORY = "openai-community/gpt2"
BLOCK = 1 << 13
"""Bytes that are written at a time: what arrives of a last one that breaks off is lost."""


def sha1_of_git(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """Files of one repository; those of weights are told of with a redirect, as on the hub."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked = []
        self.break_after = None
        self.breaks = 0
        self.tags = {}
        """What the server says of a file in place of its hash."""
        self.status = {}

    def tag(self, name, content):
        large = name.endswith(".safetensors")
        digest = hashlib.sha256(content).hexdigest() if large else sha1_of_git(content)
        return self.tags.get(name, f'"{digest}"')


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        hub.asked.append((self.command, self.path, self.headers["Range"]))
        if status := hub.status.get(name):
            self.send_error(status)
            return
        moved = re.fullmatch(r"/old/name/resolve/main/(.*)", self.path)
        if moved:
            self.send_response(307)
            self.send_header("Location", f"/{REPOSITORY}/resolve/main/{moved[1]}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = hub.folder / name
        known = self.path.startswith((f"/{REPOSITORY}/resolve/main/", "/storage/"))
        if not known or not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        stored = name.endswith(".safetensors") and not self.path.startswith("/storage/")
        if stored:
            self.send_response(302)
            self.send_header("Location", f"/storage/{name}")
            self.send_header("X-Linked-Etag", hub.tag(name, content))
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("ETag", '"0123"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = self.headers["Range"]
        start = int(re.findall(r"\d+", wanted)[0]) if wanted else 0
        body = content[start:]
        if start and not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_header("ETag", hub.tag(name, content))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            if name.endswith(".safetensors") and hub.breaks:
                hub.breaks -= 1
                body = body[: hub.break_after]
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    make_folder(folder, random_model())
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    with Hub(folder) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cached(tmp_path):
    return tmp_path / "cache" / "hub" / "openai-community--gpt2"


def is_ours(model):
    wanted = random_model().parameters()
    return all((p.numpy() == wanted[n].numpy()).all() for n, p in model.parameters().items())


def test_a_model_is_fetched_by_its_short_name_once(server, cached):
    assert is_ours(GPT.from_pretrained("gpt2"))
    names = {path.name for path in cached.iterdir()}
    assert names == {"config.json", "model.safetensors"}  # and nothing half fetched
    count = len(server.asked)
    assert is_ours(GPT.from_pretrained("gpt2"))
    assert is_ours(GPT.from_pretrained("openai-community/gpt2"))
    assert len(server.asked) == count


def test_the_command_line_imports_by_name(server, tmp_path, capsys):
    assert main(["import", "hf", "gpt2", "--out", str(tmp_path / "run")]) == 0
    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["progress"]["imported"] == {"source": "gpt2", "types": "F32"}


def test_a_model_that_was_renamed_is_followed(server):
    assert is_ours(GPT.from_pretrained("old/name"))


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server):
    server.break_after, server.breaks = BLOCK + 100, 2
    assert is_ours(GPT.from_pretrained("gpt2"))
    ranges = [wanted for _, path, wanted in server.asked if path.startswith("/storage/")]
    assert ranges == [None, f"bytes={BLOCK}-", f"bytes={2 * BLOCK}-"]


def test_what_has_arrived_is_kept_for_the_next_try(server, cached, tmp_path, capsys):
    server.break_after, server.breaks = BLOCK + 100, 99
    assert main(["import", "hf", "gpt2", "--out", str(tmp_path / "run")]) == 1
    assert "What has arrived is kept" in capsys.readouterr().err
    assert not (cached / "model.safetensors").exists() and not (tmp_path / "run").exists()
    length = (cached / "model.safetensors.part").stat().st_size
    assert length == 4 * BLOCK  # of four tries
    server.breaks = 0
    assert is_ours(GPT.from_pretrained("gpt2"))
    assert server.asked[-1][2] == f"bytes={length}-"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_with_another_hash_is_refused(server, cached, name):
    server.tags[name] = f'"{"0" * (64 if name.endswith("s") else 40)}"'
    with pytest.raises(InteropError, match="is not the file it should be"):
        GPT.from_pretrained("gpt2")
    assert not (cached / name).exists()


def test_more_bytes_than_were_announced_are_not_taken(server, cached, monkeypatch):
    described = hub._described

    def shorter(url, answer):
        found = described(url, answer)
        less = 100 if url.endswith(".safetensors") else 0
        return hub.Remote(found.url, found.size - less, found.digest)

    monkeypatch.setattr(hub, "_described", shorter)
    with pytest.raises(InteropError, match=r"more than the .* bytes it should have"):
        GPT.from_pretrained("gpt2")
    assert not list(cached.glob("model*"))


def test_a_small_file_that_is_too_large_is_not_fetched(server, monkeypatch):
    monkeypatch.setattr(hub, "SMALL", 100)
    with pytest.raises(InteropError, match="far more than such a file needs"):
        GPT.from_pretrained("gpt2")
    assert not any(method == "GET" for method, _, _ in server.asked)


@pytest.mark.parametrize("tag", ["", '"abc"', '"' + "g" * 64 + '"'])
def test_without_a_hash_nothing_is_taken(server, cached, tag):
    server.tags["model.safetensors"] = tag
    with pytest.raises(InteropError, match="does not tell its size and hash"):
        GPT.from_pretrained("gpt2")
    assert not list(cached.glob("model*"))


def test_a_missing_model_and_a_closed_one_are_named(server):
    with pytest.raises(InteropError, match=r"some/body/resolve/main/config\.json answered 404"):
        GPT.from_pretrained("some/body")
    server.status["config.json"] = 401
    with pytest.raises(InteropError, match="answered 401"):
        GPT.from_pretrained("gpt2")


def test_a_model_without_safetensors_is_named(server):
    (server.folder / "model.safetensors").unlink()
    with pytest.raises(InteropError, match=r"neither model\.safetensors nor"):
        GPT.from_pretrained("gpt2")


def test_shards_are_fetched_and_hostile_names_never_asked_for(server, cached):
    make_index(server.folder)
    assert is_ours(GPT.from_pretrained("gpt2"))
    shutil.rmtree(cached)
    path = server.folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../../../x.safetensors", "/etc/x.safetensors", "http://127.0.0.1/x.safetensors"):
        index["weight_map"]["transformer.wte.weight"] = name
        path.write_text(json.dumps(index))
        server.asked.clear()
        with pytest.raises(InteropError, match="is not opened"):
            GPT.from_pretrained("gpt2")
        assert not any(asked.endswith("/x.safetensors") for _, asked, _ in server.asked)
        shutil.rmtree(cached)


@pytest.mark.parametrize(
    "name", ["gtp2", "a/b/c", "../x/y", "a/..", "-a/b", "http://x/y", "a b", "", "猫/b", "x" * 999]
)
def test_what_is_no_name_is_not_asked_for(server, name):
    with pytest.raises(InteropError):
        hub.fetch(name)
    assert not server.asked


def test_without_a_network_the_files_and_their_place_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))

    def nobody(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", nobody)
    assert main(["import", "hf", "gpt2-xl", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    for wanted in ("config.json", "model.safetensors", "vocab.json", "merges.txt", "gpt2-xl"):
        assert wanted in said
    assert "into a folder" in said and "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["folder/model.safetensors", "folder/pytorch_model.bin"])
def test_a_file_that_is_not_there_is_no_name_to_ask_the_hub_for(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "head", None)
    with pytest.raises(InteropError, match=f"There is no file or folder '{name}'"):
        hub.fetch(name)


def test_files_that_were_put_there_by_hand_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "head", None)
    folder = runtime.cache_dir() / "hub" / "distilbert--distilgpt2"
    folder.mkdir(parents=True)
    make_folder(folder, random_model())
    assert GPT.from_pretrained("distilgpt2").config == SMALL
    assert np.isfinite(GPT.from_pretrained("distilgpt2").wte.weight.numpy()).all()
