"""Which files of a folder are read, and that what is not is counted and said."""

from __future__ import annotations

import doctest
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt.cli.options import DataConfig, resolve
from tinygpt.cli.running import gather
from tinygpt.errors import DataError
from tinygpt.text import walk
from tinygpt.text.corpus import open_corpus
from tinygpt.text.walk import find_texts


def fill(folder: Path, *names: str) -> Path:
    """Files whose content is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def read(folder: Path, glob: str = "**/*.txt") -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_texts(folder, glob).files]


def left_out(folder: Path, glob: str = "**/*.txt") -> dict[str, list[str]]:
    found = find_texts(folder, glob).left_out
    return {reason: [path.as_posix() for path in paths] for reason, paths in found.items()}


HIDDEN = [
    ".a.txt",
    "._a.txt",
    ".git/a.txt",
    ".ipynb_checkpoints/a-checkpoint.txt",
    "__MACOSX/a.txt",
    "__MACOSX/._a.txt",
    "b/.trash/deep/a.txt",
    "b/~$a.txt",
    "$RECYCLE.BIN/a.txt",
    "#a.txt#",
    "a.txt~",
    "Thumbs.db",
    "b/desktop.ini",
    ".DS_Store",
]


def test_what_is_hidden_is_not_read_and_is_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b/c.txt", "d.md", *HIDDEN)
    assert read(tmp_path) == ["a.txt", "b/c.txt"]
    texts = sorted(name for name in HIDDEN if name.endswith(".txt"))
    assert sorted(left_out(tmp_path)["hidden"]) == texts
    assert read(tmp_path, "**/*") == ["a.txt", "b/c.txt", "d.md"]
    assert sorted(left_out(tmp_path, "**/*")["hidden"]) == sorted(HIDDEN)
    corpus = open_corpus(tmp_path)
    assert "".join(corpus.pieces()) == "a.txt\n\nb/c.txt"
    wanted = (
        rf"2 files matching \*\*/\*\.txt, 12 bytes; left out: {len(texts)} hidden files \(\S+, …"
    )
    assert re.search(wanted, corpus.description)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/.*.txt", ["._a.txt", ".a.txt"]),
        ("**/.git/*.txt", [".git/a.txt"]),
        (".*/*.txt", [".git/a.txt", ".ipynb_checkpoints/a-checkpoint.txt"]),
        ("**/.trash/**/*.txt", ["b/.trash/deep/a.txt"]),
        ("__MACOSX/*.txt", ["__MACOSX/a.txt"]),
        ("__MACOSX/.*", ["__MACOSX/._a.txt"]),
        ("*~", ["a.txt~"]),
        ("Thumbs.db", ["Thumbs.db"]),
        ("**/~$*", ["b/~$a.txt"]),
    ],
)
def test_what_is_hidden_is_read_where_the_pattern_names_it(
    pattern: str, names: list[str], tmp_path: Path
) -> None:
    fill(tmp_path, "a.txt", "b/c.txt", *HIDDEN)
    assert read(tmp_path, pattern) == names


def test_a_hidden_folder_that_was_given_is_meant(tmp_path: Path) -> None:
    assert read(fill(tmp_path / ".notes", "a.txt", ".b.txt")) == ["a.txt"]


def test_where_all_is_hidden_the_pattern_that_reads_it_is_said(tmp_path: Path) -> None:
    fill(tmp_path, ".notes/sub/a.txt")
    with pytest.raises(DataError, match=r"1 hidden file .* named, as in '(.*)'\.") as raised:
        find_texts(tmp_path, "**/*.txt")
    named = re.search("as in '(.*)'", str(raised.value))
    assert named and read(tmp_path, named[1]) == [".notes/sub/a.txt"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "b/c.txt", "b/d/e.txt"]),
        ("**/d/**/*.txt", ["b/d/e.txt"]),
        ("*/*.txt", ["b/c.txt"]),
        ("b/**/*.txt", ["b/c.txt", "b/d/e.txt"]),
        ("./b/*.txt", ["b/c.txt"]),
        ("**/[ac].txt", ["a.txt", "b/c.txt"]),
        ("b/c.txt", ["b/c.txt"]),
        ("**", ["a.txt", "b/c.txt", "b/d/e.txt", "x.md"]),
        ("b/**/**/*", ["b/c.txt", "b/d/e.txt"]),
    ],
)
def test_a_pattern_matches_as_in_a_shell(pattern: str, names: list[str], tmp_path: Path) -> None:
    assert read(fill(tmp_path, "a.txt", "b/c.txt", "b/d/e.txt", "x.md"), pattern) == names


@pytest.mark.parametrize("pattern", ["", ".", "/etc/*", "a**/x", "**.txt", "**/**/**/x", "a\0b"])
def test_what_is_no_pattern_is_said(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pattern for files in a folder"):
        find_texts(fill(tmp_path, "a.txt"), pattern)


def test_copies_are_read_once(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.txt")
    for name in ("a (copy).txt", "z/a.txt", "a-Copy1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a.txt")
    (tmp_path / "link.txt").symlink_to("b.txt")
    os.link(tmp_path / "b.txt", tmp_path / "other name.txt")
    assert read(tmp_path) == ["a (copy).txt", "b.txt"]
    copies = ["a-Copy1.txt", "a.txt", "link.txt", "other name.txt", "z/a.txt"]
    assert left_out(tmp_path) == {"copy": copies}


def test_binary_files_are_left_out_and_empty_ones_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\x89PNG\0\0")
    for name in ("c.txt", "d.txt"):
        (tmp_path / name).touch()
    corpus = open_corpus(tmp_path)
    assert "".join(corpus.pieces()) == "a.txt"
    assert "3 files matching **/*.txt, 2 of them empty, 5 bytes; " in corpus.description
    assert left_out(tmp_path) == {"binary": ["b.txt"]}
    (tmp_path / "b.txt").write_bytes("wide".encode("utf-16"))  # text, which can be converted
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8: it is UTF-16"):
        list(open_corpus(tmp_path).pieces())


def test_links_are_followed_neither_in_circles_nor_out_nor_nowhere(tmp_path: Path) -> None:
    fill(tmp_path / "out", "x.txt", "deep/y.txt")
    folder = fill(tmp_path / "in", "a.txt", "b/c.txt")
    for name, target in {
        "b/up": "..",
        "self": "self",
        "to.txt": "from.txt",
        "from.txt": "to.txt",
        "gone.txt": "nowhere",
        "x.txt": "../out/x.txt",
        "folder": "../out",
        "inner": "b",
        ".hidden.txt": "../out/x.txt",
        "other.md": "../out/x.txt",
    }.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.txt")
    assert read(folder) == ["a.txt", "b/c.txt"]
    assert left_out(folder) == {
        "broken": ["from.txt", "gone.txt", "self", "to.txt"],
        "elsewhere": ["folder", "x.txt"],
        "special": ["pipe.txt"],
    }
    assert "elsewhere" not in left_out(folder, "b/*.txt")


def closed(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """Folders that may not be entered and files that may not be read: root could, all the same."""

    def refusing(call: Callable[..., object]) -> Callable[..., object]:
        def called(path: object, *more: object, **options: object) -> object:
            if Path(str(path)) in places:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *more, **options)

        return called

    monkeypatch.setattr(walk.os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(walk, "open_regular", refusing(walk.open_regular))


def test_what_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.txt", "b.txt", "c/d.txt", "e/f.txt", ".g/h.txt")
    closed(monkeypatch, tmp_path / "b.txt", tmp_path / "c", tmp_path / ".g")
    assert read(tmp_path) == ["a.txt", "e/f.txt"]
    assert left_out(tmp_path) == {"closed": ["c"], "unreadable": ["b.txt"]}
    said = open_corpus(tmp_path).description
    assert "1 folder that may not be entered (c), 1 file that may not be read (b.txt)" in said
    assert left_out(tmp_path, "*.txt") == {"unreadable": ["b.txt"]}  # nothing in c was asked for
    closed(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=r"may not be entered\. Allow it: chmod u\+rx"):
        find_texts(tmp_path, "**/*.txt")


def test_a_name_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    (tmp_path / os.fsdecode(b".\xff\n.txt")).write_text("x")
    said = open_corpus(tmp_path).description
    assert "1 hidden file (.\\udcff\\n.txt)" in said and said.encode()


def test_nothing_of_a_copy_is_in_the_validation_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = fill(tmp_path, "a.txt").joinpath("a.txt")
    text.write_text("".join(map(chr, range(0x4E00, 0x4F00))))  # no character twice
    for name in (".ipynb_checkpoints/a-checkpoint.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.read_text())
    data = DataConfig(str(tmp_path), "char", val_fraction=0.4)
    found = gather(resolve({"model": {"block_size": 8}, "train": {}, "data": data.to_dict()}))
    assert found.held_out is not None
    assert not {*found.training.tolist()} & {*found.held_out.tolist()}
    assert "left out: 1 copy of another (z.txt), 1 hidden file" in capsys.readouterr().err


def test_the_examples_of_the_docstrings() -> None:
    found = doctest.testmod(walk)
    assert found.attempted >= 2 and found.failed == 0
