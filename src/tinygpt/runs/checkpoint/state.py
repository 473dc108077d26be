"""Between a model with its optimizer and checkpoints.

tinygrad is imported where it is used: who only looks at files does not wait for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.config import ADAPTERS, GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.files.atomic import check_overwritable, remove_stale, user_path
from tinygpt.runs.checkpoint.format import Array, Layout, Meta, arrange
from tinygpt.runs.checkpoint.reader import (
    WEIGHTS,
    describe,
    one_by_one,
    origin_and_hashes,
    read,
    read_meta,
    rehearse,
)
from tinygpt.runs.checkpoint.writer import Snapshot, write

if TYPE_CHECKING:
    from tinygrad import Tensor, UOp
    from tinygrad.nn.optim import Optimizer

    from tinygpt.machine.tinygrad_internals import Buffer
    from tinygpt.model.transformer import Transformer


def save(path: Path, model: Transformer, optimizer: Optimizer | None, meta: Meta) -> Path:
    """Write a checkpoint atomically and return its path.

    Raises CheckpointError if the folder cannot be written; what stood at ``path`` stays. Raises
    UsageError for a quantised model.
    """
    if model.quantized:
        raise UsageError(
            "This model was quantised, and a checkpoint holds the weights before: they are in the "
            "one that it was loaded from."
        )
    check_overwritable(path, b"tinygpt", "a checkpoint")
    rehearse(meta, layout_of(named_tensors(model, optimizer)))
    remove_stale(path.parent)
    return write(path, Copier(model, optimizer).copy(), meta)


def load(path: str | Path, model: Transformer, optimizer: Optimizer | None = None) -> Meta:
    """Read weights, and the optimizer's state if one is given, into place.

    Values are assigned to the existing buffers, so functions that were jitted before see them.
    Nothing is changed unless all of the file is whole and fits. What LoRA's adapters have learned
    is added to the weights, unless the model has such adapters too.
    """
    path = user_path(path)
    wanted = named_tensors(model, optimizer)
    _check_same_model(path, read_meta(path).model, model.config)
    meta, arrays, changed = _read_merged(path, wanted)
    found, hashes = origin_and_hashes(path, changed)
    _assign(path, wanted, arrays)
    _note_origin(model, found, hashes, arrays)
    return meta


def start_from(path: str | Path, model: Transformer) -> dict[str, Any]:
    """Take over the weights of another run; -> where they are from, as ``Meta.init`` has it.

    A model of a smaller block_size takes the embeddings of the first positions. Raises
    CheckpointError if the weights are damaged or do not fit.
    """
    path = user_path(path)
    found, block_size = read_meta(path).model, model.config.block_size
    if block_size > found.block_size:
        raise CheckpointError(
            f"{path} knows {found.block_size} positions, and block_size={block_size} would need "
            f"more: they are learned, and nobody has learned those."
        )
    _check_same_model(path, replace(found, block_size=block_size), model.config)
    wanted = named_tensors(model, None)
    _, arrays, changed = _read_merged(path, wanted)
    positions = f"{WEIGHTS}wpe.weight"
    if positions in arrays:
        arrays[positions] = arrays[positions][:block_size]
        changed.add(positions)
    origin, hashes = origin_and_hashes(path, changed)
    _assign(path, wanted, arrays)
    _note_origin(model, origin, hashes, arrays)
    return origin


def origin_of(model: Transformer) -> dict[str, Any] | None:
    """Where a model's weights are from, as ``Meta.init`` has it; None if that is not known.

    What ``load`` and ``start_from`` note is believed only as long as every weight has the hash that
    it had then: weights can be changed in many ways. Reads as many bytes as the weights have.
    """
    if model.read_from is None:
        return None
    found, hashes = model.read_from
    parameters = model.parameters()
    own = {name for name in parameters if name in hashes or not name.endswith(ADAPTERS)}
    idle = (p for n, p in parameters.items() if n not in own and n.endswith(ADAPTERS[1]))
    same = own == hashes.keys() and all(
        _sha256(parameters[n].numpy()) == h for n, h in hashes.items()
    )
    return dict(found) if same and not any(p.numpy().any() for p in idle) else None


def _note_origin(
    model: Transformer,
    found: dict[str, Any],
    hashes: Mapping[str, str],
    arrays: Mapping[str, Array],
) -> None:
    """``hashes`` are the file's, of the weights that went into the model as they are there."""
    model.read_from = (
        found,
        {n: hashes.get(WEIGHTS + n) or _sha256(arrays[WEIGHTS + n]) for n in model.parameters()},
    )


def _sha256(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _read_merged(
    path: Path, wanted: Mapping[str, Tensor]
) -> tuple[Meta, dict[str, Array], set[str]]:
    """``read``; adapters that are not wanted themselves are added to the weights they belong to.

    -> also the names of the weights that are no longer as they are in the file
    """
    layers = [name.removesuffix(".weight") for name in wanted if name.endswith(".weight")]
    adapters = {layer + end for layer in layers for end in ADAPTERS} - wanted.keys()
    meta, arrays = read(path, {*wanted, *adapters})
    changed = set()
    for layer in layers:
        if any(layer + end in adapters and layer + end in arrays for end in ADAPTERS):
            parts = [arrays.pop(layer + end, None) for end in (".weight", *ADAPTERS)]
            arrays[f"{layer}.weight"] = _merged(path, layer, meta.train, *parts)
            changed.add(f"{layer}.weight")
    return meta, arrays, changed


@contextmanager
def weights(path: str | Path, model: Transformer) -> Iterator[Callable[[str], Array]]:
    """-> a function that reads one parameter of ``model`` at a time, by its name

    ``load`` for those who cannot have all of them in memory: the model itself stays as it is.
    """
    path = user_path(path)
    shapes = {name: tuple(map(int, p.shape)) for name, p in model.parameters().items()}
    with one_by_one(path) as (meta, find):
        _check_same_model(path, meta.model, model.config)

        def fetch(name: str) -> Array:
            array, layer = find(WEIGHTS + name), WEIGHTS + name.removesuffix(".weight")
            a, b = (find(layer + end) for end in ADAPTERS)
            if a is not None or b is not None:
                array = _merged(path, layer, meta.train, array, a, b)
            if array is None or array.shape != shapes[name]:
                raise CheckpointError(f"{path} has no {name} of the shape {shapes[name]}.")
            return array.astype(np.float32, copy=False)

        yield fetch


def _merged(
    path: Path,
    layer: str,
    train: TrainConfig | None,
    weight: Array | None,
    a: Array | None,
    b: Array | None,
) -> Array:
    """The weight (O, I) of a layer with what its adapter has learned, if they fit together."""
    from tinygpt.model.lora import merged

    rank = None if train is None else train.lora_rank
    if train is not None and rank and weight is not None and a is not None and b is not None:
        n_out, *n_in = weight.shape
        if (a.shape, b.shape) == ((rank, *n_in), (n_out, rank)):
            return merged(weight, a, b, train.lora_alpha / rank)
    raise CheckpointError(f"{path} is damaged or made up: the adapter of {layer} does not fit it.")


def _assign(path: Path, wanted: Mapping[str, Tensor], arrays: Mapping[str, Array]) -> None:
    """Put the arrays into the Tensors of the same names; CheckpointError if not all of them fit."""
    from tinygrad import Tensor

    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise CheckpointError(_explain_missing(path, missing))
    for name, tensor in wanted.items():
        found = arrays[name].shape
        if found != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {found}, but {tensor.shape} is wanted."
            )
    for name, tensor in wanted.items():
        tensor.assign(Tensor(arrays[name], device=tensor.device).cast(tensor.dtype)).realize()


def named_tensors(model: Transformer, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """All that a checkpoint holds, under the names that it has there.

    Raises UsageError for an optimizer of another model.
    """
    from tinygpt.training.optim import optimizer_state

    parameters = model.parameters()
    tensors = {f"model.{name}": p for name, p in parameters.items()}
    if optimizer is not None:
        _check_own(model, optimizer)
        state = optimizer_state(optimizer, parameters)
        tensors |= {f"optimizer.{name}": t for name, t in state.items()}
    return tensors


def _check_own(model: Transformer, optimizer: Optimizer) -> None:
    own = {id(p) for p in (*model.parameters().values(), *model.trainable().values())}
    foreign = sum(id(p) not in own for p in optimizer.params)
    if foreign:
        raise UsageError(
            f"{foreign} of the optimizer's {len(optimizer.params)} parameters are not this "
            f"model's: it was made for another one. Make it from list(model.trainable().values())."
        )


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    from tinygpt.machine.tinygrad_internals import _to_np_dtype

    kinds = [(name, np.dtype(_to_np_dtype(t.dtype)), t.shape) for name, t in tensors.items()]
    return arrange((name, dtype, tuple(map(int, shape))) for name, dtype, shape in kinds)


def state_size(model: Transformer, optimizer: Optimizer | None) -> int:
    """Bytes of a checkpoint's tensors."""
    return max(place.end for place in layout_of(named_tensors(model, optimizer)).values())


class Copier:
    """Copies the state of a model and its optimizer into memory that is used again each time.

    That takes as much memory as the state has, 12 bytes for each parameter with Adam.
    """

    def __init__(self, model: Transformer, optimizer: Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self._prepare(named_tensors(model, optimizer))

    def copy(self) -> Snapshot:
        """The values of this moment. They stand in the snapshot until the next call."""
        from tinygrad import Device

        tensors = named_tensors(self.model, self.optimizer)
        same = len(tensors) == len(self._sources) and all(
            source.tensor is tensors.get(name) for name, source in self._sources.items()
        )
        if not same:  # somebody put other Tensors into the place of the former
            self._prepare(tensors)
        for device in self._devices:
            Device[device].synchronize()
        for source in self._sources.values():
            source.copy()
        return self.snapshot

    def _prepare(self, tensors: Mapping[str, Tensor]) -> None:
        self.snapshot = Snapshot(layout_of(tensors))
        self._sources = {n: _Source(t, self.snapshot.array(n)) for n, t in tensors.items()}
        self._devices = {t.device for t in tensors.values() if isinstance(t.device, str)}


@dataclass
class _Source:
    """A Tensor, and where its values go.

    They are fetched from its memory itself, because ``Tensor.numpy()`` takes half a millisecond:
    for the 159 Tensors of a small model more time than a training step.
    """

    tensor: Tensor
    out: Array
    uop: UOp | None = None
    buffer: Buffer | None = None
    """What ``uop`` stands for."""
    memory: Array | None = None
    """What lies in ``buffer``, where the processor can reach it."""

    def copy(self) -> None:
        """Everything that was to be computed on the device has been."""
        if self.tensor.uop is not self.uop:
            self.uop, self.buffer = self.tensor.uop, _buffer(self.tensor, self.out)
            self.memory = _memory(self.buffer, self.out)
        if self.memory is not None:
            np.copyto(self.out, self.memory)
        elif self.buffer is not None:
            _fetch(self.buffer, self.out)
        else:  # not computed yet, a view of something larger, or on several devices
            np.copyto(self.out, self.tensor.numpy())


def _buffer(tensor: Tensor, out: Array) -> Buffer | None:
    """The buffer that holds the values of a Tensor and nothing else, as they are in ``out``."""
    from tinygpt.machine.tinygrad_internals import Buffer

    if not tensor.uop.has_buffer_identity():
        return None
    buffer = tensor.uop.base.buffer
    if not isinstance(buffer, Buffer) or not buffer.is_initialized():
        return None
    return buffer if buffer.nbytes == out.nbytes else None


def _memory(buffer: Buffer | None, like: Array) -> Array | None:
    """The memory of a buffer without a copy, if the processor can reach it."""
    if buffer is None or not hasattr(buffer.allocator, "_as_buffer"):
        return None
    memory = buffer.as_memoryview(force_zero_copy=True)
    return np.frombuffer(memory, like.dtype).reshape(like.shape)


def _fetch(buffer: Buffer, out: Array) -> None:
    """Copy from a device with memory of its own."""
    from tinygpt.machine.tinygrad_internals import Buffer

    memory = out.reshape(-1).view(np.uint8).data
    Buffer("PYTHON", buffer.size, buffer.dtype, opaque=memory).copy_from(buffer)


def _check_same_model(path: Path, found: GPTConfig, wanted: GPTConfig) -> None:
    a, b = found.to_dict(), wanted.to_dict()
    free = ("dropout", "attention")  # how it is trained and computed, not what it is
    differing = [f"{k}={a[k]} (this model: {b[k]})" for k in b if a[k] != b[k] and k not in free]
    if differing:
        raise CheckpointError(
            f"{path} is of another model: {', '.join(differing)}. Build the model with these "
            f"values, or use load({str(path)!r}), which does."
        )


def _explain_missing(path: Path, missing: list[str]) -> str:
    if not any(name.startswith("optimizer.") for name in describe(path)["tensors"]):
        return (
            f"{path} holds weights but no optimizer state. Load it without an optimizer to use the "
            f"weights alone."
        )
    listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
    return f"{path} lacks {listed}. It was saved with another kind of optimizer or model."
