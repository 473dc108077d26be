"""One self-describing safetensors file per checkpoint, written whole or not at all.

Tensors are named ``model.<parameter>`` and ``optimizer.<state>``. The metadata entry ``tinygpt`` is
JSON: the format's version, the step, both configs, the tokenizer, the data's fingerprint, the best
result so far, a SHA-256 of every tensor, and a SHA-256 over all of that. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tinygrad import Tensor
from tinygrad.nn.optim import Optimizer

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError
from tinygpt.files import replacing, staging
from tinygpt.model import Transformer
from tinygpt.optim import optimizer_state

FORMAT_VERSION = 1
MAX_METADATA = 64 * 2**20
"""Bytes of JSON header that are read at most."""

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
    """Seed and step: all that batches and dropout depend on."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "iter_num": self.iter_num,
            "model": self.model.to_dict(),
            "train": None if self.train is None else self.train.to_dict(),
            "tokenizer": self.tokenizer,
            "data": self.data,
            "progress": self.progress,
            "random_state": self.random_state,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Meta:
        train = values["train"]
        return cls(
            iter_num=int(values["iter_num"]),
            model=GPTConfig.from_dict(values["model"]),
            train=None if train is None else TrainConfig.from_dict(train),
            tokenizer=values["tokenizer"],
            data=values["data"],
            progress=values["progress"],
            random_state=values["random_state"],
        )


# ---- writing ----


def save(path: Path, model: Transformer, optimizer: Optimizer | None, meta: Meta) -> Path:
    """Write a checkpoint atomically and return its path.

    Raises CheckpointError if the folder cannot be written; what stood at ``path`` stays.
    """
    tensors = {name: t.numpy() for name, t in _named_tensors(model, optimizer).items()}
    hashes = {name: _sha256(array) for name, array in tensors.items()}
    described: dict[str, Any] = {"format_version": FORMAT_VERSION, **meta.to_dict()}
    described["sha256"] = hashes
    described["digest"] = _digest(described, _layout(tensors))
    metadata = {"tinygpt": json.dumps(described)}
    with writing(path), staging(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while ``path`` is written into a CheckpointError that advises."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. "
            f"Choose a folder with enough space that you may write to."
        ) from error


def _named_tensors(model: Transformer, optimizer: Optimizer | None) -> dict[str, Tensor]:
    parameters = model.parameters()
    tensors = {f"model.{name}": p for name, p in parameters.items()}
    if optimizer is not None:
        state = optimizer_state(optimizer, parameters)
        tensors |= {f"optimizer.{name}": t for name, t in state.items()}
    return tensors


# ---- reading ----


def read_meta(path: str | Path) -> Meta:
    """What the checkpoint at ``path`` holds, without reading its tensors.

    Raises CheckpointError if there is no such file, or it is damaged, foreign or of a newer format.
    """
    return Meta.from_dict(_open(Path(path))[0])


def load(path: str | Path, model: Transformer, optimizer: Optimizer | None = None) -> Meta:
    """Read weights, and the optimizer's state if one is given, into place.

    Values are assigned to the existing buffers, so functions that were jitted before see them.
    Nothing is changed unless all of it is whole and fits.
    """
    path = Path(path)
    described, layout = _open(path)
    meta = Meta.from_dict(described)
    _check_same_model(path, meta.model, model.config)
    wanted = _named_tensors(model, optimizer)
    missing = [name for name in wanted if name not in layout]
    if missing:
        raise CheckpointError(_explain_missing(path, missing, layout))
    for name, tensor in wanted.items():
        _, shape = layout[name]
        if tuple(shape) != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(shape)}, but {tensor.shape} is wanted."
            )
    arrays = _read_tensors(path, list(wanted), described["sha256"])
    for name, tensor in wanted.items():
        tensor.assign(Tensor(arrays[name], device=tensor.device).cast(tensor.dtype)).realize()
    return meta


def verify(path: str | Path) -> Meta:
    """Check every byte of a checkpoint against its hash; CheckpointError names what is damaged."""
    described, layout = _open(Path(path))
    for name in layout:
        _read_tensors(Path(path), [name], described["sha256"])
    return Meta.from_dict(described)


def describe(path: str | Path) -> dict[str, Any]:
    """Everything but the values: the metadata, and dtype and shape of every tensor."""
    described, layout = _open(Path(path))
    tensors = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in layout.items()}
    described.pop("sha256")
    return {**described, "tensors": tensors, "bytes": Path(path).stat().st_size}


def _open(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """-> the metadata, and dtype and shape by name; both checked against the digest"""
    _check_container(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            layout = {n: (str(s.get_dtype()), list(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}.") from error
    if "tinygpt" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a TinyGPT checkpoint: "
            f"it lacks the metadata entry 'tinygpt'."
        )
    try:
        described = json.loads(metadata["tinygpt"])
        version = int(described["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its description cannot be read.") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this TinyGPT reads up to {FORMAT_VERSION}. "
            f"Update it: pip install --upgrade tinygpt."
        )
    digest = described.pop("digest", None)
    whole = digest == _digest(described, layout) and set(described["sha256"]) == set(layout)
    if not whole:
        raise CheckpointError(f"{path} is damaged: its description does not match its own hash.")
    return described, layout


def _check_container(path: Path) -> None:
    """Refuse what cannot be a safetensors file, before anything is allocated for it."""
    if not path.is_file():
        beside = [p.name for p in list_checkpoints(path.parent)]
        there = f" In {path.parent}: {', '.join(beside[-5:])}." if beside else ""
        raise CheckpointError(f"There is no checkpoint at {path}.{there}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    header = int.from_bytes(start, "little")
    if len(start) == 8 and header <= min(size - 8, MAX_METADATA):
        return
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a Python pickle, which can run code when it is opened. "
            f"TinyGPT reads safetensors files only; convert it with the tool that wrote it."
        )
    raise CheckpointError(
        f"{path} is damaged or not a safetensors file: its {size} bytes cannot hold the header it "
        f"announces."
    )


def _read_tensors(path: Path, names: list[str], hashes: Mapping[str, str]) -> dict[str, Array]:
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}.") from error
    damaged = [name for name, array in arrays.items() if _sha256(array) != hashes.get(name)]
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: the bytes of {', '.join(damaged[:5])} do not match their hash. "
            f"Use an older checkpoint."
        )
    return arrays


def _check_same_model(path: Path, found: GPTConfig, wanted: GPTConfig) -> None:
    a, b = found.to_dict(), wanted.to_dict()
    differing = [f"{k}={a[k]} (this model: {b[k]})" for k in b if a[k] != b[k] and k != "dropout"]
    if differing:
        raise CheckpointError(
            f"{path} is of another model: {', '.join(differing)}. Build the model with these "
            f"values, or use load({str(path)!r}), which does."
        )


def _explain_missing(path: Path, missing: list[str], layout: Mapping[str, object]) -> str:
    if not any(name.startswith("optimizer.") for name in layout):
        return (
            f"{path} holds weights but no optimizer state. Load it without an optimizer to use the "
            f"weights alone."
        )
    listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
    return f"{path} lacks {listed}. It was saved with another kind of optimizer or model."


def _sha256(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest()


def _layout(tensors: Mapping[str, Array]) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape by name, dtypes as safetensors spells them"""
    short = {"float": "F", "int": "I", "uint": "U"}

    def spell(dtype: np.dtype[Any]) -> str:
        kind, bits = re.fullmatch(r"([a-z]+)(\d+)", dtype.name).groups()  # type: ignore[union-attr]
        return f"{short[kind]}{bits}"

    return {name: (spell(a.dtype), list(a.shape)) for name, a in tensors.items()}


def _digest(described: Mapping[str, Any], layout: Mapping[str, tuple[str, list[int]]]) -> str:
    whole = {"description": described, "layout": {n: list(v) for n, v in layout.items()}}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- folders of checkpoints ----

BEST = "best.json"


def checkpoint_path(folder: str | Path, iter_num: int) -> Path:
    return Path(folder) / f"ckpt_{iter_num}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    numbered = ((re.fullmatch(r"ckpt_(\d+)\.safetensors", p.name), p) for p in _files(folder))
    return [p for _, p in sorted((int(m[1]), p) for m, p in numbered if m)]


def mark_best(path: Path, val_loss: float) -> None:
    """Write down which checkpoint of its folder is the best one."""
    text = json.dumps({"checkpoint": path.name, "val_loss": val_loss})
    with writing(path.parent / BEST), replacing(path.parent / BEST) as file:
        file.write(text.encode())


def best_checkpoint(folder: Path) -> Path | None:
    """The one marked as best, if it is still there."""
    try:
        name = json.loads((folder / BEST).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((p for p in list_checkpoints(folder) if p.name == name), None)


def remove_old(folder: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and the best one; 0 deletes none.

    A file that cannot be deleted is left: that is no reason to stop a run.
    """
    if keep_last == 0:
        return
    best = best_checkpoint(folder)
    for path in list_checkpoints(folder)[:-keep_last]:
        if path != best:
            with contextlib.suppress(OSError):
                path.unlink()


def _files(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if p.is_file()]
    except OSError:
        return []
