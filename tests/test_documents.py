"""Documents in files of several formats, whole and in parts."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinygpt.errors import DataError, MissingExtraError
from tinygpt.text import documents
from tinygpt.text.corpus import open_corpus, text_of
from tinygpt.text.documents import Part, parts, whole
from tinygpt.text.tokenizers import BPETokenizer, chunks

CHINESE = "诗和远方在山那边,她说。我们走吧!\n"
TEXTS = ["One text, with a line.\n", "A second one", CHINESE, "Third: 日本語 and é.\n\n\n"]


def zstd_of(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as parallel compressors write
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    return bytes(compress(data[:half]) + compress(data[half:]))


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd_of}


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def parquet(path: Path, texts: list[Any], rows: int = 2, column: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pq.write_table(table, path, row_group_size=rows)
    return path


def read(path: Path, **how: Any) -> str:
    return "".join(open_corpus(path, **how).pieces())


# Formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_compressed_file_is_the_text_that_it_holds(
    tmp_path: Path, ending: str, name: str
) -> None:
    content = jsonl(TEXTS * 50) if name != "a.txt" else "".join(TEXTS * 500)
    packed = tmp_path / (name + ending)
    packed.write_bytes(PACK[ending](content.encode()))
    plain = tmp_path / ("b.jsonl" if name != "a.txt" else name)
    plain.write_text(content)
    assert read(packed) == read(plain) and open_corpus(packed).name == "a"


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_file_that_is_damaged_or_cut_off_is_named(tmp_path: Path, ending: str) -> None:
    content = PACK[ending]("".join(TEXTS * 5000).encode())
    path = tmp_path / f"a.txt{ending}"
    for damaged in (content[:-9], content[:40] + b"\0\0\0" + content[43:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.txt.* compressed, and damaged or incomplete"):
            read(path)
    path.write_bytes(b"no such format")
    with pytest.raises(DataError, match="damaged"):
        open_corpus(path)


def test_an_empty_compressed_file_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="it is empty"):
        open_corpus(tmp_path / "a.txt.gz")


def test_the_rows_of_a_table_are_the_lines_of_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS))
    table = parquet(tmp_path / "a.parquet", [*TEXTS[:2], None, "", *TEXTS[2:]])
    assert read(table) == read(tmp_path / "a.jsonl")
    other = parquet(tmp_path / "b.parquet", TEXTS, column="body")
    assert read(other, field="body") == read(tmp_path / "a.jsonl")


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS, column="texts")
    with pytest.raises(DataError, match=r"no column 'text'\. Did you mean 'texts'.*'id', 'texts'"):
        open_corpus(path)
    with pytest.raises(DataError, match=r"'id' holds int64, wanted texts.*'texts'"):
        open_corpus(path, field="id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged, or no Parquet table"):
        open_corpus(path, field="texts")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("a.parquet", "pyarrow", "parquet"), ("a.txt.zst", "zstandard", "zstd")],
)
def test_an_extra_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    (tmp_path / name).write_bytes(b"content")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.parquet", None)
    with pytest.raises(MissingExtraError, match=f"the extra '{extra}'"):
        open_corpus(tmp_path / name)


def test_a_folder_of_tables_and_of_packed_files(tmp_path: Path) -> None:
    parquet(tmp_path / "1.parquet", TEXTS[:2])
    parquet(tmp_path / "2.parquet", TEXTS[2:])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS).encode()))
    with pytest.raises(DataError, match=r"give the pattern '\*\*/\*\.parquet'"):
        open_corpus(tmp_path)
    assert read(tmp_path, glob="*.parquet") == read(tmp_path, glob="*.gz")


# Parts ------------------------------------------------------------------------------------------


def ids_of(tokenizer: BPETokenizer, found: list[Part]) -> list[int]:
    return [i for part in found for c in chunks(text_of([part])) for i in tokenizer.encode(c)]


@pytest.mark.parametrize("text", ["The cat sat, on the mat's 12 edges;\n\n  then left. ", CHINESE])
def test_the_parts_of_a_text_have_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text * 300)
    tokenizer = BPETokenizer.train(text * 3, 300)
    one = whole(path, "text")
    for size in (97, 1000, 5000):
        several = list(parts(one, size))
        assert len(several) > 1 and several[0].start == 0 and several[-1].stop is None
        assert all(a.stop == b.start for a, b in itertools.pairwise(several))
        assert ids_of(tokenizer, several) == ids_of(tokenizer, [one])
        assert sum(part.weight for part in several) == one.weight


def test_a_text_without_a_place_to_cut_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("é" * 5000)
    assert len(list(parts(whole(tmp_path / "a.txt", "text"), 100))) == 1
    monkeypatch.setattr(documents, "WINDOWS", (64, 3000))
    (tmp_path / "a.txt").write_text("é" * 1000 + ". The end " + "é" * 1000)
    assert 1 < len(list(parts(whole(tmp_path / "a.txt", "text"), 100))) < 10


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_parts_of_records_have_every_record_once(tmp_path: Path, kind: str) -> None:
    texts = [f"{text}{i}" for i in range(40) for text in TEXTS]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(jsonl(texts))
    else:
        parquet(path, texts, rows=7)
    for size in (60, 500, 3000):
        several = list(parts(whole(path, "text"), size))
        assert len(several) > 1
        assert ["".join(d) for part in several for d in part.documents()] == texts


def test_an_error_in_a_part_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words here " * 100 + b"\xff" + b" and more words" * 100)
    for found in (whole(path, ""), Part(str(path), "", 800, None)):
        with pytest.raises(DataError, match="byte 0xff at offset 1600"):
            list(text_of([found]))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n' * 10 + "{}\n")
    with pytest.raises(DataError, match="line 6 behind byte 70 has no field 'text'"):
        list(text_of([Part(str(lines), "text", 70, None)]))
