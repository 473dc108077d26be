"""``tinygpt verify``: is every byte of a checkpoint, or of a whole run, what it was?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinygpt.cli.console import aligned, say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.newest import newest_runs
from tinygpt.cli.options import file_tables
from tinygpt.errors import CheckpointError, TinyGPTError
from tinygpt.files.disk import size
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import (
    BEST,
    CONFIG,
    METRICS,
    SAMPLES,
    TOKENIZER,
    best_checkpoint,
    list_checkpoints,
)


@dataclass(frozen=True)
class Finding:
    """What came of one file."""

    path: Path
    ok: bool
    found: str
    """What it holds, or what is wrong with it."""


def verify(*paths: Path, json: Switch = False) -> int:
    """Check every byte of checkpoints and runs; exit code 1 if anything is damaged.

    Parameters
    ----------
    paths
        Checkpoints, or run folders, of which all files are read. [default: the newest run in
        runs/]
    json
        Print the findings as JSON.
    """
    findings: list[Finding] = []
    for path in paths or newest_runs(1):
        for finding in _findings(path):
            findings.append(finding)
            if not json:  # at once, since large files take their time
                mark = "ok" if finding.ok else "DAMAGED"
                print(aligned([(mark.ljust(7), finding.path, finding.found)]), flush=True)
    damaged = sum(not finding.ok for finding in findings)
    if json:
        rows = [{**vars(finding), "path": str(finding.path)} for finding in findings]
        show_json({"ok": not damaged, "files": rows})
    files = f"{len(findings)} file{'s' * (len(findings) > 1)}"
    say(f"{files}, {damaged} of them damaged" if damaged else f"{files}, all whole")
    return 1 if damaged else 0


def _findings(path: Path) -> Iterator[Finding]:
    if not path.is_dir():
        yield _look(path, BESIDE.get(path.name, _checkpoint))
        return
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(f"There is no checkpoint in {path}.")
    for file in checkpoints:
        yield _look(file, _checkpoint)
    for name, read in BESIDE.items():
        if (path / name).exists():
            yield _look(path / name, read)


def _look(path: Path, read: Callable[[Path], str]) -> Finding:
    try:
        return Finding(path, True, read(path))
    except TinyGPTError as error:
        return Finding(path, False, str(error).removeprefix(str(path)).lstrip(" :,"))
    except OSError as error:
        return Finding(path, False, f"cannot be read: {error.strerror or error}.")


def _checkpoint(path: Path) -> str:
    meta = checkpoint.verify(path)
    return f"step {meta.iter_num:,}, {size(path.stat().st_size)}"


def _tokenizer(path: Path) -> str:
    from tinygpt.text.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(path)
    return f"{tokenizer.kind} of {tokenizer.vocab_size:,}"


def _rows(path: Path) -> str:
    from tinygpt.runs.history import read

    return f"{sum(1 for _ in read(path)):,} rows"


def _best(path: Path) -> str:
    best = best_checkpoint(path.parent)
    if best is None:
        raise CheckpointError(f"{path} names no checkpoint that is there.")
    return best.name


BESIDE: dict[str, Callable[[Path], str]] = {
    CONFIG: lambda path: ", ".join(f"[{name}]" for name in file_tables(path)),
    TOKENIZER: _tokenizer,
    METRICS: _rows,
    SAMPLES: _rows,
    BEST: _best,
}
"""The other files of a run, and what reads them."""
