"""Tokens on disk, and batches of them: text is tokenized once, and a batch is a pure function."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinygpt.errors import DataError
from tinygpt.files.atomic import replacing, user_path
from tinygpt.files.folders import keep_limit, token_folders
from tinygpt.text.chat.packing import Conversations
from tinygpt.text.corpus import Corpus
from tinygpt.text.hub_texts import is_on_hub
from tinygpt.text.joined import Joined
from tinygpt.text.mix import Mix
from tinygpt.text.shards import Shards, open_shards
from tinygpt.text.token_files import Array, map_file, sealed, write_header
from tinygpt.text.tokenizers import (
    Tokenizer,
    chunks,
    document_end,
    ends_of,
    fingerprint,
    special_of,
)

log = logging.getLogger(__name__)

Tokens = Array | Joined
"""A 1-D sequence of token ids: an array in any integer type, mostly a memory-mapped file, or files
that are read as one."""
SPAN = 1 << 22
"""Tokens looked at in one go, where all have to be looked at."""
COUNTED = 1 << 28
"""Tokens of which the bytes are counted at most, to know how many a token has."""


PARTED = b"\xff"
"""Stands for the end of a document in the hash of a text; UTF-8 has no such byte."""


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
        parts = [ids for _, ids in encoded(corpus, tokenizer)]
        dtype = token_type(tokenizer)
        joined = np.concatenate([part.astype(dtype) for part in parts] or [np.zeros(0, dtype)])
        return load_tokens(joined, vocab_size)


def _cached(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None = None) -> Path:
    """The token file, found or made. Raises OSError where no folder can be written."""
    content = _content(corpus, tokenizer)
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
        tokens = map_file(path)
    except DataError:
        return False
    return tokens.ndim == 1 and sealed(path) == _seal(tokens)


def _seal(tokens: Tokens) -> str:
    digest = hashlib.sha256()
    for span in spans(tokens):
        digest.update(span.tobytes())
    return digest.hexdigest()[:32]


def _write_tokens(file: BinaryIO, corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Write the .npy and return the fingerprint of the text that went in."""
    dtype = token_type(tokenizer)
    digest, seal, count = hashlib.sha256(), hashlib.sha256(), 0
    write_header(file, dtype, count)
    for chunk, ids in encoded(corpus, tokenizer):
        digest.update(chunk)
        count += len(ids)
        written = ids.astype(dtype).tobytes()
        seal.update(written)
        file.write(written)
    file.seek(0)
    write_header(file, dtype, count, seal.hexdigest()[:32])
    return digest.hexdigest()


def encoded(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[bytes, Array]]:
    """The ids of a text in pieces, each with the bytes of text that it stands for.

    Behind each of several documents stands the token that ends one, where the vocabulary has it;
    with it comes `PARTED`.
    """
    end = document_end(tokenizer)
    if corpus.documents is None or end is None:
        for chunk in chunks(corpus.pieces()):
            yield chunk.encode(), encode(tokenizer, chunk)
        return
    pieces = corpus.parted()
    for first in pieces:  # of each document
        rest = iter(lambda: next(pieces, None), None)
        for chunk in chunks(chain([first or ""], rest)):
            yield chunk.encode(), encode(tokenizer, chunk)
        yield PARTED, np.array([end])


def _content(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """SHA-256 of what ``encoded`` reads."""
    if corpus.documents is None or document_end(tokenizer) is None:
        return corpus.fingerprint()
    digest = hashlib.sha256()
    for piece in corpus.parted():
        digest.update(PARTED if piece is None else piece.encode())
    return digest.hexdigest()


def token_type(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encode(tokenizer: Tokenizer, text: str) -> Array:
    """Through ``encode_array`` where the tokenizer has it: no list of a million Python numbers."""
    encode = getattr(tokenizer, "encode_array", tokenizer.encode)
    return np.asarray(encode(text))


def load_tokens(source: object, vocab_size: int | None = None, *, glob: str = "**/*.txt") -> Tokens:
    """Tokens from an integer array, list or Tensor, or memory-mapped from the path of a token file
    or of a folder of them, or from the hub.

    Returns a 1-D sequence of integers (n,): an array, and of a folder its ``Shards``, in which
    ``glob`` chooses files if it names token files. Every id is checked to be from 0 up to, not
    including, ``vocab_size``, in bounded memory; of shards that have an index, by the index. Raises
    DataError that names the first wrong id and its place.
    """
    tokens: Tokens
    if isinstance(source, Joined):
        tokens, name = source, "The data"
    elif isinstance(source, str | Path):
        path, name = user_path(source), str(source)
        several = is_on_hub(source) or path.is_dir()
        tokens = open_shards(source, glob) if several else map_file(path)
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
    for part in (tokens, getattr(tokens, "held_out", None)):
        if part is not None:
            _check_range(part, vocab_size, name)
    return tokens


def _as_array(source: object) -> Array:
    convert = getattr(source, "numpy", None)  # a Tensor
    try:
        return np.asarray(convert() if callable(convert) else source)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"The data is no sequence of token ids: {error}.") from error


def spans(tokens: Tokens) -> Iterator[Array]:
    """All tokens in arrays of bounded size."""
    for start in range(0, len(tokens), SPAN):
        yield np.asarray(tokens[start : start + SPAN])


def _check_range(tokens: Tokens, vocab_size: int | None, name: str) -> None:
    limit = 1 << 31 if vocab_size is None else vocab_size  # batches are int32
    known = tokens.largest() if isinstance(tokens, Shards) else None
    if known is not None and known < limit:
        return
    start = 0
    for span in spans(tokens):
        if span.min() < 0 or span.max() >= limit:
            at = int(np.argmax((span < 0) | (span >= limit)))
            raise DataError(
                f"{name}: token id {span[at]} at position {start + at} is out of range: with "
                f"vocab_size={limit} ids run from 0 to {limit - 1}. Give the model the vocab_size "
                f"of the tokenizer that made these tokens."
            )
        start += len(span)


def largest(tokens: Tokens) -> int:
    """The largest id, or for shards with an index, that of the whole folder."""
    known = tokens.largest() if isinstance(tokens, Shards) else None
    return max(int(span.max()) for span in spans(tokens)) if known is None else known


def data_fingerprint(tokens: Tokens) -> str:
    """SHA-256 of the ids, the same whatever their integer type; read in bounded memory.

    Of shards that have an index it is one of their hashes, which need not be read.
    """
    if isinstance(tokens, Mix):
        return tokens.fingerprint_of([data_fingerprint(part) for part in tokens.sources.values()])
    known = tokens.fingerprint() if isinstance(tokens, Shards) else None
    if known is not None:
        return known
    digest = hashlib.sha256()
    for span in spans(tokens):
        digest.update(span.astype("<u4").tobytes())
    if isinstance(tokens, Conversations):  # what is learned of them, and where each ends
        digest.update(tokens.counted.tobytes() + tokens.ended.tobytes())
    return digest.hexdigest()


def bytes_per_token(tokens: Tokens, tokenizer: Tokenizer) -> float | None:
    """Bytes of UTF-8 for each token that is predicted, which is all but the first.

    A loss of n nats per token is n / (ln 2 · bytes per token) bits per byte. None where the tokens
    stand for no text, or for none that this tokenizer knows. Of more than ``COUNTED`` tokens only
    so many, in spans evenly spread, are looked at. Of a mix it is the mean, by the shares. Of
    conversations the answers alone are predicted.
    """
    if isinstance(tokens, Mix):
        each = [bytes_per_token(part, tokenizer) for part in tokens.sources.values()]
        known = [(float(s), b) for s, b in zip(tokens.shares.values(), each, strict=True) if b]
        return sum(s * b for s, b in known) if len(known) == len(each) else None
    if isinstance(tokens, Conversations):
        counted: Tokens = tokens.ids[tokens.counted]
        return byte_count(counted, tokenizer) / len(counted) or None if len(counted) else None
    counted = _sample(tokens[1:], COUNTED)
    if len(tokens) < 2 or largest(counted) >= tokenizer.vocab_size:
        return None
    return byte_count(counted, tokenizer) / len(counted) or None


def _sample(tokens: Tokens, most: int) -> Tokens:
    """All of the tokens, or at most ``most`` of them in spans evenly spread."""
    if len(tokens) <= most:
        return tokens
    count = most // SPAN
    starts = [(len(tokens) - SPAN) * i // (count - 1) for i in range(count)]
    return Joined([tokens[start : start + SPAN] for start in starts], tokens.dtype)


def byte_count(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that the tokens stand for, as bits per byte need it.

    Special tokens, such as ``<|endoftext|>``, and what ends a text stand for none.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)  # (V,)
    for span in spans(tokens):
        # of uint64 nothing can be counted
        counts += np.bincount(span.astype(np.int64), minlength=len(counts))
    counts[list({*ends_of(tokenizer), *special_of(tokenizer).values()})] = 0
    used = np.flatnonzero(counts).tolist()
    return sum(int(counts[i]) * len(tokenizer.decode_bytes([i])) for i in used)
