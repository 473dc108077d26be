"""Files that were meant for another program: what they are, by their first bytes, and what to do.

A user who gives a PDF for a text, or a GGUF file for a checkpoint, is helped by its name and by the
way from there; that it "has a zero byte at offset 5" or "is damaged" is true and leads nowhere.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HEAD = 4096
"""Bytes from the beginning of a file that its format is recognized by."""
NO_TEXT = frozenset(
    f".{ending}"
    for endings in (
        "bin npy npz pt pth pkl ckpt safetensors gguf h5 onnx parquet arrow db sqlite pdf doc docx",
        "odt rtf epub zip gz bz2 xz zst 7z tar exe so pyc png jpg jpeg gif webp mp3 mp4 wav ogg",
        "ttf woff woff2",
    )
    for ending in endings.split()
)
"""Endings of files that no pattern should be suggested for."""


@dataclass(frozen=True)
class Kind:
    """A format, and how to come from a file of it to what TinyGPT reads; {} is the path, quoted."""

    name: str
    as_text: str = "Export its text as a UTF-8 file, and give that."
    as_model: str = "Give a checkpoint of TinyGPT's, or a run's folder."


PICKLE = Kind(
    "a checkpoint of PyTorch (a Python pickle, which can run code when it is opened)",
    "It holds weights, no text.",
    "TinyGPT reads safetensors only: docs/interop.md says how to convert one that you trust.",
)
GGUF = Kind(
    "a GGUF model, the format of llama.cpp",
    "It holds weights, no text.",
    "TinyGPT writes GGUF and does not read it: take the model it was made from, as safetensors "
    "(tinygpt import hf).",
)
COMPRESSED = Kind("a compressed file", "Unpack it first.", "Unpack it first.")
ZIP = Kind("a zip archive", "Unpack it first: unzip {}", "Unpack it first: unzip {}")
DOCUMENT = Kind("a document of an office program", "Save it as plain text, in UTF-8.")
PICTURE = Kind("a picture, not a text")
WEB_PAGE = Kind(
    "a web page",
    as_model="Perhaps the page about the file was downloaded in its place. Fetch the file itself.",
)
POINTER = Kind(
    "a pointer of Git LFS, which stands for a large file",
    "Fetch the file itself: git lfs pull",
    "Fetch the weights themselves: git lfs pull",
)
HDF5 = Kind(
    "an HDF5 file, as Keras writes",
    "It holds arrays, no text.",
    "Convert it to safetensors with the program that wrote it.",
)
PDF = Kind("a PDF document", "Extract its text first: pdftotext {}")
PARQUET = Kind(
    "a Parquet table",
    "Write its texts as JSONL, as pandas does: read_parquet(FILE).to_json('texts.jsonl', "
    "orient='records', lines=True)",
)
SAFETENSORS = Kind("a safetensors file", "It holds weights, no text.")

BEGINNINGS = {
    GGUF: (b"GGUF",),
    PDF: (b"%PDF",),
    PARQUET: (b"PAR1",),
    COMPRESSED: (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf"),
    HDF5: (b"\x89HDF",),
    DOCUMENT: (b"{\\rtf", b"\xd0\xcf\x11\xe0"),
    PICTURE: (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
    POINTER: (b"version https://git-lfs",),
    PICKLE: (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    Kind("an array of numpy", "Name it .npy, if it holds tokens."): (b"\x93NUMPY",),
    Kind("a database of SQLite"): (b"SQLite format 3",),
    Kind("a program"): (b"\x7fELF",),
}
INSIDE_ZIP = {
    b"data.pkl": PICKLE,
    b"[Content_Types].xml": DOCUMENT,
    b"word/": DOCUMENT,
    b"opendocument": DOCUMENT,
    b"epub+zip": Kind("an EPUB book", "Export its text first: pandoc -t plain -o book.txt {}"),
}


def recognize(head: bytes) -> Kind | None:
    """The format of a file that begins with ``head``, if it is known; ``HEAD`` bytes are enough."""
    for kind, beginnings in BEGINNINGS.items():
        if head.startswith(beginnings):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return next((kind for name, kind in INSIDE_ZIP.items() if name in head[:HEAD]), ZIP)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return SAFETENSORS
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return WEB_PAGE
    return None


def no_text(path: Path, head: bytes) -> str | None:
    """What to say of a file given for a text, or None if its format is not known."""
    kind = recognize(head)
    return f"{path} is {kind.name}. {_fill(kind.as_text, path)}" if kind else None


def no_model(path: Path, head: bytes) -> str | None:
    """What to say of a file given for a checkpoint or weights, or None likewise.

    None too for a safetensors file: their readers say more of one that is damaged.
    """
    kind = recognize(head)
    if kind is SAFETENSORS:
        return None
    return f"{path} is {kind.name}. {_fill(kind.as_model, path)}" if kind else None


def _fill(advice: str, path: Path) -> str:
    return advice.replace("{}", shlex.quote(str(path)))


def encoding_of(head: bytes) -> str | None:
    """The likely encoding of a text that is not UTF-8, by the name that iconv has for it."""
    try:
        from charset_normalizer import from_bytes  # it comes with requests
    except ImportError:
        return None
    best = from_bytes(head[:HEAD]).best()
    if best is None:
        return None
    with suppress(UnicodeDecodeError):  # of its many relatives this is the one that is met
        if head.decode("cp1252") == head.decode(best.encoding):
            return "WINDOWS-1252"
    name = best.encoding.upper().replace("_", "-").replace("EUC-JIS-2004", "EUC-JP")
    return name.replace("-BE", "BE").replace("-LE", "LE")
