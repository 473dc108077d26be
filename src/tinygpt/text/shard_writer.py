"""Texts to a folder of shards: planned first, then made shard by shard, by any number of processes.

The plan is a function of the texts alone: which parts of which files each shard is made of, so many
bytes of text each. A shard is made of its parts and of nothing else, and appears whole or not at
all. So the same ids come out whatever the number of processes, and a run that was killed goes on
with the shards that are missing: the folder ends with the bytes of one that was not.

Documents are tokenized one by one. Behind each stands the token with which the vocabulary ends a
text, such as ``<|endoftext|>``; where it has none, a blank line stands between one and the next. So
the ids do not depend on where a shard ends either.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygpt.errors import DataError, TinyGPTError, TokenizerError, UsageError
from tinygpt.files import atomic
from tinygpt.files.atomic import remove_stale, replacing, user_path
from tinygpt.files.strict_json import to_json
from tinygpt.text.corpus import Corpus, text_of
from tinygpt.text.documents import Part, parts
from tinygpt.text.shards import INDEX, PLAN, TOKENIZER, Index, Shard, shard_name
from tinygpt.text.sources import specials_for
from tinygpt.text.token_files import Array, map_file, sealed, write_header
from tinygpt.text.tokenizers import (
    Tokenizer,
    check_readable,
    chunks,
    document_end,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
)
from tinygpt.text.tokenizers.chunks import CHUNK
from tinygpt.text.tokens import encode, token_type
from tinygpt.untrusted import parse_json, read_bounded

SHARD = 32 << 20
"""Bytes of text in a shard, about: seconds of work, and little that a kill can lose."""
SHARDS, SMALLEST = 64, 4 << 20
"""Shards that a smaller text is cut into, so that processes have work, and their least bytes."""
SAMPLE = 1 << 28
"""Bytes of text, in shards evenly spread, that a vocabulary is learned from at most."""
HELD = 1 << 20
"""Tokens that are gathered before they are written."""
MAX_PLAN = 1 << 30
"""Bytes of a plan that are read at most."""

Job = Mapping[str, Any]
"""What a process must know to make a shard, as JSON values."""
Report = tuple[str, Any]
"""``("read", bytes)`` on the way, and ``("made", [number, tokens, largest, seal])`` at the end."""
Work = Callable[[Sequence[Job]], Iterator[Report]]
"""Runs jobs, in any order and perhaps several at a time, and passes on what they report."""


class Progress(NamedTuple):
    """How far the making of shards is."""

    read: int
    """Bytes of text."""
    total: int
    shards: int
    """Shards that are there."""
    of: int
    tokens: int


# The plan ---------------------------------------------------------------------------------------


def plan_shards(corpora: Sequence[Corpus], size: int | None = None) -> list[list[Part]]:
    """What each shard is made of: parts of files, about ``size`` bytes of text in all."""
    total = sum(part.weight for corpus in corpora for part in corpus.parts)
    size = size or min(SHARD, max(SMALLEST, total // SHARDS))
    found: list[list[Part]] = []
    room = 0
    for corpus in corpora:
        for file in corpus.parts:
            for part in parts(file, size):
                if room < part.weight / 2:
                    found.append([])
                    room = size
                found[-1].append(part)
                room -= part.weight
    return found


def sample_of(plan: Sequence[Sequence[Part]]) -> Iterator[str]:
    """Text to learn a vocabulary from: all of it, or shards evenly spread."""
    total = sum(part.weight for shard in plan for part in shard)
    step = max(1, round(total / SAMPLE))
    return text_of(part for shard in plan[::step] for part in shard)


# The folder -------------------------------------------------------------------------------------


def write_shards(
    corpora: Sequence[Corpus],
    folder: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    work: Work | None = None,
    size: int | None = None,
) -> Iterator[Progress]:
    """Make the shards of some texts in ``folder``, yielding how far it is; at the end, the index.

    ``tokenizer`` is one, or what ``make_tokenizer`` takes. ``work`` runs the jobs, by default one
    after another in this process. What is there already of the same texts, the same tokenizer and
    the same ``size``, bytes of text in a shard, is checked and kept. Raises UsageError if the
    folder holds anything else, or another process writes there, and DataError for a text that
    cannot be read or tokenized.

    >>> for progress in write_shards([open_corpus("books")], "books-tokens", "gpt2"):
    ...     print(progress.read / progress.total)
    """
    for corpus in corpora:
        if corpus.conversations is not None:
            raise UsageError(
                f"{corpus.description} holds conversations: token files do not keep which tokens "
                f"are answers. Train on it as it is (tinygpt train), which reads it at the start."
            )
    folder = user_path(folder)
    if folder.exists() and not (folder / PLAN).is_file():
        atomic.check_free(folder)
    plan = plan_shards(corpora, size)
    if isinstance(tokenizer, str | Path | None):
        specials = specials_for(corpora)
        tokenizer = _kept(folder, tokenizer) or make_tokenizer(
            tokenizer, lambda: sample_of(plan), specials
        )
    check_readable(tokenizer)
    try:
        with _only_writer(folder, _described(plan, tokenizer)):
            tokenizer.save(folder / TOKENIZER)
            remove_stale(folder)
            made: dict[int, Shard] = {}
            jobs = [_job(folder, number, plan) for number in range(len(plan))]
            total = sum(part.weight for shard in plan for part in shard)
            read = tokens = 0
            for kind, value in (work or work_here)(jobs):
                if kind == "read":
                    read += value
                else:
                    number, *rest = value
                    made[number] = Shard(*rest)
                    tokens += made[number].tokens
                yield Progress(min(read, total), total, len(made), len(plan), tokens)
            _write_index(folder, corpora, tokenizer, [made[i] for i in range(len(plan))])
    except OSError as error:
        raise DataError(
            f"The tokens could not be written to {folder}: {error.strerror or error}. Make room "
            f"there, or choose another folder; started again, it goes on where it stopped."
        ) from error


def _kept(folder: Path, spec: str | Path | None) -> Tokenizer | None:
    """The tokenizer that an earlier start has learned in the folder, if it is the one asked for."""
    saved = folder / TOKENIZER
    if not (saved.is_file() and (folder / PLAN).is_file()):
        return None
    found = load_tokenizer(saved)
    names = (None, found.kind, f"{found.kind}:{found.vocab_size}")
    return found if spec in names else None


def _described(plan: Sequence[Sequence[Part]], tokenizer: Tokenizer) -> str:
    """The plan as JSON; another text, another tokenizer or another version gives another."""
    files = {part.path: None for shard in plan for part in shard}
    states = [[path, *_state(path)] for path in files]
    names = {path: number for number, path in enumerate(files)}
    shards = [[[names[p.path], p.field, p.start, p.stop] for p in shard] for shard in plan]
    described = {"format": 1, "tokenizer": fingerprint(tokenizer), "files": states}
    return to_json({**described, "shards": shards}, compact=True, unicode=True) + "\n"


def _state(path: str) -> tuple[int, int]:
    """What changes when a file does: its size and the time of its last change."""
    if not Path(path).exists():
        return 0, 0  # a text that is in no file
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _only_writer(folder: Path, plan: str) -> Iterator[None]:
    """Hold the folder, with this plan in it; UsageError if it is another's, or is held."""
    path = folder / PLAN
    if not path.is_file():
        with replacing(path) as file:
            file.write(plan.encode())
    with path.open("rb") as held:
        if atomic.lock(held.fileno()) is False:
            raise UsageError(f"Another process makes tokens in {folder}. Wait until it has ended.")
        known = read_bounded(path, MAX_PLAN).decode("utf-8", "replace")
        if known != plan:
            raise UsageError(
                f"{folder} holds tokens of {_difference(known, plan)}. Choose another folder, or "
                f"delete that one."
            )
        yield


def _difference(known: str, plan: str) -> str:
    """What distinguishes the plan that lies in a folder from this one, in words."""
    try:
        old, new = parse_json(known.encode()), parse_json(plan.encode())
        if old["tokenizer"] != new["tokenizer"]:
            return "another tokenizer"
        differ = [
            f for f in (*new["files"], *old["files"]) if (f in old["files"]) != (f in new["files"])
        ]
        return (
            f"other texts: {differ[0][0]} was changed since, added or left out"
            if differ
            else "another version"
        )
    except (ValueError, KeyError, TypeError, IndexError):
        return "something else"


def _job(folder: Path, number: int, plan: Sequence[Sequence[Part]]) -> Job:
    shard = [asdict(part) for part in plan[number]]
    return {
        "folder": str(folder.absolute()),
        "number": number,
        "parts": shard,
        "last": number == len(plan) - 1,
    }


def _write_index(
    folder: Path, corpora: Sequence[Corpus], tokenizer: Tokenizer, shards: Sequence[Shard]
) -> None:
    if not any(shard.tokens for shard in shards):
        raise DataError("The texts are empty: there is nothing to make tokens of.")
    index = Index(
        tokenizer=fingerprint(tokenizer),
        vocab_size=tokenizer.vocab_size,
        dtype=token_type(tokenizer).name,
        separator="blank" if document_end(tokenizer) is None else "end",
        shards=tuple(shards),
        sources=tuple(corpus.description for corpus in corpora),
    )
    with replacing(folder / INDEX) as file:
        file.write(index.to_json().encode())


# One shard --------------------------------------------------------------------------------------


def work_here(jobs: Sequence[Job]) -> Iterator[Report]:
    """Do the jobs one after another in this process."""
    for job in jobs:
        yield from do(job)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def do(job: Job) -> Iterator[Report]:
    """Make a shard unless it is there as it was made; see ``Report``."""
    folder, number = Path(job["folder"]), job["number"]
    path = folder / shard_name(number)
    found = [Part(**part) for part in job["parts"]]
    weight = sum(part.weight for part in found)
    shard = _complete(path)
    if shard is None:
        read = 0
        making = _make(path, found, _tokenizer(folder / TOKENIZER), job["last"])
        for report in making:
            if isinstance(report, Shard):
                shard = report
            else:
                read += report
                yield "read", report
        weight -= read
    assert shard is not None
    yield "read", weight  # what a part weighs is a guess, where it is compressed
    yield "made", [number, *asdict(shard).values()]


def _complete(path: Path) -> Shard | None:
    """What is to be said of a shard that is there, if it is as it was made."""
    try:
        tokens = map_file(path)
    except DataError:
        return None
    seal, largest = hashlib.sha256(), -1
    for start in range(0, len(tokens), HELD):
        span = tokens[start : start + HELD]
        seal.update(span.tobytes())
        largest = max(largest, int(span.max()))
    known = sealed(path)
    return Shard(len(tokens), largest, known) if known == seal.hexdigest()[:32] else None


def _make(
    path: Path, found: Sequence[Part], tokenizer: Tokenizer, last: bool
) -> Iterator[int | Shard]:
    """Write a shard, yielding the bytes of text that went in, and at last what it is."""
    dtype = token_type(tokenizer)
    seal, count, largest = hashlib.sha256(), 0, -1
    with replacing(path) as file:
        write_header(file, dtype, count)
        for ids, read in _gathered(encoded(found, tokenizer, last)):
            if len(ids):
                largest = max(largest, int(ids.max()))
            written = ids.astype(dtype).tobytes()
            seal.update(written)
            file.write(written)
            count += len(ids)
            yield read
        file.seek(0)
        write_header(file, dtype, count, seal.hexdigest()[:32])
    yield Shard(count, largest, seal.hexdigest()[:32])


def encoded(
    found: Iterable[Part], tokenizer: Tokenizer, last: bool = True
) -> Iterator[tuple[Array, int]]:
    """The ids of some parts with what stands between documents, and the bytes of each piece.

    ``last``: nothing comes after the last part, so that no blank line is needed behind it.
    """
    end = np.array([i for i in [document_end(tokenizer)] if i is not None], np.uint32)
    due = ""  # a blank line, if something follows
    for part in found:
        whole = part.stop is None or part.kind != "text"  # else the document goes on behind it
        for document in part.documents():
            text = ""
            for text in _chunks(document):
                if due:
                    yield encode(tokenizer, due), 0
                    due = ""
                yield encode(tokenizer, text), len(text) if text.isascii() else len(text.encode())
            if text and whole and len(end):
                yield end, 0
            elif text and whole:
                due = "\n" if text.endswith("\n") else "\n\n"
    if due and not last:
        yield encode(tokenizer, due), 0


def _chunks(document: Iterator[str]) -> Iterator[str]:
    """The chunks of a document; most are a single short text."""
    first = next(document, "")
    second = next(document, None)
    if second is None and len(first) <= CHUNK:
        return iter([first] if first else [])
    return chunks(itertools.chain([first], [] if second is None else [second], document))


def _gathered(pieces: Iterator[tuple[Array, int]]) -> Iterator[tuple[Array, int]]:
    """Short arrays joined to long ones, with the bytes of text that they stand for."""
    held: list[Array] = []
    count = size = 0
    for ids, read in pieces:
        held.append(ids)
        count, size = count + len(ids), size + read
        if count >= HELD:
            yield np.concatenate(held), size
            held, count, size = [], 0, 0
    if held:
        yield np.concatenate(held), size


# As a process of its own: see ``machine.subprocesses`` ------------------------------------------


def main() -> None:
    """Read jobs from standard input, a line of JSON each, and write reports to standard output."""
    import json

    for line in sys.stdin:
        try:
            for report in do(json.loads(line)):
                print(to_json(report, compact=True), flush=True)
        except (TinyGPTError, OSError) as error:
            name = type(error).__name__ if isinstance(error, TokenizerError) else "DataError"
            print(to_json(["failed", [name, str(error)]], compact=True), flush=True)
        print(to_json(["done", None], compact=True), flush=True)


if __name__ == "__main__":
    main()
