"""The bytes of a checkpoint: a safetensors file (``files/tensor_file``) that describes all of it.

The header's metadata has two texts. ``tinygpt`` is JSON again: what ``Meta`` holds, and a SHA-256
of every tensor's bytes. ``digest`` is the SHA-256 of the length and the header, the digest itself
read as 64 zeros. So each byte of the file counts in one hash or another: a reader that has checked
them knows that it has what was written. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import numpy.typing as npt

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError
from tinygpt.files.strict_json import to_json
from tinygpt.files.tensor_file import NUMPY, Layout, opening, parse, read_opening
from tinygpt.untrusted import brief, is_number, parse_json
from tinygpt.untrusted.foreign import HEAD, no_model

FORMAT_VERSION = 2
MAX_HEADER = 64 * 2**20
"""Bytes of header that are read at most."""

Array = npt.NDArray[Any]


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


FREE = ("dropout", "attention")
"""Model settings that say how a model is trained and computed, not which weights it has."""
OWN = ("tokenizer", "data", "progress", "random_state")
"""Entries that are plain JSON and are in every file."""
KINDS: dict[str, Any] = {
    **dict.fromkeys(("tokenizer", "data", "random_state", "init"), dict | None),
    "progress": dict,
    "run": str | None,
}
NUMBERS = ("best_val_loss", "best_iter", "evaluations_since_best", "elapsed", "train_loss")
"""Entries of the progress that must be numbers."""


def _check_kinds(values: Mapping[str, Any]) -> None:
    """ValueError unless each entry is of the kind that its readers expect."""
    step, progress, state = values["iter_num"], values["progress"], values["random_state"]
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"its step is {brief(step)}")
    for name, kind in KINDS.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"{name} is {brief(values.get(name))}")
    for name in NUMBERS:
        if type(value := progress.get(name)) not in (int, float, NoneType):
            raise ValueError(f"{name} is {brief(value)}")
    if state is not None and not all(is_number(n, 0, 2**64 - 1) for n in state.values()):
        raise ValueError("its random state does not consist of numbers")


@dataclass(frozen=True)
class Header:
    """What stands before the data."""

    described: dict[str, Any]
    layout: Layout
    data: int
    """Where in the file the data begins."""
    digest: bytes
    """SHA-256 of all that stands before the data."""

    @property
    def hashes(self) -> dict[str, str]:
        found: dict[str, str] = self.described["sha256"]
        return found


def data_size(layout: Layout) -> int:
    """Bytes of all tensors."""
    return max((place.end for place in layout.values()), default=0)


# ---- writing ----

OPENING = b'{"__metadata__":{"digest":"'
ZEROS = b"0" * 64


def encode(meta: Meta, layout: Layout, hashes: Mapping[str, str]) -> bytes:
    """All that stands before the data."""
    described = {"format_version": FORMAT_VERSION, **meta.to_dict(), "sha256": dict(hashes)}
    start = opening({"digest": ZEROS.decode(), "tinygpt": to_json(described)}, layout)
    return start.replace(ZEROS, _digest(start), 1)


def _digest(start: bytes) -> bytes:
    """The hash of length and header, whatever stands where the digest goes."""
    at = 8 + len(OPENING)
    return hashlib.sha256(start[:at] + ZEROS + start[at + len(ZEROS) :]).hexdigest().encode()


# ---- reading ----


def decode(file: BinaryIO, path: Path, size: int) -> Header:
    """The header of an open file of ``size`` bytes; CheckpointError if any of it is not right."""
    start = read_opening(file, size, MAX_HEADER)
    if start is None:
        file.seek(0)
        raise CheckpointError(
            no_model(path, file.read(HEAD))
            or f"{path} is damaged or not a safetensors file: its {size} bytes cannot hold the "
            f"header it announces."
        )
    try:
        metadata, layout = parse(start, size, NUMPY)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}.") from error
    sealed = start[8:].startswith(OPENING)
    if sealed and start[8 + len(OPENING) :][: len(ZEROS)] != _digest(start):
        raise CheckpointError(f"{path} is damaged: its header does not match its own hash.")
    if "tinygpt" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a TinyGPT checkpoint: "
            f"it lacks the metadata entry 'tinygpt'."
        )
    described = _description(path, metadata["tinygpt"], layout, sealed)
    return Header(described, layout, len(start), hashlib.sha256(start).digest())


BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What values of another kind than expected lead to."""


def _description(path: Path, text: str, layout: Layout, sealed: bool) -> dict[str, Any]:
    """``sealed``: the header's own digest is there and right, as it is since format version 2."""
    try:
        described: dict[str, Any] = parse_json(text)
        version = int(described["format_version"])
        if version == 1:
            sealed = described.pop("digest", None) == _first_digest(described, layout)
        hashes = described.get("sha256", {})
        complete = sealed and isinstance(hashes, dict) and set(hashes) == set(layout)
    except BROKEN as error:
        raise CheckpointError(f"{path} is damaged: its description cannot be read.") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this TinyGPT reads up to {FORMAT_VERSION}. "
            f"Use the one that wrote it, or a newer one."
        )
    if not complete:
        raise CheckpointError(f"{path} is damaged: its description does not match its own hash.")
    return described


def _first_digest(described: Mapping[str, Any], layout: Layout) -> str:
    """How format version 1 hashed its description."""
    places = {name: [place.dtype, list(place.shape)] for name, place in layout.items()}
    whole = {"description": described, "layout": places}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
