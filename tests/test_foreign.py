"""Files of other programs are named, with the way from there to what TinyGPT reads."""

from __future__ import annotations

import io
import shlex
import subprocess
import zipfile
from pathlib import Path

import pytest

import tinygpt
from tinygpt.errors import CheckpointError, DataError, InteropError, TinyGPTError, TokenizerError
from tinygpt.interop.hf import weight_files
from tinygpt.runs import checkpoint
from tinygpt.runs.plots import read_curves
from tinygpt.text.documents import read_text
from tinygpt.text.tokenizers import load_tokenizer
from tinygpt.text.walk import find_texts
from tinygpt.untrusted.foreign import HEAD, encoding_of, no_model, no_text, recognize


def zipped(*names: str) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return memory.getvalue()


FILES = {
    "ckpt.pt": (zipped("ckpt/data.pkl", "ckpt/data/0"), "PyTorch", "no text", "interop.md"),
    "old.bin": (b"\x80\x02}q\x00.", "PyTorch", "no text", "interop.md"),
    "m.gguf": (b"GGUF\x03\0\0\0" + bytes(200), "llama.cpp", "no text", "does not read it"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF", "pdftotext", "checkpoint"),
    "a.docx": (zipped("[Content_Types].xml", "word/document.xml"), "office", "plain text", ""),
    "a.zip": (zipped("a.txt"), "zip", "unzip", "unzip"),
    "a.txt.gz": (b"\x1f\x8b\x08\0", "compressed", "Unpack", "Unpack"),
    "a.parquet": (b"PAR1\x15\x04", "Parquet", "JSONL", ""),
    "w.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "LFS", "git lfs", "git lfs"),
    "page.html": (b"<!DOCTYPE html><html>", "web page", "", "itself"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_program_is_named_with_a_way_from_it(name: str, tmp_path: Path) -> None:
    content, is_, as_text, as_model = FILES[name]
    path = tmp_path / f"my {name}"
    path.write_bytes(content)
    told = no_text(path, content), no_model(path, content)
    assert all(said and is_ in said and str(path) in said for said in told)
    assert as_text in str(told[0]) and as_model in str(told[1])
    for said in told:  # commands can be pasted
        for command in ("unzip ", "pdftotext "):
            if command in str(said):
                assert shlex.split(str(said).partition(command)[2]) == [str(path)]
    with pytest.raises(TinyGPTError, match=is_):
        checkpoint.verify(path)


def test_plain_text_is_nobodys(tmp_path: Path) -> None:
    for text in (b"", b"The cat", b"PKs are keys", b"{}", b"\x80", "诗和远方".encode()):
        assert recognize(text) is None


def test_every_reader_says_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(2 * HEAD))
    readers = {
        tinygpt.load: CheckpointError,
        weight_files.read_file: InteropError,
        load_tokenizer: TokenizerError,
        read_curves: DataError,
        lambda path: list(read_text(path)): DataError,
    }
    for reader, error in readers.items():
        with pytest.raises(error, match="GGUF model"):
            reader(path)


TEXTS = {
    "zh": "机器学习是人工智能的一个分支。\n它研究如何让计算机从数据中学习。\n",
    "ja": "吾輩は猫である。\n名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "ru": "Все счастливые семьи похожи друг на друга.\n",  # noqa: RUF001
    "de": "Größe und Maß, Übermut tut selten gut.\n",
    "en": "The cat sat on the mat, and the dog sat on the log.\n",
}


@pytest.mark.parametrize(
    ("language", "encoding"),
    [
        *(
            (language, f"utf-{bits}-{end}e")
            for language in TEXTS
            for bits in (16, 32)
            for end in "lb"
        ),
        *(("zh", "gb18030"), ("ja", "shift_jis"), ("ru", "cp1251"), ("ru", "koi8-r")),
        *(("de", "latin-1"), ("de", "cp1252")),
    ],
)
def test_the_command_that_converts_a_text_gives_the_text(
    language: str, encoding: str, tmp_path: Path
) -> None:
    text = TEXTS[language] * 40
    path = tmp_path / "it's my text.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="is not UTF-8") as raised:
        list(read_text(path))
    command = str(raised.value).partition("with: ")[2]
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
    converted = tmp_path / "it's my text.utf8.txt"
    assert converted.read_text(encoding="utf-8").removeprefix("\ufeff") == text


def test_without_the_detector_there_is_still_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "charset_normalizer", None)
    assert encoding_of("Größe".encode("latin-1")) is None


def test_a_folder_of_tokens_is_not_to_be_read_with_a_pattern(tmp_path: Path) -> None:
    """As nanoGPT's data folders are."""
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / name).write_bytes(b"\0\1\0\2")
    for glob in ("**/*.txt", "**/*.bin"):
        with pytest.raises(DataError, match="given by its own name") as raised:
            find_texts(tmp_path, glob)
        assert "give the pattern" not in str(raised.value)
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(DataError, match=r"give the pattern '\*\*/\*\.md'"):
        find_texts(tmp_path, "**/*.txt")
