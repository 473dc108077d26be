"""The texts that the learning benchmark reads: English verse, English prose, code, Chinese.

Each is a plain text that an ordinary machine has or can have: nothing is downloaded from a place
that is not a package registry, but for tiny Shakespeare, which the product itself fetches.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinygpt.errors import DataError
from tinygpt.text.corpus import open_corpus

FORTUNES = Path("/usr/share/games/fortunes/chinese")
"""Where Debian's package fortunes-zh has its sayings, verses and articles."""
HAN = re.compile("[一-鿿]")
QUOTED = 9
"""Characters of a line up to which it may stand in two entries of ``chinese``."""
STYLING = re.compile("\x1b\\[[0-9;]*m")
"""Escape sequences that colour a terminal."""


class MissingError(Exception):
    """A text that is not on this machine, and how to get it."""


@dataclass(frozen=True)
class Text:
    """A text, and where its last tenth begins, which no side trains on."""

    name: str
    text: str

    @property
    def cut(self) -> int:
        """The first character of the held-out part."""
        return int(len(self.text) * 0.9)


def corpus(source: str) -> Callable[[Path | None], str]:
    """A text that the product knows by name, or that lies elsewhere."""

    def read(path: Path | None) -> str:
        try:
            return "".join(open_corpus(path or source).pieces())
        except DataError as error:
            raise MissingError(f"{error} Or give its path: {source}=FILE") from None

    return read


def code(path: Path | None) -> str:
    """The modules at the top of Python's standard library, 4.7 MB in Python 3.11."""
    folder = path or Path(sysconfig.get_path("stdlib"))
    return "\n".join(file.read_text("utf-8") for file in sorted(folder.glob("*.py")))


def chinese(path: Path | None) -> str:
    """The entries of fortunes-zh that are Chinese for the most part, 0.7 MB.

    They are shuffled, since the package has them by kind: the last tenth is then of all kinds. Of
    entries that share a line, such as a poem and a quotation from it, one is kept.
    """
    path = path or FORTUNES
    if not path.is_file():
        raise MissingError(
            f"{path} is missing: apt-get install fortunes-zh, or without root apt-get download "
            f"fortunes-zh && dpkg -x fortunes-zh_*.deb DIR, and chinese=DIR{FORTUNES}"
        )
    entries = STYLING.sub("", path.read_text("utf-8")).split("\n%\n")
    found = sorted({e.strip() for e in entries if len(HAN.findall(e)) > len(e) / 2})
    random.Random(0).shuffle(found)
    kept, seen = [], set[str]()
    for entry in found:
        lines = {line.strip() for line in entry.splitlines() if len(line.strip()) > QUOTED}
        if not lines & seen:
            kept.append(entry)
        seen |= lines
    return "\n\n".join(kept) + "\n"


READERS = {
    "shakespeare": corpus("shakespeare"),
    "pydocs": corpus("pydocs"),
    "code": code,
    "chinese": chinese,
}


def read(word: str) -> Text:
    """``NAME``, ``NAME=PATH`` for one that lies elsewhere, or the path of any other text."""
    name, _, path = word.partition("=")
    if name in READERS:
        return Text(name, READERS[name](Path(path) if path else None))
    return Text(Path(word).stem, corpus(word)(Path(word)))
