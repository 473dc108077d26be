"""Files from strangers are refused in words, and cost no more memory than they are worth."""

from __future__ import annotations

import ast
import faulthandler
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tinygpt
from tests.fuzz.corpus import FILES, GOOD, Case, cases
from tests.fuzz.limits import Finding, limited
from tests.fuzz.making import TERABYTE, sparse
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import LONGEST_MESSAGE, TARGETS
from tinygpt.cli import main
from tinygpt.cli.options import file_tables, resolve
from tinygpt.errors import CheckpointError, DataError, TinyGPTError
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import best_checkpoint
from tinygpt.runs.plots import read_curves
from tinygpt.text.corpus import open_corpus
from tinygpt.text.tokenizers import ByteTokenizer, load_tokenizer
from tinygpt.text.tokens import byte_count, load_tokens
from tinygpt.untrusted import brief, clip, is_sparse, open_regular, parse_json

CASES = cases()
SOURCES = Path(tinygpt.__file__).parent


def read_settings(path: Path) -> object:
    return resolve(file_tables(path))


def read_text(path: Path) -> object:
    return list(open_corpus(path).pieces())


LOADERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": tinygpt.load,
    "config": read_settings,
    "tokenizer": load_tokenizer,
    "tokens": load_tokens,
    "jsonl": read_text,
    "text": read_text,
    "metrics": read_curves,
    "best": lambda path: best_checkpoint(path.parent),
}
COMMANDS: dict[str, list[list[str]]] = {
    "checkpoint": [["info", "{file}"], ["generate", "{file}"], ["verify", "{file}"]],
    "config": [["train", "--config", "{file}", "--print-config"]],
    "tokenizer": [["tokenizer", "info", "{file}"], ["tokenizer", "encode", "{file}", "cat"]],
    "tokens": [["train", "{file}", "--out", "{folder}/run"]],
    "jsonl": [["tokenizer", "train", "{file}", "--out", "{folder}/new.json"]],
    "text": [["train", "{file}", "--out", "{folder}/run", "--tokenizer", "char"]],
    "metrics": [["plot", "{file}"], ["plot", "{file}", "--out", "{folder}/plot.png"]],
    "best": [["info", "{folder}"]],
}
"""What a user may do with a file of each kind."""
UNFIT = {"a weight under another name", "a weight of another shape"}
PASSES = {
    "verify": UNFIT,
    "info": UNFIT
    | {"a flipped byte in the data", "tensors in each other's place", "hashes that are numbers"},
}
"""What a command need not see: ``verify`` builds no model, and ``info`` does not read the data."""


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What Python imports while the first file is read is not the file's fault."""
    for kind, loader in LOADERS.items():
        path = tmp_path_factory.mktemp(kind) / FILES[kind]
        path.write_bytes(GOOD[kind])
        loader(path)


@pytest.fixture(autouse=True)
def hangs_are_shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hang ends with a traceback of where it is, even in C code and in system calls.

    Here only a hang is a fault: how fast a file is refused is measured by the fuzzer.
    """
    monkeypatch.setattr("tests.fuzz.limits.SECONDS", 10.0)
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[Path]:
    """A folder to put a file into; whatever lies beside that folder has to stay as it is."""
    beside = tmp_path / "outside"
    beside.mkdir()
    (beside / "ckpt_1.safetensors").write_bytes(b"not yours")
    (tmp_path / "secret.txt").write_text("not yours either")
    inside = tmp_path / "inside"
    inside.mkdir()
    before = contents(tmp_path)
    yield inside
    after = contents(tmp_path)
    assert {n: c for n, c in after.items() if not n.startswith("inside")} == before


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(case: Case) -> str:
    return case.name


# The corpus ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_with_which_nothing_is_wrong_is_read(kind: str, surroundings: Path) -> None:
    """Otherwise all of the others might be refused for a reason of no interest."""
    path = surroundings / FILES[kind]
    path.write_bytes(GOOD[kind])
    if kind == "best":
        (surroundings / FILES["checkpoint"]).write_bytes(GOOD["checkpoint"])
    assert LOADERS[kind](path) is not None


def test_the_corpus_is_large_and_the_same_each_time() -> None:
    assert len(CASES) >= 250 and len({case.name for case in CASES}) == len(CASES)
    assert [case.content for case in cases()] == [case.content for case in CASES]
    assert all(len(case.content or b"") < 1 << 21 for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_a_hostile_file_is_refused(case: Case, surroundings: Path) -> None:
    path = case.write(surroundings)
    with limited(len(case.content or b""), case.name):
        if case.error is None:
            assert LOADERS[case.kind](path) is None
            return
        with pytest.raises(TinyGPTError) as caught:
            LOADERS[case.kind](path)
    assert caught.type is case.error
    message = str(caught.value)
    assert len(message) <= LONGEST_MESSAGE + 2 * len(str(path))
    assert "xxxxx" * 20 not in message


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_says_what_is_wrong(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of a kind, in this process: no traceback, no dump, no exception of Python's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tinygpt"])
    for number, case in enumerate(c for c in CASES if c.kind == kind):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = case.write(folder)
        if kind == "best":
            (folder / FILES["checkpoint"]).write_bytes(GOOD["checkpoint"])
        for words in COMMANDS[kind]:
            arguments = [w.format(file=path, folder=folder) for w in words]
            code = main(arguments)
            err = capfd.readouterr().err
            told = f"{case.name}: {arguments} -> {code}\n{err}"
            passes = case.error is None or case.wrong in PASSES.get(words[0], ())
            assert code == (0 if passes else case.error.exit_code), told
            assert "Traceback" not in err and "should not happen" not in err, told
            assert len(err) <= LONGEST_MESSAGE + 3 * len(str(path)), told
        shutil.rmtree(folder)
    assert not list(tmp_path.iterdir())


# Run folders --------------------------------------------------------------------------------------

OURS = (
    "metrics.jsonl", "samples.jsonl", "run.lock", "config.toml", "tokenizer.json", "best.json",
    "run.json", ".best.json.tinygpt-0123456789ab.tmp",
)  # fmt: skip
"""What a resumed run writes to, or clears away."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps out of four."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the cat sat on the mat.\n" * 40)
    flags = (
        "--tokenizer char --model.n-layer 1 --model.n-embd 8 --model.n-head 1 --model.block-size 8 "
        "--train.batch-size 2 --train.eval-iters 1 --train.max-iters 2 --train.eval-interval 1"
    )
    code = main(["train", str(folder / "text.txt"), "--out", str(folder / "run"), *flags.split()])
    assert code == 0
    return folder / "run"


TRAPS: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file outside": lambda path, outside: path.symlink_to(outside),
    "a link to nothing outside": lambda path, outside: path.symlink_to(f"{outside}.new"),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a folder": lambda path, _: path.mkdir(),
}
QUICK = {"a link to a file outside", "a pipe"}


@pytest.mark.parametrize(
    "trap", [pytest.param(t, marks=[] if t in QUICK else pytest.mark.slow) for t in TRAPS]
)
@pytest.mark.parametrize("name", OURS)
def test_to_resume_a_hostile_folder_touches_nothing_outside(
    name: str, trap: str, trained: Path, surroundings: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = surroundings / "run"
    shutil.copytree(trained, folder)
    (folder / name).unlink(missing_ok=True)
    TRAPS[trap](folder / name, surroundings.parent / "secret.txt")
    code = main(["train", "--resume", "--out", str(folder)])
    err = capfd.readouterr().err
    assert code in (0, 1, 2) and "Traceback" not in err and "should not happen" not in err, err


# What the corpus cannot say -----------------------------------------------------------------------


def test_a_checkpoint_that_was_refused_has_allocated_nothing(tmp_path: Path) -> None:
    """The claim of a model a million wide costs less than a megabyte, not terabytes."""
    (case,) = (c for c in CASES if c.wrong == "a model 40,000 wide")
    path = case.write(tmp_path)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"claims [0-9,]+ parameters.*holds 300"):
        tinygpt.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_blanks_at_the_end_of_a_header_are_part_of_the_format(tmp_path: Path) -> None:
    from tests.fuzz.making import OPENING, container, seal

    good = GOOD["checkpoint"]
    length = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + length]
    assert header.startswith(OPENING)
    path = tmp_path / FILES["checkpoint"]
    path.write_bytes(container(seal(header + b" " * 1000), good[8 + length :]))
    assert checkpoint.verify(path).iter_num == 3


def test_weights_that_are_not_numbers_are_told_at_the_first_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.fuzz.making import checkpoint as made
    from tests.fuzz.making import weights

    path = tmp_path / FILES["checkpoint"]
    path.write_bytes(made({n: a * np.float32("nan") for n, a in weights().items()}))
    assert main(["generate", str(path), "--max-tokens", "2"]) == 1
    err = capsys.readouterr().err
    assert "error" in err and "should not happen" not in err


@pytest.mark.parametrize("pattern", ["../*.txt", "a/../../*", "/etc/*", "**/" * 9 + "*", "x" * 999])
def test_a_pattern_stays_in_the_folder(surroundings: Path, pattern: str) -> None:
    (surroundings / "a.txt").write_text("mine")
    with pytest.raises(DataError, match="is no pattern for files in a folder"):
        open_corpus(surroundings, glob=pattern)


@pytest.mark.parametrize("target", ["../secret.txt", "../outside/ckpt_1.safetensors"])
def test_a_link_out_of_a_folder_of_texts_is_left_out(surroundings: Path, target: str) -> None:
    (surroundings / "a.txt").write_text("mine")
    (surroundings / "c.txt").symlink_to(target)
    corpus = open_corpus(surroundings)
    assert "".join(corpus.pieces()) == "mine"
    assert "left out: 1 link that leads out of the folder (c.txt)" in corpus.description
    (surroundings / "a.txt").unlink()
    with pytest.raises(DataError, match=r"No file .* 1 link that leads out of the folder"):
        open_corpus(surroundings)


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinygpt.text.documents.MAX_LINE", 1 << 21)
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "' + "x" * (3 << 20) + '"}')
    with pytest.raises(DataError, match="a line of more than 2,097,152 characters"):
        list(open_corpus(path).pieces())


def test_many_lines_of_half_the_length_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinygpt.text.documents.MAX_LINE", 1 << 21)
    path = tmp_path / "lines.jsonl"
    path.write_text(('{"text": "' + "x" * (1 << 20) + '"}\n') * 4)
    assert sum(map(len, open_corpus(path).pieces())) > 4 << 20


def test_one_token_does_not_make_a_model_of_gigabytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.zeros(4000, np.uint32)
    tokens[7] = 150_000_000
    np.save(tmp_path / "x.npy", tokens)
    code = main(["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run")])
    assert code == 1 and "has a token of number 150,000,000" in capsys.readouterr().err


def test_tokens_of_64_bits_are_counted(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3, dtype="<u8"))
    assert byte_count(load_tokens(tmp_path / "x.npy", 256), ByteTokenizer()) == 3


def test_a_file_with_holes_that_holds_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "half.bin"
    with path.open("wb") as file:
        file.write(b"\1\0" * (1 << 20))
        file.seek(4 << 20)
        file.write(b"\1\0" * (1 << 20))
    assert len(load_tokens(path)) == 3 << 20
    sparse(TERABYTE, b"\1\0" * 100)(path)
    with path.open("rb") as file:
        assert is_sparse(file) and file.read(2) == b"\1\0"
    with pytest.raises(OSError, match="never written"):
        open_regular(path)


def test_an_interpreter_never_waits_for_a_pipe(tmp_path: Path) -> None:
    """A pipe that takes a file's place between the look and the opening, too."""
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import os, stat, sys\nfrom tinygpt import untrusted\n"
        "looks = []\nreally = untrusted._check_regular\n"
        "def look(path, status):\n    looks.append(path)\n    if len(looks) > 1: "
        "really(path, status)\n"
        "untrusted._check_regular = look\n"
        "try: untrusted.open_regular(sys.argv[1])\n"
        "except OSError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pipe")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no ordinary file" in done.stderr


def test_json_is_plain_and_walkable() -> None:
    assert parse_json(b'{"a": [1, -2.5, "\xc3\xa9", null]}') == {"a": [1, -2.5, "é", None]}
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json(str(2**64 - 1)) == 2**64 - 1
    for text in ("[" * 65 + "]" * 65, "[" * 99_999, str(2**64), "9" * 5000, '{"a":1,"a":1}', "{"):
        with pytest.raises(ValueError):
            parse_json(text)
    with pytest.raises(ValueError):
        parse_json(b'"\xff"')


def test_messages_quote_little() -> None:
    assert brief("x" * 10**6) == repr("x" * 40 + "…")
    assert brief(b"x" * 50, 3) == "b'xxx…'"
    assert brief(10**6000) == "a number of 19932 bits"
    assert brief({"a": {"b": "c" * 999}}) == "a dict of 1"
    assert brief(None) == "None" and brief(-3) == "-3"
    assert clip("a\n  b\tc") == "a b c" and len(clip("x" * 999, 20)) == 21


OWN_PICKLES = (SOURCES / "machine" / "kernel_store.py", SOURCES / "machine" / "disk_cache.py")
"""What goes through a pipe between a process and its own forks, and what tinygrad keeps in the
user's own cache as pickles and machine code: no stranger's files."""
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}


def test_nothing_in_the_package_unpickles_or_runs_what_it_reads() -> None:
    for path in sorted(SOURCES.rglob("*.py")):
        found = list(dangerous(ast.parse(path.read_text(encoding="utf-8"))))
        assert found == ["pickle"] * (path in OWN_PICKLES), f"{path}: {found}"


def dangerous(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            pickled = any(k.arg == "allow_pickle" for k in node.keywords)
            if called in CALLS or called in ("np.load", "numpy.load", "torch.load") or pickled:
                yield called


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "eval('1')", "np.load(x)", "f(allow_pickle=1)"],
)
def test_what_would_run_a_file_is_found(source: str) -> None:
    assert list(dangerous(ast.parse(source)))


# A short run of the fuzz targets ------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_lead_to_no_finding(name: str) -> None:
    """``python -m tests.fuzz`` does the same for minutes, led by coverage where atheris is."""
    kind, target = TARGETS[name]
    seeds = [GOOD[kind], *(c.content for c in CASES if c.kind == kind and c.content is not None)]
    rng = random.Random(name)
    for seed in seeds:
        target(seed)
    for _ in range(100):
        target(mutated(rng, [seed for seed in seeds if len(seed) < 1 << 13]))


@pytest.mark.parametrize(
    "wrong",
    [lambda: bytes(100 << 20), lambda: all(n == 0 for n in iter(int, 1)), lambda: json.loads("{")],
    ids=["memory", "time", "error"],
)
def test_a_loader_that_takes_too_much_is_a_finding(
    wrong: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.targets.load_tokens", lambda *_: wrong())
    monkeypatch.setattr("tests.fuzz.limits.SECONDS", 0.02)
    with pytest.raises(Finding):
        TARGETS["npy"][1](GOOD["tokens"])


def test_the_fuzzer_runs_from_the_command_line(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    words = ["-m", "tests.fuzz", "--plain", "--minutes", "0.01", "--keep", str(tmp_path), "bin"]
    done = subprocess.run(
        [sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 targets with a finding" in done.stdout and "bin" in done.stdout
