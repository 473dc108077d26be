"""Which files of a folder are its text, and what was left out, and why.

A folder is more than one sees: editors, notebooks and archives leave hidden copies in it, which
would be learned twice and leak into the validation part. It is also less: what may not be read, or
is a link that leads elsewhere. Whatever is left out is counted, with an example.
"""

from __future__ import annotations

import codecs
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from tinygpt.errors import DataError
from tinygpt.files.atomic import sha256_of
from tinygpt.untrusted import brief, open_regular
from tinygpt.untrusted.foreign import NO_TEXT

MAX_PATTERN, MAX_RECURSIONS = 200, 2
"""Length of a pattern for files, and how many ``**`` it may have."""
HIDDEN = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
"""What systems put into folders under a name that is not hidden everywhere."""
SNIFFED = 1 << 13
"""Bytes of a file in which a zero says that it is no text."""
UTF16_OR_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UNPACKED = (".parquet", ".gz", ".zst")
"""Endings of files that are no text themselves, and are read as texts."""
SHOWN = 60
"""Characters of an example's path."""

REASONS = {
    "hidden": ("hidden file", "hidden files"),
    "copy": ("copy of another", "copies of others"),
    "binary": ("binary file", "binary files"),
    "unreadable": ("file that may not be read", "files that may not be read"),
    "closed": ("folder that may not be entered", "folders that may not be entered"),
    "broken": ("broken link", "broken links"),
    "elsewhere": ("link that leads out of the folder", "links that lead out of the folder"),
    "special": ("that is no ordinary file", "that are no ordinary files"),
}
"""Why something was left out, for one and for several."""


@dataclass
class Found:
    """The files of a folder that match a pattern, in the order of their paths."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    """By the reason."""
    others: Counter[str] = field(default_factory=Counter)
    """The endings of visible files that do not match."""

    @property
    def left_out_text(self) -> str:
        """Such as ``; left out: 3 hidden files (.git/x.txt, …)``; empty if nothing was."""
        parts = [
            f"{len(paths)} {REASONS[reason][len(paths) > 1]} ({_example(paths)})"
            for reason, paths in sorted(self.left_out.items())
        ]
        return f"; left out: {', '.join(parts)}" if parts else ""


def find_texts(folder: Path, glob: str) -> Found:
    """The files below a folder that match ``glob``. Raises DataError for a pattern that is none.

    ``*`` and ``**`` stand for visible names only: what is hidden must be named, as in
    ``**/.notes/*.txt``. Of several files with the same content the first one counts. A link to a
    folder is not followed.
    """
    pattern = _checked(glob)
    found = _Walk(folder, pattern).found
    for paths in (found.files, *found.left_out.values()):
        paths.sort()
    _sort_out(found, folder)
    if not found.files:
        raise DataError(_no_match(folder, glob, found))
    return found


def is_hidden(name: str) -> bool:
    """Whether a name is one that people do not see, or that an editor keeps a copy under.

    >>> [is_hidden(name) for name in (".git", "._a.txt", "a.txt~", "~$a.txt", "__MACOSX", "a.txt")]
    [True, True, True, True, True, False]
    """
    of_editor = name.endswith("~") or (name.startswith("#") and name.endswith("#"))
    return name.startswith((".", "~$")) or of_editor or name.lower() in HIDDEN


def _checked(glob: str) -> tuple[str, ...]:
    """A pattern may come with a config file from elsewhere, and must not lead out of the folder."""
    path = PurePath(glob)
    parts = path.parts
    leaves = ".." in parts or path.is_absolute() or not parts
    partial = any("**" in part and part != "**" for part in parts)
    too_much = len(glob) > MAX_PATTERN or parts.count("**") > MAX_RECURSIONS
    if leaves or partial or too_much or "\0" in glob:
        raise DataError(
            f"glob={brief(glob)} is no pattern for files in a folder: wanted at most "
            f"{MAX_PATTERN} characters, two ** that are whole names and no '..', such as '**/*.md'."
        )
    return parts


# Walking ----------------------------------------------------------------------------------------


class _Walk:
    """Goes through a folder, and sorts what is in it by the pattern and by what is hidden."""

    def __init__(self, root: Path, pattern: tuple[str, ...]) -> None:
        self.root, self.pattern, self.found = root, pattern, Found()
        waiting = [PurePath()]
        while waiting:
            below = waiting.pop()
            for entry in self._listed(below):
                place = below / entry.name
                if not entry.is_dir(follow_symlinks=False):
                    self._judge(entry, place)
                elif fits(place.parts, pattern, hidden=True, begins=True):
                    waiting.append(place)

    def _listed(self, below: PurePath) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / below) as entries:
                return list(entries)
        except PermissionError as error:
            if not below.parts:
                may = f"Allow it: chmod u+rx {self.root}"
                raise DataError(f"{self.root} may not be entered. {may}") from error
            if fits(below.parts, self.pattern, begins=True):
                self._leave_out("closed", below)
            return []

    def _judge(self, entry: os.DirEntry[str], place: PurePath) -> None:
        """One thing that is no folder, but perhaps a link to one."""
        kind, path, parts = self._kind(entry), self.root / place, place.parts
        wanted = fits(parts, self.pattern)
        could = fits(parts, self.pattern, begins=True)
        if kind == "file" and wanted:
            self.found.files.append(path)
        elif kind == "file" and fits(parts, self.pattern, hidden=True):
            self._leave_out("hidden", place)
        elif kind == "file" and not any(map(is_hidden, parts)):
            self.found.others[path.suffix] += 1
        elif kind == "outer folder" and could:
            self._leave_out("elsewhere", place)
        elif (kind == "broken" and (wanted or could)) or (kind in REASONS and wanted):
            self._leave_out(kind, place)

    def _kind(self, entry: os.DirEntry[str]) -> str:
        """What a thing, or the target of a link, is, and whether a link stays within the root."""
        if not entry.is_symlink():
            return "file" if entry.is_file() else "special"
        try:
            inside = Path(entry).resolve(strict=True).is_relative_to(self.root.resolve())
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except PermissionError:
            return "elsewhere"
        except (OSError, RuntimeError):  # the second: of links that lead to each other
            return "broken"
        if is_folder:  # what a link to a folder inside leads to is read at its own place
            return "inner folder" if inside else "outer folder"
        return "elsewhere" if not inside else "file" if is_file else "special"

    def _leave_out(self, reason: str, place: PurePath) -> None:
        self.found.left_out[reason].append(self.root / place)


def fits(
    names: tuple[str, ...], pattern: tuple[str, ...], hidden: bool = False, begins: bool = False
) -> bool:
    """Whether the names of a path match a pattern, or with ``begins`` those of a path below could.

    Wildcards match what is hidden only with ``hidden``; ``**`` stands for no folder too.
    """
    if not names:
        return bool(pattern) if begins else all(part == "**" for part in pattern)
    if not pattern:
        return False
    (name, *_), (part, *_) = names, pattern
    seen = hidden or not is_hidden(name)
    if part == "**":
        further = seen and fits(names[1:], pattern, hidden, begins)
        return further or fits(names, pattern[1:], hidden, begins)
    matches = fnmatchcase(name, part) and (seen or is_hidden(part))
    return matches and fits(names[1:], pattern[1:], hidden, begins)


# Looking into them ------------------------------------------------------------------------------


def _sort_out(found: Found, folder: Path) -> None:
    """Leave out what is no text, what may not be read, and what was there already."""
    kept, seen = [], set()
    sizes = {path: _readable_size(path) for path in found.files}
    counts = Counter(sizes.values())
    for path, size in sizes.items():
        binary = path.suffix.lower() not in UNPACKED and size is not None and _is_binary(path)
        reason = "unreadable" if size is None else "binary" if binary else None
        if reason is None and size and counts[size] > 1:
            digest = sha256_of(path)
            reason = "copy" if digest in seen else None
            seen.add(digest)
        if reason is None:
            kept.append(path)
        else:
            found.left_out[reason].append(path)
    found.files[:] = kept
    for reason, paths in found.left_out.items():
        found.left_out[reason] = [path.relative_to(folder) for path in paths]


def _readable_size(path: Path) -> int | None:
    """Bytes of a file; None if it may not be read."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size
    except PermissionError:
        return None


def _is_binary(path: Path) -> bool:
    with open_regular(path) as file:
        begin = file.read(SNIFFED)
    return b"\0" in begin and not begin.startswith(UTF16_OR_32)


# Saying it --------------------------------------------------------------------------------------


def _example(paths: list[Path]) -> str:
    text = brief(str(paths[0]), SHOWN).strip("'\"")
    return f"{text}, …" if len(paths) > 1 else text


def _no_match(folder: Path, glob: str, found: Found) -> str:
    left = found.left_out_text
    message = f"No file in {folder} matches {glob!r}{left}."
    if found.left_out.get("hidden"):
        example = found.left_out["hidden"][0]
        return f"{message} What is hidden has to be named, as in '{_naming(example)}'."
    there = Counter({suffix: n for suffix, n in found.others.items() if suffix})
    if there:
        listed = ", ".join(f"{n} {suffix}" for suffix, n in there.most_common(5))
        message = f"{message} It has {listed}."
    no_text = NO_TEXT - set(UNPACKED)
    readable = [suffix for suffix, _ in there.most_common() if suffix.lower() not in no_text]
    if readable:
        return f"{message} To read {readable[0]} files, give the pattern '**/*{readable[0]}'."
    binary = {path.suffix for path in found.left_out.get("binary", [])}
    tokens = {".bin", ".npy"} & {*there, *binary}
    return f"{message} A file of tokens is given by its own name." if tokens else message


def _naming(path: Path) -> str:
    """A pattern that lets a hidden path in.

    >>> _naming(Path("a/.notes/b.txt")), _naming(Path("a/._b.txt"))
    ('a/.notes/**/*.txt', 'a/.*.txt')
    """
    parts = list(path.parts)
    at = next(i for i, part in enumerate(parts) if is_hidden(part))
    if at < len(parts) - 1:
        return "/".join([*parts[: at + 1], "**", f"*{path.suffix}"])
    return "/".join([*parts[:at], f".*{path.suffix}" if path.name.startswith(".") else path.name])
