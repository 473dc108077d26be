"""Files as streams of bytes, unpacked where their name says that they are packed: .gz and .zst."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from tinygpt.errors import DataError, extras

BLOCK = 1 << 20
"""Bytes read at a time."""
PACKED = 1 << 12
"""Bytes of a .zst file unpacked at a time: a block of zstd's, of 4 bytes at least, may become
128 KB, so that a file made up to fill the memory cannot."""
SUFFIXES = (".gz", ".zst")


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def blocks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, of one that is not packed from ``start`` to ``stop``, in pieces.

    Raises DataError for a file that cannot be read, is damaged, or ends too early.
    """
    try:
        if is_compressed(path):
            yield from _UNPACK[path.suffix.lower()](path)
            return
        with path.open("rb") as file:
            file.seek(start)
            left = BLOCK if stop is None else stop - start
            while left > 0 and (block := file.read(min(BLOCK, left))):
                left -= 0 if stop is None else len(block)
                yield block
    except PermissionError as error:
        raise DataError(
            f"{path} may not be read. Allow it: chmod u+r {quote(str(path))}"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(_damaged(path, "gzip -t")) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _gzip(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw, gzip.open(raw) as file:
        while block := file.read(BLOCK):
            yield block


def _zstd(path: Path) -> Iterator[bytes]:
    """Frame by frame: only the decompressor of a frame knows whether it was complete."""
    zstandard = extras.need("zstd", f"Reading {path.name}", "zstandard")
    with path.open("rb") as file:
        try:
            yield from _frames(file, lambda: zstandard.ZstdDecompressor().decompressobj(), path)
        except zstandard.ZstdError as error:
            raise DataError(_damaged(path, "zstd -t")) from error


def _frames(file: BinaryIO, begin: Callable[[], object], path: Path) -> Iterator[bytes]:
    frame, fed = begin(), False
    while block := file.read(PACKED):
        while block:
            unpacked = frame.decompress(block)  # type: ignore[attr-defined]
            if unpacked:
                yield unpacked
            fed, block = True, b""
            if frame.eof:  # type: ignore[attr-defined]
                block = frame.unused_data  # type: ignore[attr-defined]
                frame, fed = begin(), False
    if fed:
        raise DataError(_damaged(path, "zstd -t"))


def _damaged(path: Path, check: str) -> str:
    return (
        f"{path} is compressed, and damaged or incomplete. Fetch it again; what is wrong says: "
        f"{check} {quote(str(path))}"
    )


_UNPACK: dict[str, Callable[[Path], Iterator[bytes]]] = {".gz": _gzip, ".zst": _zstd}
