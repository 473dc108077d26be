"""The bytes of a checkpoint: a safetensors file whose header describes all of it.

    8 bytes   length of the header, little-endian
    header    JSON: "__metadata__" with our ``digest`` and ``tinygpt``, then for each tensor its
              type, shape and place
    data      the tensors, one after another without a gap

``tinygpt`` is JSON again: what ``Meta`` holds, and a SHA-256 of every tensor's bytes. ``digest`` is
the SHA-256 of the length and the header, the digest itself read as 64 zeros. So each byte of the
file counts in one hash or another. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError
from tinygpt.files.strict_json import to_json
from tinygpt.untrusted import brief, clip, is_number, parse_json
from tinygpt.untrusted.foreign import HEAD, no_model

FORMAT_VERSION = 2
MAX_HEADER = 64 * 2**20
"""Bytes of header that are read at most."""

Array = npt.NDArray[Any]

DTYPES = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "BOOL": "?"},
    **{"I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"},
    **{"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1"},
}
"""Types by the name that safetensors gives them, and how numpy spells them."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself besides its tensors."""

    iter_num: int
    model: GPTConfig
    train: TrainConfig | None = None
    tokenizer: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    """Fingerprints of the training and validation tokens."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Best result so far, and what early stopping counts."""
    random_state: dict[str, int] | None = None
    """Seed, step and the order of batches: all that batches and dropout depend on."""
    run: str | None = None
    """The run it belongs to, by a number that is drawn once for each run."""
    init: dict[str, Any] | None = None
    """The checkpoint that the run began with, if it did: path, iter_num, run and sha256."""

    def to_dict(self) -> dict[str, Any]:
        train = None if self.train is None else self.train.to_dict()
        return {**vars(self), "model": self.model.to_dict(), "train": train}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Meta:
        """Raises KeyError for what is missing, and ValueError for values of another kind."""
        _check_kinds(values)
        train = values["train"]
        plain: dict[str, Any] = {name: values[name] for name in ("iter_num", *OWN)}
        plain |= {name: values.get(name) for name in ("run", "init")}  # older files lack them
        model = GPTConfig.from_dict(values["model"])
        train = None if train is None else TrainConfig.from_dict(train)
        return cls(model=model, train=train, **plain)


OWN = ("tokenizer", "data", "progress", "random_state")
"""Entries that are plain JSON objects, or null."""
NUMBERS = ("best_val_loss", "best_iter", "evaluations_since_best", "elapsed", "train_loss")
"""Entries of the progress that must be numbers."""


def _check_kinds(values: Mapping[str, Any]) -> None:
    """ValueError unless each entry is of the kind that its readers expect."""
    step, progress, state = values["iter_num"], values["progress"], values["random_state"]
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"its step is {brief(step)}")
    for name in (*OWN, "init"):
        if not isinstance(values.get(name), dict | None):
            raise ValueError(f"{name} is {brief(values[name])}")
    if not isinstance(progress, dict):
        raise ValueError(f"progress is {brief(progress)}")
    for name in NUMBERS:
        value = progress.get(name)
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} is {brief(value)}")
    if state is not None and not all(is_number(n, 0, 2**64 - 1) for n in state.values()):
        raise ValueError("its random state does not consist of numbers")
    if not isinstance(values.get("run"), str | None):
        raise ValueError(f"run is {brief(values['run'])}")


@dataclass(frozen=True)
class Place:
    """Type, shape and place of a tensor; the place counts from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype("<" + DTYPES[self.dtype])


Layout = dict[str, Place]
"""Where each tensor is, in the order of the data."""


@dataclass(frozen=True)
class Header:
    """What stands before the data."""

    described: dict[str, Any]
    layout: Layout
    data: int
    """Where in the file the data begins."""

    @property
    def hashes(self) -> dict[str, str]:
        found: dict[str, str] = self.described["sha256"]
        return found


def arrange(kinds: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> Layout:
    """Places for tensors given as (name, type, shape), the widest types first: all are aligned."""
    spelled = {np.dtype(code): name for name, code in DTYPES.items()}
    layout: Layout = {}
    end = 0
    for name, dtype, shape in sorted(kinds, key=lambda kind: -kind[1].itemsize):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        layout[name] = Place(spelled[dtype], shape, start, end)
    return layout


def data_size(layout: Layout) -> int:
    """Bytes of all tensors."""
    return max((place.end for place in layout.values()), default=0)


# ---- writing ----

OPENING = b'{"__metadata__":{"digest":"'
ZEROS = b"0" * 64


def encode(meta: Meta, layout: Layout, hashes: Mapping[str, str]) -> bytes:
    """All that stands before the data."""
    described = {"format_version": FORMAT_VERSION, **meta.to_dict(), "sha256": dict(hashes)}
    header: dict[str, Any] = {
        "__metadata__": {"digest": ZEROS.decode(), "tinygpt": to_json(described)}
    }
    for name, place in layout.items():
        offsets = [place.start, place.end]
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": offsets}
    text = to_json(header, compact=True).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    length = len(text).to_bytes(8, "little")
    return length + text.replace(ZEROS, _digest(length, text), 1)


def _digest(length: bytes, text: bytes) -> bytes:
    """Of a header, whatever stands where its digest goes."""
    start = len(OPENING)
    blank = text[:start] + ZEROS + text[start + len(ZEROS) :]
    return hashlib.sha256(length + blank).hexdigest().encode()


# ---- reading ----


def decode(file: BinaryIO, path: Path, size: int) -> Header:
    """The header of an open file of ``size`` bytes; CheckpointError if any of it is not right.

    Nothing is allocated for what a header merely announces.
    """
    length, text = _read_text(file, path, size)
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", None) or {}
        layout = _decode_layout(header, size - 8 - len(text))
    except BROKEN as error:
        reason = clip(error) if type(error) is ValueError else "its header cannot be read"
        raise CheckpointError(f"{path} is damaged or incomplete: {reason}.") from error
    sealed = text.startswith(OPENING)
    if sealed and text[len(OPENING) :][: len(ZEROS)] != _digest(length, text):
        raise CheckpointError(f"{path} is damaged: its header does not match its own hash.")
    if not isinstance(metadata, dict) or "tinygpt" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a TinyGPT checkpoint: "
            f"it lacks the metadata entry 'tinygpt'."
        )
    described = _decode_description(path, metadata["tinygpt"], layout, sealed)
    return Header(described, layout, len(length) + len(text))


BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What values of another kind than expected lead to."""


def _decode_description(path: Path, text: str, layout: Layout, sealed: bool) -> dict[str, Any]:
    """``sealed``: the header's own digest is there and right, as it is since format version 2."""
    try:
        described: dict[str, Any] = parse_json(text)
        version = int(described["format_version"])
        if version == 1:
            sealed = described.pop("digest", None) == _first_digest(described, layout)
        hashes = described.get("sha256", {})
        named = set(hashes) if isinstance(hashes, dict) else None
    except BROKEN as error:
        raise CheckpointError(f"{path} is damaged: its description cannot be read.") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this TinyGPT reads up to {FORMAT_VERSION}. "
            f"Use the one that wrote it, or a newer one."
        )
    if not sealed or named != set(layout):
        raise CheckpointError(f"{path} is damaged: its description does not match its own hash.")
    return described


def _read_text(file: BinaryIO, path: Path, size: int) -> tuple[bytes, bytes]:
    """-> the length as it is written, and the header; nothing is read that cannot be one"""
    length = file.read(8)
    announced = int.from_bytes(length, "little")
    if len(length) == 8 and announced <= min(size - 8, MAX_HEADER):
        text = file.read(announced)
        if len(text) == announced:
            return length, text
    file.seek(0)
    raise CheckpointError(
        no_model(path, file.read(HEAD))
        or f"{path} is damaged or not a safetensors file: its {size} bytes cannot hold the header "
        f"it announces."
    )


def _decode_layout(header: Mapping[str, Any], size: int) -> Layout:
    """The places, which have to fill ``size`` bytes of data without gaps; ValueError says more."""
    found = {
        name: Place(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in header.items()
    }
    layout = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, place in layout.items():
        if place.dtype not in DTYPES:
            raise ValueError(f"{clip(name, 40)} has the unknown type {brief(place.dtype)}")
        counts = (*place.shape, place.start, place.end)
        if not all(type(n) is int and n >= 0 for n in counts) or len(place.shape) > 8:
            raise ValueError(f"{clip(name, 40)} has a shape or a place that cannot be")
        wanted = math.prod(place.shape) * place.numpy_dtype.itemsize
        if place.start != end or place.end != end + wanted:
            raise ValueError(f"{clip(name, 40)} is not where it has to be")
        end = place.end
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, but {size} are there")
    return layout


def _first_digest(described: Mapping[str, Any], layout: Layout) -> str:
    """How format version 1 hashed its description."""
    places = {name: [place.dtype, list(place.shape)] for name, place in layout.items()}
    whole = {"description": described, "layout": places}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
