"""From a model and its optimizer to a checkpoint, and back.

Loading reads and checks the whole file first and assigns then: a damaged file changes nothing. The
values go into the buffers that are there, since functions captured before hold on to them.

tinygrad is imported where it is used, so that a program which only looks at files starts quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.config import ADAPTERS, GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.files.atomic import check_overwritable, remove_stale, user_path
from tinygpt.runs.checkpoint.copier import Copier, layout_of, named_tensors
from tinygpt.runs.checkpoint.format import FREE, Array, Meta
from tinygpt.runs.checkpoint.reader import (
    STATE,
    WEIGHTS,
    describe,
    one_by_one,
    origin_and_hashes,
    read,
    read_meta,
    rehearse,
)
from tinygpt.runs.checkpoint.writer import write

if TYPE_CHECKING:
    from tinygrad import Tensor
    from tinygrad.nn.optim import Optimizer

    from tinygpt.model.transformer import Transformer

OUTER_MOMENTUM = f"{STATE}outer."
"""How the names of the momentum of ranks that train apart begin."""


VOCABULARY = ("wte.weight", "lm_head.weight")
"""Weights that have a row for each token."""


def save(path: Path, model: Transformer, optimizer: Optimizer | None, meta: Meta) -> Path:
    """Write a checkpoint atomically and return its path.

    Raises CheckpointError if the folder cannot be written; what stood at ``path`` stays. Raises
    UsageError for a model of rounded weights.
    """
    if model.rounded_to is not None:
        what = "This model was quantised" if model.quantized else "The weights were rounded"
        raise UsageError(f"{what}: a checkpoint of its weights is the one it was loaded from.")
    check_overwritable(path, b"tinygpt", "a checkpoint")
    rehearse(meta, layout_of(named_tensors(model, optimizer)))
    remove_stale(path.parent)
    return write(path, Copier(model, optimizer).copy(), meta)


def load(
    path: str | Path,
    model: Transformer,
    optimizer: Optimizer | None = None,
    by_stamp: bool = False,
) -> Meta:
    """Read weights, and the optimizer's state if one is given, into place.

    Nothing is changed unless all of the file is whole and fits; but a model that has no weights yet
    may have some of the file's after an error. What LoRA's adapters have learned is added to the
    weights, unless the model has such adapters too. With ``by_stamp`` a file that was whole within
    a week, and was not written to since, is not hashed again (`stamps`).
    """
    path = user_path(path)
    meta, held = read_meta(path), describe(path)["tensors"]
    _check_same_model(path, meta.model, model.config)
    wanted = named_tensors(model, optimizer)
    outer = [n for n in wanted if n.startswith(OUTER_MOMENTUM) and n not in held]
    for name in outer:  # of ranks that shared each step, or of an earlier version: it stays 0
        del wanted[name]
    _take_over(path, model, wanted, by_stamp=by_stamp)
    return meta


def start_from(
    path: str | Path, model: Transformer, rows: Mapping[int, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Take over the weights of another run; -> where they are from, as ``Meta.init`` has it.

    A model of a smaller block_size takes the embeddings of the first positions. ``rows`` are those
    of new tokens: each begins as the mean of the rows that it names, plus the small random values
    that the model has there; behind the last row of the file all must be new. Raises
    CheckpointError if the weights are damaged or do not fit.
    """
    path = user_path(path)
    found, block_size = read_meta(path).model, model.config.block_size
    if block_size > found.block_size:
        raise CheckpointError(
            f"{path} knows {found.block_size} positions, and block_size={block_size} would need "
            f"more: they are learned, and nobody has learned those."
        )
    rows, size = rows or {}, model.config.vocab_size
    if set(range(found.vocab_size, size)) <= rows.keys():
        found = replace(found, vocab_size=size)
    _check_same_model(path, replace(found, block_size=block_size), model.config)
    return _take_over(path, model, named_tensors(model, None), positions=block_size, rows=rows)


def _take_over(
    path: Path,
    model: Transformer,
    wanted: Mapping[str, Tensor],
    positions: int | None = None,
    rows: Mapping[int, Sequence[int]] | None = None,
    by_stamp: bool = False,
) -> dict[str, Any]:
    """Read the wanted Tensors into place; -> where the weights are from, which the model notes.

    ``positions`` is how many of the embeddings of positions are taken, if not all; ``rows`` are
    those of new tokens. Tensors without memory are read straight into theirs.
    """
    from tinygpt.machine.transfer import unwritten

    homes = dict[str, Array]()

    def room(name: str) -> Array | None:
        if (found := unwritten(wanted[name]) if name in wanted else None) is not None:
            homes[name] = found
        return found

    arrays, changed = _read_merged(path, wanted, room, by_stamp)
    table = f"{WEIGHTS}wpe.weight"
    if positions is not None and table in arrays:
        arrays[table] = arrays[table][:positions]
        changed.add(table)
    for table in (f"{WEIGHTS}{name}" for name in VOCABULARY):
        if rows and table in arrays and table in wanted:
            arrays[table] = _with_rows(arrays[table], wanted[table].numpy(), rows)
            changed.add(table)
    origin, hashes = origin_and_hashes(path, changed)
    own = (WEIGHTS + name for name in model.parameters() if WEIGHTS + name in arrays)
    found = {n.removeprefix(WEIGHTS): hashes.get(n) or _sha256(arrays[n]) for n in own}
    _assign(path, wanted, arrays, homes)
    model.read_from = origin, found
    return origin


def _with_rows(table: Array, fresh: Array, rows: Mapping[int, Sequence[int]]) -> Array:
    """A table (V, C) with rows for new tokens, of which ``fresh`` (V', C) has small random ones."""
    grown = np.concatenate([table, fresh[len(table) :]])
    for i, means in rows.items():
        grown[i] = fresh[i] + table[[m for m in means if m < len(table)]].mean(axis=0)
    return grown.astype(table.dtype)


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


def _sha256(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _read_merged(
    path: Path,
    wanted: Mapping[str, Tensor],
    room: Callable[[str], Array | None],
    by_stamp: bool,
) -> tuple[dict[str, Array], set[str]]:
    """The arrays of a file; adapters that are not wanted are added to the weights of their layer.

    -> also the names of the weights that are no longer as they are in the file
    """
    adapters = {part for name in wanted for part in _adapters(name)} - wanted.keys()
    meta, arrays = read(path, {*wanted, *adapters}, room, by_stamp)
    learned = {name: arrays.pop(name) for name in adapters if name in arrays}
    changed = {name for name in wanted if any(part in learned for part in _adapters(name))}
    for name in changed:
        parts = map(learned.get, _adapters(name))
        arrays[name] = _merged(path, name, meta.train, arrays.get(name), *parts)
    return arrays, changed


def _adapters(name: str) -> tuple[str, str]:
    """The names of the two factors of LoRA for the layer that a weight belongs to."""
    layer = name.removesuffix(".weight")
    return layer + ADAPTERS[0], layer + ADAPTERS[1]


@contextmanager
def weights(path: str | Path, model: Transformer) -> Iterator[Callable[[str], Array]]:
    """-> a function that reads one parameter of ``model`` at a time, by its name

    Like ``load``, for memory that cannot hold all of them: the model itself stays as it is.
    """
    path = user_path(path)
    shapes = {name: tuple(map(int, p.shape)) for name, p in model.parameters().items()}
    with one_by_one(path) as (meta, find):
        _check_same_model(path, meta.model, model.config)

        def fetch(name: str) -> Array:
            array, *parts = map(find, (WEIGHTS + name, *_adapters(WEIGHTS + name)))
            if any(part is not None for part in parts):
                array = _merged(path, WEIGHTS + name, meta.train, array, *parts)
            if array is None or array.shape != shapes[name]:
                raise CheckpointError(f"{path} has no {name} of the shape {shapes[name]}.")
            return array.astype(np.float32, copy=False)

        yield fetch


def _merged(
    path: Path, name: str, train: TrainConfig | None, weight: Array | None, *parts: Array | None
) -> Array:
    """The weight (O, I) of a layer with what its adapter has learned, if they fit together."""
    from tinygpt.model.lora import merged

    rank, (a, b) = None if train is None else train.lora_rank, parts
    if train is not None and rank and weight is not None and a is not None and b is not None:
        n_out, *n_in = weight.shape
        if (a.shape, b.shape) == ((rank, *n_in), (n_out, rank)):
            return merged(weight, a, b, train.lora_alpha / rank)
    layer = name.removesuffix(".weight")
    raise CheckpointError(f"{path} is damaged or made up: the adapter of {layer} does not fit it.")


def _assign(
    path: Path,
    wanted: Mapping[str, Tensor],
    arrays: dict[str, Array],
    homes: Mapping[str, Array],
) -> None:
    """Put the arrays into the Tensors of the same names; CheckpointError if not all of them fit.

    They are copied straight into the buffers, for to assign and realize takes a millisecond or more
    for each; and taken out of ``arrays``, so that not all of them are in memory twice. ``homes``
    are those that are in the buffers already.
    """
    from tinygpt.machine.transfer import overwrite

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
        if (values := arrays.pop(name)) is not homes.get(name):
            overwrite(tensor, values)


def _check_same_model(path: Path, found: GPTConfig, wanted: GPTConfig) -> None:
    a, b = found.to_dict(), wanted.to_dict()
    differing = [f"{k}={a[k]} (this model: {b[k]})" for k in b if a[k] != b[k] and k not in FREE]
    if differing:
        raise CheckpointError(
            f"{path} is of another model: {', '.join(differing)}. Build the model with these "
            f"values, or use load({str(path)!r}), which does."
        )


def _explain_missing(path: Path, missing: list[str]) -> str:
    if not any(name.startswith("optimizer.") for name in describe(path)["tensors"]):
        return f"{path} holds weights but no optimizer state. Load it without an optimizer."
    listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
    return f"{path} lacks {listed}. It was saved with another kind of optimizer or model."
