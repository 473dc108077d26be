"""Models by name, from a server on this machine: resumed, verified, refused."""

import hashlib
import http.server
import json
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import requests

from tests.test_hf import SMALL, make_folder, make_index, random_model
from tinygpt import GPT
from tinygpt.cli import main
from tinygpt.errors import InteropError, UsageError
from tinygpt.files import folders
from tinygpt.interop.hf import hub, hub_cache

REPOSITORY = "openai-community/gpt2"
BLOCK = 1 << 13
"""Bytes that are written at a time: what arrives of a last one that breaks off is lost."""


def sha1_of_git(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """Files of one repository; a request for weights is redirected, as on the hub."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked = []
        self.tokens = set()
        self.break_after = None
        self.breaks = 0
        self.tags = {}
        """What the server says of a file in place of its hash."""
        self.status = {}
        self.branches = {}
        """The commit of each branch or tag; without any the server knows one state of ``main``."""
        self.commits = {}
        """The folder of each commit."""
        self.after = {}
        """What happens after so many requests."""

    def find(self, path):
        """-> the commit and the file of a request"""
        if moved := re.fullmatch(r"/storage/([^/]*)/([^/]*)", path):
            return moved[1], self.commits.get(moved[1], self.folder) / moved[2]
        asked = re.fullmatch(rf"/{REPOSITORY}/resolve/([^/]+)/([^/]+)", path)
        revision = unquote(asked[1]) if asked else None
        if self.commits:
            commit = self.branches.get(revision, revision)
            return commit, self.commits[commit] / asked[2] if commit in self.commits else None
        return "", self.folder / asked[2] if revision == "main" else None

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
        hub.tokens.add(self.headers["Authorization"])
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
        if change := hub.after.get(len(hub.asked)):
            change()
        commit, path = hub.find(self.path)
        if path is None or not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        stored = name.endswith(".safetensors") and not self.path.startswith("/storage/")
        if stored:
            self.send_response(302)
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Location", f"/storage/{commit}/{name}")
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
            if commit:
                self.send_header("X-Repo-Commit", commit)
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


@pytest.fixture(autouse=True)
def others(tmp_path, monkeypatch):
    """What Hugging Face's own tools keep: nothing yet."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "others"))
    return tmp_path / "others"


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
    ranges = [wanted for _, path, wanted in server.asked if path.startswith("/storage/")]
    assert ranges[-1] == f"bytes={length}-"


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


# One commit -------------------------------------------------------------------------------------

A, B = "a" * 40, "b" * 40


@pytest.fixture
def two_commits(server, tmp_path):
    """Two states of the repository, of which ``main`` is at the first: only that has a tokenizer"""
    for commit, seed in ((A, 1), (B, 2)):
        server.commits[commit] = tmp_path / commit
        server.commits[commit].mkdir()
        make_folder(server.commits[commit], random_model(seed=seed))
    (server.commits[A] / "merges.txt").write_text("a b")
    server.branches = {"main": A, "v1": A, "refs/pr/2": B}
    return server


def embedding(model):
    return model.wte.weight.numpy().tolist()


@pytest.fixture(scope="module")
def embeddings():
    return {commit: embedding(random_model(seed=seed)) for commit, seed in ((A, 1), (B, 2))}


def imported(run, capsys):
    capsys.readouterr()
    assert main(["info", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["progress"]["imported"]


@pytest.mark.parametrize("moment", range(1, 12, 2))
def test_all_files_are_of_one_commit_though_the_branch_moves(
    two_commits, embeddings, moment, tmp_path, capsys
):
    two_commits.after = {moment: lambda: two_commits.branches.update(main=B)}
    command = ["import", "hf", "gpt2", "--tokenizer", "none", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    commit = B if moment == 1 else A
    assert f"commit {commit}" in capsys.readouterr().err
    found = imported(tmp_path / "run", capsys)
    assert (found["repository"], found["commit"]) == (REPOSITORY, commit)
    fetched = {path.split("/")[-2] for method, path, _ in two_commits.asked if method == "GET"}
    assert fetched == {commit}
    count = len(two_commits.asked)
    assert embedding(GPT.from_pretrained("gpt2")) == embeddings[commit]
    assert len(two_commits.asked) == count  # it is here, and known to be


def test_what_a_broken_off_fetch_left_is_not_mixed_with_another_commit(
    two_commits, embeddings, cached
):
    two_commits.break_after, two_commits.breaks = BLOCK, 99
    with pytest.raises(InteropError, match="kept"):
        GPT.from_pretrained("gpt2")
    two_commits.breaks = 0
    two_commits.branches["main"] = B
    assert embedding(GPT.from_pretrained("gpt2")) == embeddings[B]
    folder = cached.with_name(f"{cached.name}@{B}")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("revision", "commit"), [("main", A), ("v1", A), ("refs/pr/2", B), (B, B), (A, A)]
)
def test_a_revision_is_taken_and_written_down(
    two_commits, embeddings, revision, commit, tmp_path, capsys
):
    flags = ["--tokenizer", "none", "--revision", revision, "--out", str(tmp_path / "run")]
    assert main(["import", "hf", "gpt2", *flags]) == 0
    assert imported(tmp_path / "run", capsys)["commit"] == commit
    count = len(two_commits.asked)
    assert embedding(GPT.from_pretrained("gpt2", revision)) == embeddings[commit]
    assert len(two_commits.asked) == count


@pytest.mark.parametrize("revision", ["none", "c" * 40, "../x", "a b", "", "-x", "x" * 200])
def test_a_revision_that_is_none_is_named(two_commits, revision):
    with pytest.raises(InteropError, match=r"answered 404|is no commit, tag or branch"):
        GPT.from_pretrained("gpt2", revision)
    assert all(method == "HEAD" for method, _, _ in two_commits.asked)


def test_a_revision_of_a_folder_is_refused(server):
    with pytest.raises(UsageError, match="in no revision but one"):
        GPT.from_pretrained(server.folder, "main")


def test_a_server_that_tells_no_commit_must_not_change_meanwhile(server, cached, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    make_folder(other, random_model(seed=2))
    (other / "config.json").write_bytes((other / "config.json").read_bytes() + b"\n")
    server.after = {4: lambda: setattr(server, "folder", other)}
    with pytest.raises(InteropError, match=r"config\.json changed while the model was fetched"):
        GPT.from_pretrained("gpt2")
    assert not (cached / "config.json").exists()
    assert embedding(GPT.from_pretrained("gpt2")) == embedding(random_model(seed=2))
    assert main(["import", "hf", "gpt2", "--out", str(tmp_path / "run")]) == 0
    assert imported(tmp_path / "run", capsys) == {"source": "gpt2", "types": "F32"}


def test_another_commit_than_was_asked_for_is_not_taken(two_commits):
    two_commits.commits[A] = two_commits.commits[B]
    find = two_commits.find
    two_commits.find = lambda path: (B, find(path)[1])  # whatever is asked
    with pytest.raises(InteropError, match=f"is said to be of another commit, {B}"):
        GPT.from_pretrained("gpt2", A)


# A name or a path -------------------------------------------------------------------------------


def test_a_short_name_is_the_hubs_though_there_is_such_a_folder(
    server, tmp_path, monkeypatch, caplog, capsys
):
    here = tmp_path / "gpt2"
    here.mkdir()
    make_folder(here, random_model(seed=2))
    monkeypatch.chdir(tmp_path)
    assert is_ours(GPT.from_pretrained("gpt2"))
    assert "'gpt2' is taken as the name. The folder called so is './gpt2'" in caplog.text
    for source in ("./gpt2", Path("gpt2"), str(here)):
        assert not is_ours(GPT.from_pretrained(source))
    for source, written in (("gpt2", "gpt2"), ("./gpt2", "./gpt2"), (str(here), "./gpt2")):
        out = str(tmp_path / f"run-{len(source)}")
        assert main(["import", "hf", source, "--out", out]) == 0
        assert imported(out, capsys)["source"] == written


def test_a_repository_may_be_a_folder_here(server, tmp_path, monkeypatch):
    (tmp_path / REPOSITORY).mkdir(parents=True)
    make_folder(tmp_path / REPOSITORY, random_model(seed=2))
    monkeypatch.chdir(tmp_path)
    assert not is_ours(GPT.from_pretrained(REPOSITORY)) and not server.asked


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
    folder = folders.cache_dir() / "hub" / "distilbert--distilgpt2"
    folder.mkdir(parents=True)
    make_folder(folder, random_model())
    assert GPT.from_pretrained("distilgpt2").config == SMALL
    assert np.isfinite(GPT.from_pretrained("distilgpt2").wte.weight.numpy()).all()


# What Hugging Face's own tools keep ---------------------------------------------------------------


def kept_by_others(others, commit, *names):
    """The folder of a commit as ``huggingface_hub`` lays it out, with links to the contents."""
    model = others / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    made = model / "made"
    made.mkdir(parents=True)
    make_folder(made, random_model(seed=2))
    (made / "tokenizer.json").write_text("{}")
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in made.iterdir():
        if path.name in names or not names:
            (snapshot / path.name).symlink_to(path)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return snapshot


def test_a_model_that_transformers_has_is_not_fetched_again(server, others):
    snapshot = kept_by_others(others, "a" * 40)
    found = hub.fetch("gpt2")
    assert (found.folder, found.commit) == (snapshot, "a" * 40) and not server.asked
    assert hub.fetch("gpt2", revision="a" * 40) == found and not server.asked
    assert hub.fetch("gpt2", revision="main") == found and not server.asked


@pytest.mark.parametrize("names", [["config.json"], ["config.json", "model.safetensors"]])
def test_what_others_have_in_part_is_fetched(server, others, names):
    kept_by_others(others, "a" * 40, *names)
    assert is_ours(GPT.from_pretrained("gpt2")) and server.asked


def test_the_layout_is_that_of_huggingface_hub(others):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="it is not installed")
    snapshot = kept_by_others(others, "a" * 40)
    found = huggingface_hub.try_to_load_from_cache(
        REPOSITORY, "config.json", cache_dir=others / "hub"
    )
    assert Path(found).parent == snapshot == hub_cache.snapshot(REPOSITORY, "main")


@pytest.mark.parametrize("at", ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME"])
def test_the_token_goes_to_the_hub_with_every_request(server, others, monkeypatch, tmp_path, at):
    if at == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    else:
        path = others / "token" if at == "HF_HOME" else tmp_path / "somewhere"
        path.parent.mkdir(exist_ok=True)
        path.write_text("hf_secret\n")
        if at == "HF_TOKEN_PATH":
            monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    hub.fetch("gpt2")
    assert server.tokens == {"Bearer hf_secret"}


def test_without_a_token_none_is_sent(server):
    hub.fetch("gpt2")
    assert server.tokens == {None}
