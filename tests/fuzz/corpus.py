"""Files that must be refused, each with what is wrong with it and the error that says so."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.making import (
    TERABYTE,
    Maker,
    checkpoint,
    container,
    described,
    fifo,
    folder,
    hashes_of,
    link_to,
    npy,
    npy_header,
    places,
    raw_header,
    sparse,
    terabyte_checkpoint,
    weights,
    written,
)
from tinygpt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TinyGPTError,
    TokenizerError,
    UsageError,
)


@dataclass(frozen=True)
class Case:
    """One malformed file."""

    kind: str
    """What it pretends to be: a key of ``FILES``."""
    wrong: str
    """What is wrong with it."""
    make: Maker
    error: type[TinyGPTError] | None
    """What it is refused with; None if it is passed over without an error."""
    content: bytes | None = None
    """All of the file, where that is an ordinary small one: a seed for the fuzzer."""
    suffix: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.wrong}"

    def write(self, folder: Path) -> Path:
        """Make the file, and return its path."""
        path = folder / (
            Path(FILES[self.kind]).stem + (self.suffix or Path(FILES[self.kind]).suffix)
        )
        self.make(path)
        return path


FILES = {
    "checkpoint": "ckpt_3.safetensors",
    "config": "config.toml",
    "tokenizer": "tokenizer.json",
    "tokens": "tokens.npy",
    "jsonl": "texts.jsonl",
    "text": "text.txt",
    "metrics": "metrics.jsonl",
    "best": "best.json",
}
"""The names that files of each kind have."""

ERRORS: dict[str, type[TinyGPTError] | None] = {
    "checkpoint": CheckpointError, "config": ConfigError, "tokenizer": TokenizerError,
    "tokens": DataError, "jsonl": DataError, "text": DataError, "metrics": DataError,
    "best": None,
}  # fmt: skip

OTHERWISE: dict[tuple[str, str], type[TinyGPTError]] = {
    ("metrics", "a link to itself"): UsageError,  # there is no run of that name
}

DEEP = 60_000
HUGE = "9" * 5000
"""A number with more digits than Python reads."""


def _case(kind: str, wrong: str, what: bytes | str | Maker, suffix: str = "") -> Case:
    content = what.encode() if isinstance(what, str) else what
    if isinstance(content, bytes):
        return Case(kind, wrong, written(content), ERRORS[kind], content, suffix)
    error = OTHERWISE.get((kind, wrong), ERRORS[kind])
    return Case(kind, wrong, content, error, None, suffix)


def cases() -> list[Case]:
    """The whole corpus, the same each time."""
    found = [
        _case(kind, *rest)
        for kind, makers in MAKERS.items()
        for maker in makers
        for rest in maker()
    ]
    return [*found, *_not_files()]


Found = Iterator[tuple[Any, ...]]


def _not_files() -> list[Case]:
    """Whatever is no ordinary file: to open a pipe would wait for ever, a device never ends."""
    return [
        _case(kind, wrong, make)
        for kind in FILES
        for wrong, make in (
            ("a pipe", fifo),
            ("a link to a device", link_to("/dev/zero")),
            ("a link to itself", link_to(FILES[kind])),
        )
    ] + [_case(kind, "a folder", folder) for kind in ("config", "tokens", "best")]


# Checkpoints --------------------------------------------------------------------------------------


def _containers() -> Found:
    good = checkpoint()
    length = int.from_bytes(good[:8], "little")
    yield "empty", b""
    yield "seven bytes", b"\0" * 7
    yield "a header of 2^62 bytes", (2**62).to_bytes(8, "little") + b"{}"
    yield "a header of 2^64 - 1 bytes", b"\xff" * 8 + b"{}"
    yield "a header one byte longer than the file", (3).to_bytes(8, "little") + b"{}"
    yield "no header", container(b"")
    yield "a header that is no JSON", container(b"hello, world")
    yield "a header that is a list", container(b"[]")
    yield "a header that is a number", container(b"7")
    yield "a header nested 60,000 deep", container(b"[" * DEEP)
    yield "objects nested 60,000 deep", container(b'{"a":' * DEEP)
    yield "a header that is not UTF-8", container(b'{"\xff\xfe": 1}')
    yield "a header of zero bytes", container(b"\0" * 64)
    yield "a header with a zero byte in a name", container(b'{"a\\u0000b": 1, "c\0d": 2}')
    yield "the first half", good[: len(good) // 2]
    yield "without its last byte", good[:-1]
    yield "a byte too many", good + b"\0"
    yield "a flipped byte in the header", _flipped(good, 8 + length // 2)
    yield "a flipped byte in the data", _flipped(good, len(good) - 3)
    yield "blanks after the header, which its hash does not know", _padded(good, length)
    yield "a pickle", pickle.dumps({"model": [1.0]})
    yield "a zip archive", b"PK\x03\x04" + bytes(60)
    yield (
        "of another program",
        container(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0'),
    )
    yield "two tensors of one name", _twice()
    yield "a terabyte that was never written", terabyte_checkpoint
    yield "a terabyte of nothing", sparse(TERABYTE)


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _padded(content: bytes, length: int) -> bytes:
    return container(content[8 : 8 + length] + b" " * 8, content[8 + length :])


def _twice() -> bytes:
    entry = b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    return container(b"{" + entry + b"," + entry + b"}", b"\0")


def _layouts() -> Found:
    """Headers that lie about the tensors."""
    name = "model.wpe.weight"
    right = places(weights())[name]
    start, end = right["data_offsets"]

    def entry(**changes: Any) -> bytes:
        return raw_header(**{name: {**right, **changes}})

    yield "a tensor that overlaps another", entry(data_offsets=[start - 4, end - 4])
    yield "a gap between tensors", entry(data_offsets=[start + 4, end + 4])
    yield "a tensor that ends before it begins", entry(data_offsets=[end, start])
    yield "a tensor before the data", entry(data_offsets=[-64, 0])
    yield "a tensor that ends at 2^62", entry(data_offsets=[start, 2**62])
    yield "a tensor that ends at 2^64", entry(data_offsets=[start, 2**64])
    yield "three offsets", entry(data_offsets=[start, end, end])
    yield "offsets that are no numbers", entry(data_offsets=["0", None])
    yield "offsets that are an object", entry(data_offsets={})
    yield "offsets that are not finite", entry(data_offsets=[start, float("nan")])
    yield (
        "tensors in each other's place",
        raw_header(**{name: places(weights())["model.wte.weight"], "model.wte.weight": right}),
    )
    yield "a shape whose product is 2^64 + 16", entry(shape=[2**32, 2**32])
    yield "a shape of 2^62", entry(shape=[2**62])
    yield "a negative shape", entry(shape=[-4, -4])
    yield "a shape of fractions", entry(shape=[4.0, 4.0])
    yield "a shape of truths", entry(shape=[True, 16])
    yield "a shape of 10,000 dimensions", entry(shape=[1] * 10_000)
    yield "a shape that is a number", entry(shape=16)
    yield "an unknown type", entry(dtype="F31")
    yield "a type of 10,000 letters", entry(dtype="F" * 10_000)
    yield "a type that is a list", entry(dtype=["F32"])
    yield "another type of the same size", entry(dtype="I32")
    yield "another type of another size", entry(dtype="F64")
    yield "an entry that is a number", raw_header(**{name: 7})
    yield "an entry without anything", raw_header(**{name: {}})
    yield "a name of 10,000 letters", raw_header(**{"x" * 10_000: 7})
    yield "metadata that is a list", container(b'{"__metadata__":[1]}')
    yield (
        "an offset of 5,000 digits",
        container(f'{{"x":{{"dtype":"U8","shape":[1],"data_offsets":[0,{HUGE}]}}}}'.encode()),
    )


def _descriptions() -> Found:
    """All hashes are right; what the checkpoint says of itself is not."""
    yield "a description that is no JSON", checkpoint(description="hello")
    yield "a description that is a list", checkpoint(description="[]")
    yield "an empty description", checkpoint(description="{}")
    yield "a description nested 60,000 deep", checkpoint(description="[" * DEEP)
    yield "a description nested 500 deep", checkpoint(progress=_nested(500))
    yield "a newer format", checkpoint(format_version=99)
    yield "a format that is infinite", checkpoint(format_version=float("inf"))
    yield "a format that is a list", checkpoint(format_version=[2])
    yield "a step of 5,000 digits", checkpoint(description=f'{{"format_version": {HUGE}}}')
    yield "a negative step", checkpoint(iter_num=-3)
    yield "a step that is a text", checkpoint(iter_num="3")
    yield "a step that is not a number", checkpoint(iter_num=float("nan"))
    yield "a step that is infinite", checkpoint(iter_num=float("inf"))
    yield "a step beyond 64 bits", checkpoint(iter_num=2**63)
    yield "no model", _without("model")
    yield "no hashes", _without("sha256")
    yield (
        "hashes that are a list",
        checkpoint(description=json.dumps({**described(), "sha256": list(weights())})),
    )
    yield (
        "hashes that are numbers",
        checkpoint(description=json.dumps({**described(), "sha256": dict.fromkeys(weights(), 7)})),
    )
    yield (
        "hashes of other tensors",
        checkpoint(description=json.dumps({**described(), "sha256": {"model.x": "0" * 64}})),
    )
    yield "a model that is a list", checkpoint(model=[1, 2])
    yield "progress that is a list", checkpoint(progress=[1])
    yield "a best loss that is a text", checkpoint(progress={"best_val_loss": "low"})
    yield "a tokenizer that is a number", checkpoint(tokenizer=7)
    yield "a random state of texts", checkpoint(random_state={"seed": "x", "step": 3})
    yield "a run that is a list", checkpoint(run=["x"])
    yield "training settings that are a text", checkpoint(train="fast")
    yield "an unknown training setting of 10,000 letters", checkpoint(train={"x" * 10_000: 1})
    yield "a learning rate that is not a number", checkpoint(train={"learning_rate": float("nan")})


def _without(key: str) -> bytes:
    values = {**described(), "sha256": hashes_of(weights())}
    del values[key]
    return checkpoint(description=json.dumps(values))


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return {"best_val_loss": value}


def _claims() -> Found:
    """All hashes are right; a model of the shape that is claimed would take memory or time."""

    def model(**changes: Any) -> bytes:
        return checkpoint(model={**described()["model"], **changes})

    yield "a model a million wide", model(n_embd=1_000_000)
    yield "a model 40,000 wide", model(n_embd=40_000)
    yield "a vocabulary of 2^31", model(vocab_size=2**31)
    yield "a context of 2^31", model(block_size=2**31)
    yield "a million layers", model(n_layer=1_000_000)
    yield "a thousand layers", model(n_layer=1000)
    yield "a width of a large prime", model(n_embd=2**61 - 1)
    yield "a width beyond 64 bits", model(n_embd=2**64)
    yield "no layers", model(n_layer=0)
    yield "negative heads", model(n_head=-2)
    yield "a dropout that is not a number", model(dropout=float("nan"))
    yield "a dropout that is infinite", model(dropout=float("inf"))
    yield "a truth for a number", model(n_layer=True)
    yield "a setting of another program", model(n_experts=8)
    yield "more layers than it holds", model(n_layer=2)
    yield (
        "weights that are whole numbers",
        checkpoint({name: array.astype(np.int64) for name, array in weights().items()}),
    )
    yield (
        "a weight that is missing",
        checkpoint({name: array for name, array in weights().items() if "ln_f" not in name}),
    )
    yield "a weight too many", checkpoint({**weights(), "model.x": np.zeros(3, np.float32)})
    yield "a weight under another name", checkpoint(_renamed("model.ln_f.bias", "model.ln_f.bios"))
    yield (
        "a weight of another shape",
        checkpoint({**weights(), "model.wpe.weight": np.zeros((2, 8), np.float32)}),
    )
    yield (
        "a tensor that is no part of a run",
        checkpoint({**weights(), "../../escape": np.zeros(1, np.uint8)}),
    )
    yield (
        "more state than any optimizer has",
        checkpoint({**weights(), "optimizer.m.x": np.zeros(10_000, np.uint8)}),
    )
    yield "a cache a thousand times as large as the model", _wide_cache()


def _renamed(old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: array for name, array in weights().items()}


def _wide_cache() -> bytes:
    """One wide, 200 deep, with a long context: few weights, but keys and values without end."""
    layers, block = 200, 20_000
    arrays = {
        "model.wte.weight": np.zeros((8, 1), np.float32),
        "model.wpe.weight": np.zeros((block, 1), np.float32),
        "model.ln_f.weight": np.ones(1, np.float32),
    }
    per_layer = 2 + 4 + 8  # norms, attention, MLP
    arrays["model.h"] = np.zeros(layers * per_layer, np.float32)
    model = {
        "block_size": block, "vocab_size": 8, "n_layer": layers, "n_head": 1, "n_embd": 1,
        "bias": False,
    }  # fmt: skip
    return checkpoint(arrays, model=model)


# Settings -----------------------------------------------------------------------------------------


def _configs() -> Found:
    yield "no TOML", "hello, world"
    yield "a table that is none", "model = 3"
    yield "a table that is a list", "[[model]]\nn_layer = 1"
    yield "an unknown table", "[system]\nrun = 'rm'"
    yield "a table of 10,000 letters", f"[{'x' * 10_000}]\ny = 1"
    yield "an unknown field of 10,000 letters", f"[model]\n{'x' * 10_000} = 1"
    yield "a field twice", "[model]\nn_layer = 1\nn_layer = 2"
    yield "not UTF-8", b"[model]\n# \xff\xfe\n"
    yield "zero bytes", b"\0" * 100
    yield "UTF-16", "[model]\nn_layer = 1\n".encode("utf-16")
    yield "lists nested deep", "x = " + "[" * DEEP
    yield "tables nested deep", "x = " + "{a=" * 20_000
    yield "a name of 15,000 parts", "a." * 15_000 + "b = 1"
    yield "a table of 15,000 parts", "[" + "a." * 15_000 + "b]"
    yield "a number of 5,000 digits", f"[model]\nn_layer = {HUGE}"
    yield "a number of 40,000 bits", f"[model]\nn_layer = 0x{'f' * 10_000}"
    yield "a rate of 40,000 bits", f"[train]\nlearning_rate = 0x{'f' * 10_000}"
    yield "a rate that is not a number", "[train]\nlearning_rate = nan"
    yield "a rate that is infinite", "[train]\nlearning_rate = inf"
    yield "a width of a large prime", f"[model]\nn_embd = {2**61 - 1}\nn_head = 2"
    yield "a model of 100 terabytes", "[model]\nn_embd = 1000000\nn_head = 1"
    yield "2^62 layers", f"[model]\nn_layer = {2**62}"
    yield "a million layers", "[model]\nn_layer = 1000000\nn_embd = 1\nn_head = 1"
    yield "a negative batch", "[train]\nbatch_size = -1"
    yield "a batch of 2^62", f"[train]\nbatch_size = {2**62}"
    yield "2^62 evaluations", f"[train]\neval_iters = {2**62}"
    yield "a truth for a number", "[model]\nn_layer = true"
    yield "a date for a number", "[model]\nn_layer = 1979-05-27"
    yield "a text for a number", f"[model]\nn_layer = '{'x' * 10_000}'"
    yield "a list for a number", f"[model]\nn_layer = [{'1, ' * 10_000}]"
    yield "a share that is no share", "[data]\nval_fraction = 1e300"
    yield "a terabyte of nothing", sparse(TERABYTE, b"[model]\n")
    yield "a megabyte of comments", b"# x\n" * (1 << 18)


# Tokenizers ---------------------------------------------------------------------------------------


def _b64(*tokens: bytes) -> list[str]:
    return [base64.b64encode(token).decode() for token in tokens]


def _tokenizers() -> Found:
    def bpe(**values: Any) -> str:
        return json.dumps({"kind": "bpe", "pattern": "gpt2", "merges": _b64(b"ab"), **values})

    def char(chars: Any) -> str:
        return json.dumps({"kind": "char", "chars": chars})

    yield "empty", b""
    yield "a pickle", pickle.dumps({"kind": "bpe"})
    yield "a list", "[1, 2]"
    yield "nested 60,000 deep", "[" * DEEP
    yield "nested 500 deep", '{"kind": ' + "[" * 500 + "]" * 500 + "}"
    yield "UTF-16", json.dumps({"kind": "byte"}).encode("utf-16")
    yield "not UTF-8", b'{"kind": "\xff"}'
    yield "a name twice", '{"kind": "char", "kind": "byte"}'
    yield "no kind", "{}"
    yield "an unknown kind of 10,000 letters", json.dumps({"kind": "x" * 10_000})
    yield "a kind that is a list", json.dumps({"kind": ["bpe"]})
    yield "a number of 5,000 digits", f'{{"kind": "byte", "x": {HUGE}}}'
    yield "a pattern that backtracks for ever", bpe(pattern="(a+)+$")
    yield "a pattern that is a list", bpe(pattern=["gpt2"])
    yield "an unknown encoding", json.dumps({"kind": "bpe", "encoding": "none"})
    yield "an encoding that is a path", json.dumps({"kind": "bpe", "encoding": "../../etc/passwd"})
    yield "an encoding that is nested", json.dumps({"kind": "bpe", "encoding": [[["gpt2"]]]})
    yield "an encoding of 10,000 letters", json.dumps({"kind": "bpe", "encoding": "x" * 10_000})
    yield "2^31 merges, as a number", bpe(merges=2**31)
    yield "no merges", bpe(merges=[])
    yield "merges that are an object", bpe(merges={"ab": 1})
    yield "a merge that is nested", bpe(merges=[[[["ab"]]]])
    yield "a merge that is no base64", bpe(merges=["n0t base64!" * 1000])
    yield "a merge of one byte", bpe(merges=_b64(b"a"))
    yield "a merge twice", bpe(merges=_b64(b"ab", b"ab"))
    yield "an empty merge", bpe(merges=[""])
    yield "characters that are a list", char(["a", "b"])
    yield "characters out of order", char("ba")
    yield "a character twice", char("aa")
    yield "no characters", char("")
    yield "half a character", '{"kind": "char", "chars": "a\\ud800"}'
    yield "a terabyte of nothing", sparse(TERABYTE, b"{")


# Tokens -------------------------------------------------------------------------------------------


def _tokens() -> Found:
    three = np.arange(3, dtype="<u2").tobytes()
    yield "empty", b""
    yield "a pickle", pickle.dumps([1, 2, 3])
    yield "an array of objects", npy(npy_header("'|O'"), pickle.dumps([1, 2, 3]))
    yield "a header of 4 gigabytes", b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff" + b"{" * 100
    yield (
        "a header of 4 gigabytes that was never written",
        sparse(1 << 33, b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff"),
    )
    yield "a header that is a program", npy("__import__('os').system('touch escaped')", three)
    yield "a header with a program in it", npy(npy_header("__import__('os').name"), three)
    yield "a header nested 60,000 deep", npy("(" * DEEP)
    yield "a header of zero bytes", npy(b"\0" * 118)
    yield "a header with a name twice", npy(npy_header("'<u2', 'descr': '|O'"), three)
    yield "an unknown version", npy(npy_header(), three, (9, 9))
    yield "2^62 tokens", npy(npy_header(shape=f"({2**62},)"), three)
    yield "10^30 tokens", npy(npy_header(shape=f"({10**30},)"), three)
    yield "tokens whose number overflows", npy(npy_header(shape=f"({2**32}, {2**32})"), three)
    yield "tokens of a negative number", npy(npy_header(shape="(-3,)"), three)
    yield "no tokens", npy(npy_header(shape="(0,)"))
    yield "no tokens, in 2^62 columns", npy(npy_header(shape=f"(0, {2**62})"))
    yield "two dimensions", npy(npy_header(shape="(1, 3)"), three)
    yield "no dimension", npy(npy_header(shape="()"), three[:2])
    yield "a hundred dimensions", npy(npy_header(shape=f"({'1,' * 100}3)"), three)
    yield "fewer tokens than announced", npy(npy_header(shape="(4,)"), three)
    yield "more tokens than announced", npy(npy_header(shape="(2,)"), three)
    yield "fractions", npy(npy_header("'<f4'", "(1,)"), b"\0\0\x80\x3f")
    yield "texts", npy(npy_header("'<U3'", "(1,)"), b"\0" * 12)
    yield "records", npy(npy_header("[('a', '<u2')]"), three)
    yield "a type of no size", npy(npy_header("'<u0'"), three)
    yield "a type of 99 bytes", npy(npy_header("'<u99'", "(1,)"), b"\0" * 99)
    yield "a token of -1", npy(npy_header("'<i2'"), b"\xff" * 6)
    yield "a token of 2^64 - 1", npy(npy_header("'<u8'", "(1,)"), b"\xff" * 8)
    yield (
        "a terabyte of nothing",
        sparse(TERABYTE, npy(npy_header(shape=f"({(TERABYTE - 128) // 2},)").rjust(117) + "\n")),
    )
    yield "half a token", b"\1\0\2", ".bin"
    yield "nothing", b"", ".bin"
    yield "another terabyte of nothing", sparse(TERABYTE), ".bin"
    yield "another pipe", fifo, ".bin"


# Texts --------------------------------------------------------------------------------------------


def _lines() -> Found:
    yield "empty", b""
    yield "a zero byte", b'{"text": "a"}\n\0\n'
    yield "not UTF-8", b'{"text": "\xff"}'
    yield "UTF-16", '{"text": "a"}'.encode("utf-16")
    yield "no JSON", "hello"
    yield "a list", "[1]"
    yield "nested 60,000 deep", "[" * DEEP
    yield "a number of 5,000 digits", f'{{"text": {HUGE}}}'
    yield "a text that is a number", '{"text": 7}'
    yield "a text that is nested", '{"text": {"text": "a"}}'
    yield "half a character", '{"text": "a\\ud800"}'
    yield "10,000 other fields", json.dumps({f"field {n}": n for n in range(10_000)})
    yield "another field of 10,000 letters", json.dumps({"x" * 10_000: 1})
    yield "a terabyte of nothing", sparse(TERABYTE, b'{"text": "a"}\n')


def _texts() -> Found:
    yield "empty", b""
    yield "a zero byte", b"hello\0world"
    yield "not UTF-8", b"caf\xe9"
    yield "UTF-16", "hello".encode("utf-16")
    yield "UTF-32", "hello".encode("utf-32")
    yield "half a character at its end", b"hello \xe2\x82"
    yield "half a surrogate pair", b"\xed\xa0\x80"
    yield "a pickle", pickle.dumps("hello")
    yield "a terabyte of nothing", sparse(TERABYTE, b"hello\n")


# What a run keeps ---------------------------------------------------------------------------------


def _metrics() -> Found:
    yield "empty", b""
    yield "no JSON", "hello\n"
    yield "lists", "[1]\n"
    yield "nested 60,000 deep", "[" * DEEP + "\n"
    yield "not UTF-8", b'{"iter": 1, "\xff": 2}\n'
    yield "a name twice", '{"iter": 1, "iter": 2, "train_loss": 3.0}\n'
    yield "steps that are texts", '{"iter": "1", "train_loss": 3.0}\n'
    yield "steps that are lists", '{"iter": [1], "train_loss": 3.0}\n'
    yield "losses that are texts", '{"iter": 1, "train_loss": "3.0"}\n'
    yield "losses that are truths", '{"iter": 1, "train_loss": true}\n'
    yield "losses that are not numbers", '{"iter": 1, "train_loss": NaN}\n'
    yield "losses of 400 digits", f'{{"iter": 1, "train_loss": {"9" * 400}}}\n'
    yield "losses that are far away", '{"iter": 1, "train_loss": 1e308}\n'
    yield "steps that are far away", '{"iter": 1e300, "train_loss": 3.0}\n'
    yield "steps before the first", '{"iter": -1, "train_loss": 3.0}\n'
    yield "a list of what is not finite", '{"iter": 1, "nonfinite": [1]}\n'
    yield "texts for what is not finite", '{"iter": 1, "nonfinite": {"train_loss": [1]}}\n'
    yield "a terabyte of nothing", sparse(TERABYTE, b'{"iter": 1, "train_loss": 3.0}\n')


def _best() -> Found:
    yield "empty", b""
    yield "a list", "[1]"
    yield "nested 60,000 deep", "[" * DEEP
    yield "a path out of the folder", '{"checkpoint": "../../outside/ckpt_1.safetensors"}'
    yield "an absolute path", '{"checkpoint": "/etc/passwd"}'
    yield "a zero byte in a name", '{"checkpoint": "ckpt_3\\u0000.safetensors"}'
    yield "a name that is a list", '{"checkpoint": [["ckpt_3.safetensors"]]}'
    yield "a number of 5,000 digits", f'{{"checkpoint": {HUGE}}}'
    yield "a process of all processes", '{"pid": -1, "host": "here", "since": "", "birth": ""}'
    yield "a process that is infinite", '{"pid": 1e999, "host": "here", "since": ""}'
    yield "a terabyte of nothing", sparse(TERABYTE, b"{")


MAKERS = {
    "checkpoint": [_containers, _layouts, _descriptions, _claims],
    "config": [_configs],
    "tokenizer": [_tokenizers],
    "tokens": [_tokens],
    "jsonl": [_lines],
    "text": [_texts],
    "metrics": [_metrics],
    "best": [_best],
}

GOOD: dict[str, bytes] = {
    "checkpoint": checkpoint(),
    "config": b'[model]\nn_layer = 2\n[train]\nlearning_rate = 1e-3\ndecay = "linear"\n'
    b'[data]\nsource = "auto"\nglob = "**/*.md"\n',
    "tokenizer": json.dumps(
        {"kind": "bpe", "pattern": "gpt2", "merges": _b64(b"th", b"the", b" the")}
    ).encode(),
    "tokens": npy(npy_header(shape="(5,)"), np.arange(5, dtype="<u2").tobytes()),
    "jsonl": b'{"text": "a cat"}\n{"text": "a dog", "n": 1}\n',
    "text": "the cat sat on the mat, née Müller\n".encode(),
    "metrics": b'{"iter": 1, "train_loss": 3.5, "lr": 0.001, "text": "a \\ud83d cat"}\n'
    b'{"iter": 3, "elapsed": 0.7, "grad_norms": {"wte": 0.5, "h.0": null}, "skipped": "why"}\n'
    b'{"iter": 2, "train_loss": null, "nonfinite": {"train_loss": "nan"}, "val_loss": 3.0}\n',
    "best": b'{"checkpoint": "ckpt_3.safetensors", "val_loss": 1.5, "run": "ab", "pid": 7, '
    b'"host": "here", "since": "2026-01-01", "birth": null}',
}
"""A small file of each kind with which nothing is wrong."""
