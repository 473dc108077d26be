"""Tokens on disk, and batches of them: text is tokenized once, and a batch is a pure function."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tinygpt.errors import DataError
from tinygpt.files.atomic import replacing, user_path
from tinygpt.files.folders import keep_limit, token_folders
from tinygpt.text.corpus import Corpus
from tinygpt.text.tokenizers import Tokenizer, chunks, fingerprint
from tinygpt.untrusted import clip, open_regular

log = logging.getLogger(__name__)

Tokens = NDArray[Any]
"""A 1-D array of token ids in any integer type; mostly a memory-mapped file."""
TOKEN_FILES = (".npy", ".bin")
"""Suffixes of token files: ours, and those that nanoGPT and llm.c write."""
LLMC_HEADER = 256 * 4
"""Bytes of the header that llm.c puts before its tokens: 256 int32."""
LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Its magic numbers, each with its version and the type of the tokens. As the first two tokens of a
raw file, which has none, they would be 55448 or 55729, beyond GPT-2's vocabulary, and 308."""
SPAN = 1 << 22
"""Tokens looked at in one go, where all have to be looked at."""
MAX_NPY_HEADER = 4096
"""Bytes of a .npy file's header that are read at most; numpy writes 128."""
_NPY_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=][biufc]\d{1,2})', 'fortran_order': (?:False|True), "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\),? *\} *(?:# [0-9a-f]{32})?\n?"
)
"""The one way in which numpy writes a header; no Python expression is ever evaluated."""
NPY_HEADER = 128
"""Bytes of the header of a token file that ``tokenize`` has made."""
_SEAL = re.compile(rb"# ([0-9a-f]{32})\n$")
"""The hash of its tokens, at the header's end."""


# Token files ------------------------------------------------------------------------------------


def tokenize(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None = None) -> Path:
    """The token file of this text under this tokenizer, made unless it is there already.

    A .npy file, uint16 where the vocabulary allows and else uint32, named by the contents of both,
    in ``cache_dir`` (by default ``tokens`` in the user's cache folder, where those that were not
    used for longest make room). It is written in bounded memory, appears whole or not at all, and
    is made again if a byte of it has changed. Raises DataError, and TokenizerError for text that
    the tokenizer cannot hold.
    """
    try:
        return _cached(corpus, tokenizer, cache_dir)
    except OSError as error:
        where = f"{error.filename} could not be written: " if error.filename else ""
        raise DataError(
            f"There is no room for the tokens of {corpus.description}. {where}{error.strerror}. "
            f"Set TINYGPT_CACHE to a folder with room."
        ) from error


def tokens_of(corpus: Corpus, tokenizer: Tokenizer, vocab_size: int | None = None) -> Tokens:
    """The tokens of a text (n,), memory-mapped; in memory where no token file can be written."""
    try:
        return load_tokens(_cached(corpus, tokenizer), vocab_size)
    except OSError as error:
        log.warning("No token file can be written (%s), so the tokens stay in memory.", error)
        parts = [_encode(tokenizer, chunk) for chunk in chunks(corpus.pieces())]
        dtype = _token_type(tokenizer)
        joined = np.concatenate([part.astype(dtype) for part in parts] or [np.zeros(0, dtype)])
        return load_tokens(joined, vocab_size)


def _cached(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None = None) -> Path:
    """The token file, found or made. Raises OSError where no folder can be written."""
    content = corpus.fingerprint()
    key = hashlib.sha256(f"1 {content} {fingerprint(tokenizer)}".encode()).hexdigest()[:24]
    name = re.sub(r"[^A-Za-z0-9]+", "-", corpus.name)[:40].strip("-") or "text"
    failure: OSError | None = None
    for folder in token_folders() if cache_dir is None else [cache_dir]:
        path = folder / f"{name}-{key}.npy"
        if _is_complete(path):
            with suppress(OSError):  # the time of its last use: see folders.keep_limit
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            return path
        try:
            with replacing(path) as file:
                if _write_tokens(file, corpus, tokenizer) != content:
                    raise DataError(f"{corpus.description} changed while it was read. Try again.")
        except OSError as error:
            failure = error
            continue
        if cache_dir is None:
            keep_limit(folder, path)
        return path
    assert failure is not None, "there is at least one folder"
    raise failure


def _is_complete(path: Path) -> bool:
    """Whether a token file is one of ours, and as it was written."""
    try:
        tokens = _map_file(path)
        with path.open("rb") as file:
            sealed = _SEAL.search(file.read(NPY_HEADER))
    except (DataError, OSError):
        return False
    return tokens.ndim == 1 and sealed is not None and sealed[1].decode() == _seal(tokens)


def _seal(tokens: Tokens) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(tokens), SPAN):
        digest.update(tokens[start : start + SPAN].tobytes())
    return digest.hexdigest()[:32]


def _write_tokens(file: BinaryIO, corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Write the .npy and return the fingerprint of the text that went in."""
    dtype = _token_type(tokenizer)
    digest, seal, count = hashlib.sha256(), hashlib.sha256(), 0
    _write_header(file, dtype, count)
    for chunk in chunks(corpus.pieces()):
        digest.update(chunk.encode())
        ids = _encode(tokenizer, chunk)
        count += len(ids)
        written = ids.astype(dtype).tobytes()
        seal.update(written)
        file.write(written)
    file.seek(0)
    _write_header(file, dtype, count, seal.hexdigest()[:32])
    return digest.hexdigest()


def _token_type(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _write_header(file: BinaryIO, dtype: np.dtype[Any], count: int, seal: str = "") -> None:
    """Write the header of a .npy, which ends in the hash of the tokens: to numpy, a comment.

    It is always as long: the format leaves room for the count.
    """
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    whole = io.BytesIO()
    npy.write_array_header_1_0(whole, header)
    end = f"# {seal}\n".encode()
    text = whole.getvalue()[: -len(end)] + end if seal else whole.getvalue()
    assert len(text) == NPY_HEADER
    file.write(text)


def _encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """Through ``encode_array`` where the tokenizer has it: no list of a million Python numbers."""
    encode = getattr(tokenizer, "encode_array", tokenizer.encode)
    return np.asarray(encode(text))


def load_tokens(source: object, vocab_size: int | None = None) -> Tokens:
    """Tokens from an integer array, list, Tensor, or the path of a token file (memory-mapped).

    Returns a 1-D integer array (n,). Every id is checked to be from 0 up to, not including,
    ``vocab_size``, in bounded memory. Raises DataError that names the first wrong id and its place.
    """
    if isinstance(source, str | Path):
        tokens, name = _map_file(user_path(source)), str(source)
    else:
        tokens, name = _as_array(source), "The data"
    if tokens.ndim != 1:
        raise DataError(
            f"{name}: tokens of shape {tokens.shape}; wanted one flat sequence (n,). "
            f"If the rows follow one another in the text, give tokens.reshape(-1)."
        )
    if not len(tokens):
        raise DataError(f"{name}: there are no tokens in it.")
    if tokens.dtype.kind not in "iu":
        raise DataError(
            f"{name}: values of type {tokens.dtype} are not token ids; wanted whole numbers, such "
            f"as tokenizer.encode(text) gives."
        )
    _check_range(tokens, vocab_size, name)
    return tokens


def _as_array(source: object) -> Tokens:
    convert = getattr(source, "numpy", None)  # a Tensor
    try:
        return np.asarray(convert() if callable(convert) else source)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"The data is no sequence of token ids: {error}.") from error


def _map_file(path: Path) -> Tokens:
    if path.suffix not in TOKEN_FILES:
        raise DataError(
            f"{path} is no token file (.npy, or .bin as of nanoGPT or llm.c). Text is tokenized "
            f"first: tokenize(open_corpus(path), tokenizer)."
        )
    try:
        with open_regular(path) as file:
            return _map_npy(file) if path.suffix == ".npy" else _map_bin(file)
    except FileNotFoundError as error:
        raise DataError(f"There is no token file {str(path)!r}.") from error
    except DataError:
        raise
    except (OSError, ValueError, TypeError) as error:
        reason = clip(getattr(error, "strerror", None) or error)
        raise DataError(f"{path} cannot be read as a token file: {reason}.") from error


def _map_bin(file: BinaryIO) -> Tokens:
    """llm.c's token file if it begins with a magic number of these, else nanoGPT's raw uint16."""
    size = os.fstat(file.fileno()).st_size
    header = np.frombuffer(file.read(min(LLMC_HEADER, size) // 4 * 4), "<i4")
    if len(header) and int(header[0]) in LLMC:
        return _map_llmc(file, size, header)
    if size % 2 or not size:
        raise DataError(f"{file.name} has {size} bytes, wanted a number of uint16 tokens.")
    return np.memmap(file, "<u2", "r")


def _map_llmc(file: BinaryIO, size: int, header: NDArray[np.int32]) -> Tokens:
    if size < LLMC_HEADER:
        raise DataError(f"{file.name} ends within the header of llm.c, after {size} bytes.")
    magic, version, count = map(int, header[:3])
    wanted, dtype = LLMC[magic]
    if version != wanted:
        raise DataError(
            f"{file.name} is a token file of llm.c in version {version}; of those with its magic "
            f"number, {magic}, version {wanted} can be read."
        )
    length = LLMC_HEADER + count * np.dtype(dtype).itemsize
    if count < 0 or length != size:
        raise DataError(
            f"{file.name} is damaged or incomplete: its header announces {count:,} tokens, which "
            f"would make {length:,} bytes, and it has {size:,}."
        )
    return np.memmap(file, dtype, "r", LLMC_HEADER, (count,)) if count else np.zeros(0, dtype)


def _map_npy(file: BinaryIO) -> Tokens:
    """Map a .npy file after checking that it is as long as its header says.

    numpy's own reader evaluates the header as Python, and takes its length from the file.
    """
    version = npy.read_magic(file)
    if version not in _NPY_LENGTH_BYTES:
        raise ValueError(f"its format version {version} is unknown")
    width = _NPY_LENGTH_BYTES[version]
    length = int.from_bytes(file.read(width), "little")
    if length > MAX_NPY_HEADER:
        raise ValueError(f"its header of {length:,} bytes is too long")
    found = _NPY_HEADER.fullmatch(file.read(length).decode("latin-1"))
    if found is None:
        raise ValueError("its header is damaged, or it does not hold plain numbers")
    dtype = np.dtype(found[1])
    shape = tuple(int(n) for n in found[2].split(",") if n.strip())  # (n,)
    start = file.tell()
    wanted = start + math.prod(shape) * dtype.itemsize
    size = os.fstat(file.fileno()).st_size
    if wanted != size:
        raise ValueError(f"it has {size:,} bytes, but its header announces {wanted:,}")
    if not math.prod(shape):
        return np.zeros(shape, dtype)  # nothing can be mapped
    return np.memmap(file, dtype, "r", start, shape)


def _check_range(tokens: Tokens, vocab_size: int | None, name: str) -> None:
    limit = 1 << 31 if vocab_size is None else vocab_size  # batches are int32
    for start in range(0, len(tokens), SPAN):
        span = tokens[start : start + SPAN]
        if span.min() < 0 or span.max() >= limit:
            at = int(np.argmax((span < 0) | (span >= limit)))
            raise DataError(
                f"{name}: token id {span[at]} at position {start + at} is out of range: with "
                f"vocab_size={limit} ids run from 0 to {limit - 1}. Give the model the vocab_size "
                f"of the tokenizer that made these tokens."
            )


def data_fingerprint(tokens: Tokens) -> str:
    """SHA-256 of the ids, the same whatever their integer type; read in bounded memory."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), SPAN):
        digest.update(tokens[start : start + SPAN].astype("<u4").tobytes())
    return digest.hexdigest()


def bytes_per_token(tokens: Tokens, tokenizer: Tokenizer) -> float | None:
    """Bytes of UTF-8 for each token that is predicted, which is all but the first.

    A loss of n nats per token is n / (ln 2 · bytes per token) bits per byte. None where the tokens
    stand for no text, or for none that this tokenizer knows.
    """
    if len(tokens) < 2 or tokens.max() >= tokenizer.vocab_size:
        return None
    return byte_count(tokens[1:], tokenizer) / (len(tokens) - 1) or None


def byte_count(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that the tokens stand for, as bits per byte need it."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)  # (V,)
    for start in range(0, len(tokens), SPAN):
        span = tokens[start : start + SPAN].astype(np.int64)  # of uint64 nothing can be counted
        counts += np.bincount(span, minlength=len(counts))
    used = np.flatnonzero(counts).tolist()
    return sum(int(counts[i]) * len(tokenizer.decode_bytes([i])) for i in used)
