"""Reading checkpoints: every byte is checked against its hash before any of it is used.

A reader needs no lock. The file behind a name is whole, as it was renamed only when it was; and if
the run replaces or deletes it meanwhile, the open file stays what it is until it is closed. What
the hashes guard against is all else: disks, cables, copies that broke off, and editors.

A file may also come from a stranger, with hashes that are right and claims that are not. So nothing
is allocated for a claim before the bytes that it needs have been seen to be there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinygpt.config import ADAPTERS, GPTConfig
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.files.strict_json import to_json
from tinygpt.files.tensor_file import Layout, Place
from tinygpt.machine.resources import cores
from tinygpt.runs.checkpoint import stamps
from tinygpt.runs.checkpoint.format import (
    BROKEN,
    ZEROS,
    Array,
    Header,
    Meta,
    data_size,
    decode,
    encode,
)
from tinygpt.runs.folder import checkpoint_path, list_checkpoints, named_step, run_of
from tinygpt.untrusted import clip, open_regular

CHUNK = 2**20
"""Bytes that are read at a time of tensors that are only checked."""


def read_meta(path: str | Path) -> Meta:
    """What the checkpoint at ``path`` holds, without reading its tensors.

    Raises CheckpointError if there is no such file, or it is damaged, foreign or of a newer format,
    or is not the checkpoint that its name and its folder say.
    """
    with _opened(path) as (_, _, meta):
        return meta


def verify(path: str | Path) -> Meta:
    """Check every byte of a checkpoint against its hash; CheckpointError names what is damaged."""
    return read(path, wanted=())[0]


def read(
    path: str | Path,
    wanted: Collection[str] | None = None,
    room: Callable[[str], Array | None] = lambda _: None,
    by_stamp: bool = False,
) -> tuple[Meta, dict[str, Array]]:
    """-> what a checkpoint says of itself, and its tensors or those ``wanted``

    All of the file is checked, also tensors that are not wanted. Raises CheckpointError as
    ``read_meta`` does, and if a byte has changed. ``room`` gives memory for a tensor where there
    is some that may be written to even if the file turns out to be damaged. ``by_stamp`` believes
    that a file is whole which was so within a week, and has not been written to since (`stamps`).
    """
    arrays = dict[str, Array]()
    digests = dict[str, Future[str] | str]()
    with (
        ThreadPoolExecutor(min(4, cores())) as threads,
        _opened(path) as (file, header, meta),
        _watched(path, file, header, by_stamp) as whole,
    ):
        for name, place in header.layout.items():
            if wanted is None or name in wanted:
                file.seek(header.data + place.start)
                arrays[name] = _read_array(file, place, room(name))
                if not whole:  # hashed while the next one is read
                    digests[name] = threads.submit(_sha256, arrays[name])
            elif not whole:
                file.seek(header.data + place.start)
                digests[name] = _hash(file, place)
        found = {n: d if isinstance(d, str) else d.result() for n, d in digests.items()}
        if damaged := [name for name, digest in found.items() if digest != header.hashes[name]]:
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            raise CheckpointError(_damaged(path, clip(", ".join(damaged[:5])) + more))
    return meta, arrays


@contextlib.contextmanager
def _watched(path: str | Path, file: BinaryIO, header: Header, by_stamp: bool) -> Iterator[bool]:
    """-> whether an open file is known to be whole; if not, it is after a block without an error.

    Raises CheckpointError if a file that was known is written to within the block.
    """
    before = stamps.stamp(os.fstat(file.fileno()))
    settled = by_stamp and stamps.is_settled(before)
    whole = settled and stamps.is_marked(before, header.digest)
    yield whole
    same = stamps.stamp(os.fstat(file.fileno())) == before
    if whole and not same:
        raise CheckpointError(f"{user_path(path)} was written to while it was read. Try again.")
    if settled and same and not whole:
        stamps.mark(before, header.digest)


def _damaged(path: str | Path, names: str) -> str:
    return f"{user_path(path)} is damaged: {names} do not match their hash. Use an older one."


@contextlib.contextmanager
def one_by_one(path: str | Path) -> Iterator[tuple[Meta, Callable[[str], Array | None]]]:
    """-> what a checkpoint says of itself, and a function that reads one tensor by its name

    For models that do not fit in memory twice. The function returns None for a name that is not
    there, and raises CheckpointError as ``read`` does, but only for the tensor it reads.
    """
    with _opened(path) as (file, header, meta):

        def fetch(name: str) -> Array | None:
            if (place := header.layout.get(name)) is None:
                return None
            file.seek(header.data + place.start)
            array = _read_array(file, place)
            if _sha256(array) != header.hashes[name]:
                raise CheckpointError(_damaged(path, name))
            return array

        yield meta, fetch


def describe(path: str | Path) -> dict[str, Any]:
    """Everything but the values: the metadata, and dtype and shape of every tensor."""
    with _opened(path) as (file, header, _):
        tensors = {n: {"dtype": p.dtype, "shape": list(p.shape)} for n, p in header.layout.items()}
        described = {k: v for k, v in header.described.items() if k != "sha256"}
        return {**described, "tensors": tensors, "bytes": os.fstat(file.fileno()).st_size}


def origin(path: str | Path) -> dict[str, Any]:
    """What a run that begins with these weights will say of them, in ``Meta.init``.

    The hash is of all weights' hashes: the same for the same weights, wherever they are.
    """
    return origin_and_hashes(path)[0]


def origin_and_hashes(
    path: str | Path, without: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """-> ``origin(path)``, and the hash of each weight but those ``without``, by its name"""
    with _opened(path) as (_, header, meta):
        hashes = sorted((n, h) for n, h in header.hashes.items() if n.startswith(WEIGHTS))
    digest = hashlib.sha256(to_json(hashes).encode()).hexdigest()
    where = str(user_path(path).resolve())
    found = {"path": where, "iter_num": meta.iter_num, "run": meta.run, "sha256": digest}
    return found, {name: value for name, value in hashes if name not in without}


def rehearse(meta: Meta, layout: Layout) -> None:
    """UsageError if a checkpoint that says this of itself would be refused when it is read.

    To be called before the first step: what is learned until the refusal would be lost.
    """
    place = Path("A checkpoint of this run")
    try:
        header = encode(meta, layout, dict.fromkeys(layout, ZEROS.decode()))
        size = len(header) + data_size(layout)
        _described(place, decode(io.BytesIO(header), place, size))
    except CheckpointError as error:
        raise UsageError(f"{error} It could not be read again, so nothing is written.") from error
    except BROKEN as error:  # values that JSON cannot hold
        raise UsageError(f"{place} could not be written: {clip(error)}.") from error


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[BinaryIO, Header, Meta]]:
    """An open checkpoint, placed where its data begins, its header, and what that says."""
    path = user_path(path)
    if not path.is_file():
        beside = [p.name for p in list_checkpoints(path.parent)]
        there = f" In {path.parent}: {', '.join(beside[-5:])}." if beside else ""
        raise CheckpointError(f"There is no checkpoint at {path}.{there}")
    try:
        with open_regular(path) as file:
            header = decode(file, path, os.fstat(file.fileno()).st_size)
            yield file, header, _meta(path, header)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _described(path: Path, header: Header) -> Meta:
    try:
        meta = Meta.from_dict(header.described)
    except BROKEN as error:
        raise CheckpointError(
            f"{path} describes itself in a way that cannot be: {clip(error, 300)}."
        ) from error
    _check_fits(path, meta.model, header.layout)
    return meta


def _meta(path: Path, header: Header) -> Meta:
    meta = _described(path, header)
    step, run = named_step(path), run_of(path.parent)
    if step is not None and step != meta.iter_num:
        own = checkpoint_path(path.parent, meta.iter_num)
        raise CheckpointError(
            f"{path} is not what its name says: it holds step {meta.iter_num}. If it was renamed, "
            f"give it back its name: {own.name}."
        )
    if step is not None and None not in (run, meta.run) and run != meta.run:
        raise CheckpointError(
            f"{path} belongs to another run than its folder. Move it into a folder of its own."
        )
    return meta


WEIGHTS, STATE = "model.", "optimizer."
"""How the names of tensors begin."""
MOST_STATE = 8
"""Numbers that optimizer and adapters may keep for each weight, besides ``FEW`` single ones."""
FEW = 4096
MOST_CACHE = 64
"""Keys and values of one full context for each weight."""


def _check_fits(path: Path, config: GPTConfig, layout: Layout) -> None:
    """The file has to hold the weights that its config claims: only then is a model built.

    So what is allocated later is no more than a multiple of the bytes that are stored.
    """
    weights = {name: place for name, place in layout.items() if name.startswith(WEIGHTS)}
    claimed, strange = (
        config.num_params(),
        [n for n in layout if not n.startswith((WEIGHTS, STATE))],
    )
    count = sum(math.prod(p.shape) for n, p in weights.items() if not n.endswith(ADAPTERS))
    rest = sum(math.prod(place.shape) for place in layout.values()) - count
    cache = 2 * config.n_layer * config.block_size * config.n_embd
    faults = {
        f"it claims {claimed:,} parameters, but holds {count:,}": count != claimed,
        "its weights are no real numbers": any(p.numpy_dtype.kind != "f" for p in weights.values()),
        f"it holds {clip(strange, 60)}, neither weights nor a state of the optimizer": strange,
        f"it holds {rest:,} numbers besides its {count:,} weights": rest > MOST_STATE * count + FEW,
        f"one text would need {cache:,} numbers of memory": cache > MOST_CACHE * count,
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise CheckpointError(f"{path} is damaged or made up: {fault}.")


def _read_array(file: BinaryIO, place: Place, room: Array | None = None) -> Array:
    """A tensor, in the memory given if that is of its type and shape, else in new memory."""
    array = np.empty(0) if room is None else room
    if (array.shape, array.dtype) != (place.shape, place.numpy_dtype):
        array = np.empty(place.shape, place.numpy_dtype)
    memory = array.reshape(-1).view(np.uint8).data
    if file.readinto(memory) != len(memory):  # type: ignore[attr-defined]
        raise OSError("it has become shorter while it was read")
    return array


def _sha256(array: Array) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _hash(file: BinaryIO, place: Place) -> str:
    digest = hashlib.sha256()
    left = place.end - place.start
    while left and (chunk := file.read(min(left, CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()
