"""A folder of token files as one sequence of tokens: shards of ours, or of other tools.

A folder that ``tinygpt tokenize`` wrote has an index, which says what each shard must be, and the
tokenizer. Of other folders (llm.c's ``fineweb_train_000001.bin``, nanoGPT's ``train.bin``,
datatrove's ``00000_shuffled.ds``) the token files at the top are taken in the order of their names,
and those with ``val`` in their names are held out for validation.

The shards of a folder follow one another: a window of block_size tokens may run over the border of
two shards, as it may over that of two documents, and no token is lost at a border.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.errors import DataError
from tinygpt.files.atomic import user_path
from tinygpt.files.strict_json import to_json
from tinygpt.text.hub_texts import fetch, is_on_hub, names_tokens
from tinygpt.text.joined import Joined
from tinygpt.text.token_files import TOKEN_FILES, Array, ds_metadata, map_file, sealed
from tinygpt.text.tokenizers import Tokenizer, fingerprint, load_tokenizer
from tinygpt.text.walk import find_texts, is_hidden
from tinygpt.untrusted import brief, clip, parse_json, read_bounded

INDEX, PLAN, TOKENIZER = "shards.json", "plan.json", "tokenizer.json"
"""Files of a folder that ``tinygpt tokenize`` writes: the last, the first, and the tokenizer."""
FORMAT = 1
"""Version of the index."""
MAX_INDEX = 64 << 20
"""Bytes of an index that are read at most."""
OPEN = 128
"""Shards that are mapped at a time: each holds a file open, and a process may have few."""
HELD_OUT = re.compile(r"(?:^|[^a-z])(?:val|valid|validation)(?:[^a-z]|$)")
"""Names of files that other tools keep for validation."""


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.npy"


# What is a source of tokens ---------------------------------------------------------------------


def is_tokens(source: str | Path, glob: str = "**/*.txt") -> bool:
    """Whether a source is a token file or a folder of them, by its name and what is in it.

    A folder with texts that match ``glob`` is one of texts, unless an index says otherwise.
    """
    path = user_path(source)
    try:
        if is_on_hub(source):
            return names_tokens(source)
        if not path.is_dir():
            return path.suffix in TOKEN_FILES
        if (path / INDEX).is_file() or (path / PLAN).is_file() or _is_token_glob(glob):
            return True
        if not any(path.suffix in TOKEN_FILES for path in path.iterdir()):
            return False
    except (OSError, ValueError):
        return False
    try:
        find_texts(path, glob)
    except DataError:
        return True
    return False


def _is_token_glob(glob: str) -> bool:
    return glob.endswith(TOKEN_FILES)


# Shards -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """What an index says of a shard."""

    tokens: int
    largest: int
    """Its largest id; -1 without tokens."""
    seal: str
    """Hash of its tokens, as its header has it."""


@dataclass(frozen=True)
class Index:
    """What is in a folder of shards of ours."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    dtype: str
    separator: str
    """What stands between documents: ``end``, the tokenizer's own token, or ``blank``, a line."""
    shards: tuple[Shard, ...]
    sources: tuple[str, ...]
    """What was read, in words."""

    def to_json(self) -> str:
        values = asdict(self)
        values["shards"] = [list(asdict(shard).values()) for shard in self.shards]
        return to_json({"format": FORMAT, **values}, indent=1, unicode=True)


class _Mapped:
    """Token files, mapped when they are needed; the last ``OPEN`` stay."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.open: OrderedDict[int, Array] = OrderedDict()

    def __getitem__(self, number: int) -> Array:
        if number in self.open:
            self.open.move_to_end(number)
        else:
            self.open[number] = map_file(self.paths[number])
            if len(self.open) > OPEN:
                self.open.popitem(last=False)
        return self.open[number]


@dataclass(frozen=True)
class _File:
    """One token file among others, as a part of the whole."""

    files: _Mapped
    number: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        return self.files[self.number][index]


class Shards(Joined):
    """The tokens of a folder of shards (n,); see ``open_shards``."""

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], dtype: Any, index: Index | None = None
    ) -> None:
        files = _Mapped(paths)
        parts = [_File(files, number, count) for number, count in enumerate(counts)]
        super().__init__(parts, np.dtype(dtype), None if index is None else index.vocab_size)
        self.index = index
        self.held_out: Shards | None = None
        """What the folder keeps for validation in files of its own."""

    def largest(self) -> int | None:
        """The largest id by the index, of all shards; None without one."""
        return None if self.index is None else max(s.largest for s in self.index.shards)

    def fingerprint(self) -> str | None:
        """SHA-256 of the hashes of the shards and of what is taken of them; None without an index.

        It needs no reading, and is another than that of the same ids in another folder's shards.
        """
        if self.index is None:
            return None
        seals = [shard.seal for shard in self.index.shards]
        taken = [[seals[p.number], a, b] for p, a, b in self.pieces() if isinstance(p, _File)]
        return hashlib.sha256(to_json(taken).encode()).hexdigest()


def open_shards(folder: str | Path, glob: str = "**/*.txt") -> Shards:
    """The tokens of a folder, each shard checked against the index and its own header.

    Raises DataError for a shard that is missing, cut off or of another folder, for files of
    different types, and for a folder without token files. ``glob`` chooses files where it names
    token files, such as ``*_train_*.bin``. An address of the hub names files, which are fetched.
    """
    if is_on_hub(folder):
        return _of_files(sorted(fetch(str(folder)).files, key=_by_numbers))
    path = user_path(folder)
    if (path / INDEX).is_file():
        return _indexed(path)
    if (path / PLAN).is_file():
        raise DataError(
            f"The tokens in {path} are not complete. Start the same tinygpt tokenize again: it "
            f"goes on where it stopped."
        )
    return _foreign(path, glob)


def own_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer that lies in a folder of shards of ours; None for every other source."""
    path = user_path(source)
    return load_tokenizer(path / TOKENIZER) if (path / INDEX).is_file() else None


def check_made_with(tokens: object, tokenizer: Tokenizer, name: str) -> None:
    """DataError if shards that have an index were made with another tokenizer."""
    index = tokens.index if isinstance(tokens, Shards) else None
    if index is not None and index.tokenizer != fingerprint(tokenizer):
        raise DataError(
            f"{name} was made with another tokenizer, of {index.vocab_size:,} tokens, than the "
            f"{tokenizer.kind} of {tokenizer.vocab_size:,} that is used here: its ids mean "
            f"something else. Leave --tokenizer out, or make the tokens of the text with this one."
        )


# With an index ----------------------------------------------------------------------------------


def read_index(folder: Path) -> Index:
    """The index of a folder of shards; DataError if it is damaged or of a newer version."""
    path = folder / INDEX
    try:
        values = parse_json(read_bounded(path, MAX_INDEX))
        version = values["format"]
        if version != FORMAT:
            raise DataError(
                f"{path} is an index of version {brief(version)}, and {FORMAT} can be read. Make "
                f"the tokens again with this version, or update it."
            )
        shards = tuple(_shard(entry) for entry in values["shards"])
        texts = (values["tokenizer"], values["dtype"], values["separator"])
        sources = tuple(map(str, values["sources"]))
        vocab_size = values["vocab_size"]
        if not all(isinstance(text, str) for text in texts) or type(vocab_size) is not int:
            raise ValueError("a field has the wrong type")
        if texts[1] not in ("uint16", "uint32"):
            raise ValueError(f"its type is {brief(texts[1])}")
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no index of shards, or damaged: {clip(error)}.") from error
    return Index(texts[0], vocab_size, texts[1], texts[2], shards, sources)


def _shard(entry: Any) -> Shard:
    tokens, largest, seal = entry
    if type(tokens) is not int or type(largest) is not int or not isinstance(seal, str):
        raise ValueError(f"a shard is {brief(entry)}")
    if not 0 <= tokens < 1 << 48 or not -1 <= largest < 1 << 32:
        raise ValueError(f"a shard is {brief(entry)}")
    return Shard(tokens, largest, seal)


def _indexed(folder: Path) -> Shards:
    index = read_index(folder)
    paths = [folder / shard_name(number) for number in range(len(index.shards))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{folder} lacks {missing[0]}{more} of its {len(paths)} shards. Copy what is missing, "
            f"or make it again: tinygpt tokenize with the same texts, and --out {folder}."
        )
    for path, shard in zip(paths, index.shards, strict=True):
        tokens = map_file(path)  # its size is what its header says
        if sealed(path) != shard.seal or tokens.shape != (shard.tokens,):
            raise DataError(
                f"{path} is not the shard that {INDEX} beside it lists: it is of another folder, "
                f"or was changed. Delete it, and start the same tinygpt tokenize again."
            )
    too_large = next((s for s in index.shards if s.largest >= index.vocab_size), None)
    if too_large is not None:
        raise DataError(
            f"{folder} has token id {too_large.largest}, beyond the {index.vocab_size} tokens of "
            f"the vocabulary that its own index states."
        )
    return Shards(paths, [shard.tokens for shard in index.shards], index.dtype, index)


# Of other tools ---------------------------------------------------------------------------------


def _foreign(folder: Path, glob: str) -> Shards:
    chosen = _is_token_glob(glob)
    paths = sorted(_token_files(folder, glob if chosen else None), key=_by_numbers)
    if not paths:
        matching = f" that match {glob!r}" if chosen else ""
        raise DataError(f"{folder} has no token files ({', '.join(TOKEN_FILES)}){matching}.")
    if not chosen:
        _check_gaps(paths)
    return _of_files(paths)


def _of_files(paths: Sequence[Path]) -> Shards:
    """The tokens of these files, one after another, without those that are for validation."""
    _check_tokenizers(paths)
    held = [path for path in paths if HELD_OUT.search(path.stem.lower())]
    if len(held) in (0, len(paths)):
        return _mapped(paths)
    shards = _mapped([path for path in paths if path not in held])
    shards.held_out = _mapped(held, shards.dtype)
    return shards


def _token_files(folder: Path, glob: str | None) -> Iterator[Path]:
    """Visible token files at the top of a folder."""
    pattern = None if glob is None else glob.rpartition("/")[2]
    for path in folder.iterdir():
        fits = pattern is None or fnmatchcase(path.name, pattern)
        if path.suffix in TOKEN_FILES and fits and not is_hidden(path.name) and path.is_file():
            yield path


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their values: ``x_2`` before ``x_10``."""
    words = re.findall(r"\d+|\D+", path.name)
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def _check_gaps(paths: Iterable[Path]) -> None:
    """DataError if numbered files skip a number: the rest would pass for the whole."""
    numbers: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for path in paths:
        if found := re.fullmatch(r"(.*?)(\d+)(\D*)", path.name):
            numbers[found[1], found[3]].append((int(found[2]), len(found[2])))
    for (before, after), found_numbers in numbers.items():
        for (one, _), (other, width) in itertools.pairwise(found_numbers):
            if other != one + 1:
                raise DataError(
                    f"{before}{one + 1:0{width}d}{after} is missing between its neighbours. Fetch "
                    f"it; or, if it is to be left out, name the files: --glob '{before}*{after}'."
                )


def _check_tokenizers(paths: Iterable[Path]) -> None:
    """DataError if datatrove says that its files come from different tokenizers."""
    first: tuple[Path, str] | None = None
    for path in paths:
        name = ds_metadata(path)[0] if path.suffix == ".ds" else None
        if name is None:
            continue
        first = first or (path, name)
        if name != first[1]:
            raise DataError(
                f"{path.name} was made with the tokenizer {brief(name)}, and {first[0].name} with "
                f"{brief(first[1])}. Put what belongs together into folders of their own."
            )


def _mapped(paths: Sequence[Path], dtype: Any = None) -> Shards:
    """The files as one sequence; DataError if their types differ, or one is empty of tokens."""
    counts = []
    for path in paths:
        tokens = map_file(path)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                f"{path} holds {tokens.dtype} in the shape {tokens.shape}, no token ids."
            )
        dtype = tokens.dtype if dtype is None else dtype
        if tokens.dtype != dtype:
            raise DataError(
                f"{path.name} holds {tokens.dtype}, and the files before it {dtype}: they come "
                f"from different tokenizers or tools. Put each kind into a folder of its own."
            )
        counts.append(len(tokens))
    return Shards(paths, counts, dtype)
