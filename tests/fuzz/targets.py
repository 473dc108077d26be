"""The loaders as functions of bytes. They return, or raise a Finding.

Each writes the bytes to a file, reads it as a user would, and lets nothing but a TinyGPTError pass.
What is read without an error has to keep a promise: a checkpoint holds what it claims, settings
mean the same when they are written and read again, and so on.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.corpus import FILES
from tests.fuzz.limits import Finding, limited
from tests.fuzz.making import checkpoint, container, seal
from tinygpt.cli.options import file_tables, resolve
from tinygpt.errors import DataError, TinyGPTError, TokenizerError
from tinygpt.files.strict_json import to_json
from tinygpt.runs import checkpoint as checkpoints
from tinygpt.runs import lock
from tinygpt.runs.folder import best_checkpoint, bytes_per_token_of, run_of
from tinygpt.runs.history import read
from tinygpt.runs.plots import read_curves
from tinygpt.server.dashboard.watch import Watch
from tinygpt.server.dashboard.watched import run_id
from tinygpt.text.corpus import open_corpus
from tinygpt.text.tokenizers import load_tokenizer, tokenizer_from_dict, vocabulary
from tinygpt.text.tokens import load_tokens

LONGEST_MESSAGE = 600
"""Characters of an error, besides the path: none repeats much of a file."""


def folder() -> Path:
    """A folder for the files of this process, made when it is first needed."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="tinygpt-fuzz-"))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder


_folder: Path | None = None


def _path(kind: str, data: bytes, suffix: str | None = None) -> Path:
    path = folder() / FILES[kind]
    path = path if suffix is None else path.with_suffix(suffix)
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def _loading(data: bytes, what: str) -> Iterator[None]:
    """Within the limits, and without any error but ours."""
    with limited(len(data), what):
        try:
            yield
        except TinyGPTError as error:
            message = str(error).replace(str(_folder), "")
            if len(message) > LONGEST_MESSAGE:
                raise Finding(f"{what}: an error of {len(message)} characters") from error
        except Exception as error:
            raise Finding(f"{what}: {type(error).__name__}: {str(error)[:200]}") from error


def fuzz_checkpoint(data: bytes) -> None:
    """A file as it is, whose hashes are mostly wrong."""
    path = _path("checkpoint", data)
    with _loading(data, "checkpoint"):
        meta = checkpoints.read_meta(path)
        if meta.model.num_params() > len(data):
            raise Finding("checkpoint: it claims more parameters than it has bytes")
        checkpoints.describe(path)
        if meta.tokenizer is not None:
            tokenizer_from_dict(meta.tokenizer)
        checkpoints.verify(path)


def fuzz_sealed(data: bytes) -> None:
    """The same after the digest of its header has been put right."""
    length = int.from_bytes(data[:8], "little")
    if len(data) >= 8 + length:
        data = container(seal(data[8 : 8 + length]), data[8 + length :])
    fuzz_checkpoint(data)


def fuzz_description(data: bytes) -> None:
    """A checkpoint that is right in all but what it says of itself, which is ``data``."""
    fuzz_checkpoint(checkpoint(description=data.decode("utf-8", "replace")))


def fuzz_config(data: bytes) -> None:
    path = _path("config", data)
    texts = folder() / "texts"
    texts.mkdir(exist_ok=True)
    (texts / "a.txt").write_text("hello")
    with _loading(data, "config"):
        settings = resolve(file_tables(path))
        settings.model_config(65)
        again = folder() / "again.toml"
        again.write_text(settings.to_toml(), encoding="utf-8")
        if resolve(file_tables(again)).train != settings.train:
            raise Finding("config: it changes when it is written and read")
        open_corpus(texts, glob=settings.data.glob)


def fuzz_tokenizer(data: bytes) -> None:
    path = _path("tokenizer", data)
    with _loading(data, "tokenizer"), _offline():
        tokenizer = load_tokenizer(path)
        for text in ("the cat", "  née\n"):
            with contextlib.suppress(TokenizerError):
                if tokenizer.decode(tokenizer.encode(text)) != text:
                    raise Finding("tokenizer: a text does not come back")
        if load_tokenizer(tokenizer.save(folder() / "again.json")) != tokenizer:
            raise Finding("tokenizer: it changes when it is written and read")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Names of published encodings are looked up on the network; not from here."""

    def refuse(url: str, *rest: object) -> bytes:
        raise TokenizerError("no network")

    before = vocabulary._downloaded
    vocabulary._downloaded = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        vocabulary._downloaded = before


def fuzz_npy(data: bytes) -> None:
    _load_tokens(_path("tokens", data), data)


def fuzz_bin(data: bytes) -> None:
    _load_tokens(_path("tokens", data, ".bin"), data)


def _load_tokens(path: Path, data: bytes) -> None:
    with _loading(data, "tokens"):
        tokens = load_tokens(path, 50_000)
        if tokens.ndim != 1 or tokens.nbytes > len(data):
            raise Finding("tokens: more than the file holds")
        if not 0 <= int(tokens.sum()) < 50_000 * len(tokens):
            raise Finding("tokens: out of range")


def fuzz_jsonl(data: bytes) -> None:
    _read_text(_path("jsonl", data), data)


def fuzz_text(data: bytes) -> None:
    _read_text(_path("text", data), data)


def _read_text(path: Path, data: bytes) -> None:
    with _loading(data, "text"):
        length = sum(len(piece.encode()) for piece in open_corpus(path).pieces())
        if length > len(data) * 3:
            raise Finding("text: more than the file holds")


def fuzz_metrics(data: bytes) -> None:
    path = _path("metrics", data)
    with _loading(data, "metrics"):
        with contextlib.suppress(DataError):
            list(read(path))
        curves = read_curves(path)
        for _, y in curves.smooth_train + curves.lr:
            if not abs(y) < 1e31:
                raise Finding(f"metrics: {y} cannot be drawn")


def fuzz_best(data: bytes) -> None:
    """best.json, run.json and run.lock, which are passed over if they are damaged."""
    _path("checkpoint", b"")
    path = _path("best", data)
    (path.parent / "run.json").write_bytes(data)
    with _loading(data, "best"), path.open("rb") as file:
        best, run = best_checkpoint(path.parent), run_of(path.parent)
        holder = lock._read(file.fileno())
        if holder is not None and (holder.pid < 1 or len(str(holder)) > LONGEST_MESSAGE):
            raise Finding(f"best: {holder} cannot hold a lock")
        if best is not None and best.parent != path.parent:
            raise Finding(f"best: {best} is not in the folder")
        if run is not None and not isinstance(run, str):
            raise Finding("best: a run that is no text")
        size = bytes_per_token_of(path.parent)
        if size is not None and not 0 < size < 1e31:
            raise Finding(f"best: {size} bytes per token")
    (path.parent / "run.json").unlink()


def fuzz_watched_metrics(data: bytes) -> None:
    _watch(data, "metrics.jsonl", "samples.jsonl")


def fuzz_watched_config(data: bytes) -> None:
    _watch(data, "config.toml")


def fuzz_watched_lock(data: bytes) -> None:
    _watch(data, "run.lock", "best.json", "run.json")


def _watch(data: bytes, *names: str) -> None:
    """A dashboard of two runs, one of which has these files: the other one stays as it is."""
    runs = folder() / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    for name in ("good", "odd"):
        (runs / name).mkdir(parents=True)
        (runs / name / "metrics.jsonl").write_bytes(b'{"iter": 1, "train_loss": 2.5}\n')
    for name in names:
        (runs / "odd" / name).write_bytes(data)
    with _loading(data * len(names), "dashboard"):
        watch = Watch([runs])
        watch.refresh()
        watch._read(math.inf)  # a busy machine may not come to all of it within a look's time
        told = watch.changes({run_id(runs / "odd"): (0, "")})
        for run in watch.listed():
            told += [run.curves.overview(), {"settings": run.settings, "samples": run.samples}]
        text = to_json(told)
        text.encode()
        json.loads(text, parse_constant=_no_number)
        good, odd = (next(c for c in told[:2] if c["name"] == name) for name in ("good", "odd"))
        if good["train_loss"] != 2.5 or good["odd"]:
            raise Finding("dashboard: a run suffers from another")
        if any("It cannot be read" in why for why in odd["odd"]):
            raise Finding(f"dashboard: {odd['odd']}")  # the last guard is for what nobody knows


def _no_number(word: str) -> None:
    raise Finding(f"dashboard: {word} is no JSON")


TARGETS: dict[str, tuple[str, Callable[[bytes], None]]] = {
    "checkpoint": ("checkpoint", fuzz_checkpoint),
    "sealed": ("checkpoint", fuzz_sealed),
    "description": ("checkpoint", fuzz_description),
    "config": ("config", fuzz_config),
    "tokenizer": ("tokenizer", fuzz_tokenizer),
    "npy": ("tokens", fuzz_npy),
    "bin": ("tokens", fuzz_bin),
    "jsonl": ("jsonl", fuzz_jsonl),
    "text": ("text", fuzz_text),
    "metrics": ("metrics", fuzz_metrics),
    "best": ("best", fuzz_best),
    "watched_metrics": ("metrics", fuzz_watched_metrics),
    "watched_config": ("config", fuzz_watched_config),
    "watched_lock": ("best", fuzz_watched_lock),
}
"""By name: the kind of files to begin with, and the function."""
