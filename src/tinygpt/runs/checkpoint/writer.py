"""Writing checkpoints from memory: no tinygrad in here, so that a thread can do it meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tinygpt.files import disk
from tinygpt.files.atomic import replacing, write_all
from tinygpt.files.disk import check_space, size, writing
from tinygpt.files.tensor_file import Layout
from tinygpt.runs.checkpoint.format import ZEROS, Array, Meta, data_size, encode


class Snapshot:
    """A copy of tensors in memory of its own, laid out as in the file."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.memory = np.empty(data_size(layout), np.uint8)

    def array(self, name: str) -> Array:
        """The memory of one tensor, of its type and shape."""
        place = self.layout[name]
        return self.bytes(name).view(place.numpy_dtype).reshape(place.shape)

    def bytes(self, name: str) -> Array:
        """The memory of one tensor, byte by byte."""
        place = self.layout[name]
        return self.memory[place.start : place.end]


def write(path: Path, snapshot: Snapshot, meta: Meta) -> Path:
    """Write a checkpoint atomically and return its path.

    Raises CheckpointError if that does not work; what stood at ``path`` stays.
    """
    layout, memory = snapshot.layout, snapshot.memory.data
    # The header comes before the data and holds its hashes, so all data is hashed first. Two calls
    # of write follow, header and data, since the snapshot is laid out as the file is.
    hashes = {n: hashlib.sha256(snapshot.bytes(n).data).hexdigest() for n in layout}
    header = encode(meta, layout, hashes)
    with writing(path):
        check_space(path.parent, len(header) + memory.nbytes)
        with replacing(path) as file:
            write_all(file.fileno(), header)
            write_all(file.fileno(), memory)
    return path


def stream(
    path: Path, layout: Layout, pieces: Callable[[str], Iterable[Array]], meta: Meta
) -> Path:
    """``write`` for tensors that come in pieces, flat, so that none has to be in memory whole.

    A header without hashes is written first; when the data is written and hashed, the final header,
    which has the same length, replaces it.
    """
    hashes = dict.fromkeys(layout, ZEROS.decode())
    header = encode(meta, layout, hashes)
    with writing(path):
        check_space(path.parent, len(header) + data_size(layout))
        with replacing(path) as file:
            write_all(file.fileno(), header)
            for name, place in layout.items():
                digest, left = hashlib.sha256(), place.end - place.start
                for piece in pieces(name):
                    data = np.ascontiguousarray(piece, place.numpy_dtype).view(np.uint8).data
                    digest.update(data)
                    write_all(file.fileno(), data)
                    left -= len(data)
                assert not left, f"the pieces of {name} are not as long as it is"
                hashes[name] = digest.hexdigest()
            # The file has no name yet, so nobody sees it between these two headers.
            file.seek(0)
            write_all(file.fileno(), encode(meta, layout, hashes))
    return path


def foresee_space(folder: Path, each: int, count: int) -> str | None:
    """A warning if ``count`` checkpoints of ``each`` bytes, with those there, will fill the disk.

    Raises CheckpointError if there is no room for a single one.
    """
    with writing(folder):
        check_space(folder, each)
    free = disk.free_space(folder)
    wanted = each * count - sum(path.stat().st_size for path in folder.glob("ckpt_*"))
    if free is None or free >= wanted:
        return None
    return (
        f"{folder} has {size(free)} left, but the checkpoints of this run will take "
        f"{size(wanted)} more. Make some room, or set a smaller keep_last."
    )
