"""``tinygpt tokenize``: texts of any size to a folder of shards, on all cores."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tinygpt.cli.console import command, say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.options import DataConfig
from tinygpt.errors import UsageError

EVERY = 30.0
"""Seconds between two lines on how far it is, where there is no terminal for a bar."""


def tokenize(
    *sources: Annotated[str, Parameter(negative=())],
    out: Path,
    tokenizer: str | None = None,
    field: str = DataConfig.field,
    glob: str = DataConfig.glob,
    json: Switch = False,
) -> None:
    """Turn texts of any size into a folder of token files, which train reads.

    The work is done on all cores, or as many as --threads says, and in little memory. If it is
    stopped or killed, the same command goes on where it was, and ends with the same files.

    Parameters
    ----------
    sources
        Text files, folders, JSONL or Parquet files, each perhaps .gz or .zst; or shakespeare,
        pydocs, auto.
    out
        Folder to write: missing, empty, or begun by the same command.
    tokenizer
        gpt2, bpe:N, char, byte, or a saved tokenizer. [default: a BPE of 1024 from a small text,
        else gpt2]
    field
        Field of a JSONL file or column of a table that holds the text.
    glob
        Files of a folder that are read.
    json
        Print what was made as JSON.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tinygpt.machine.subprocesses import work_in_processes
    from tinygpt.text import shard_writer
    from tinygpt.text.corpus import open_corpus
    from tinygpt.text.shards import read_index

    if not sources:
        raise UsageError(f"There is no text. Try: {command('tokenize', 'books/', '--out', out)}")
    corpora = [open_corpus(source, field=field, glob=glob) for source in sources]
    for corpus in corpora:
        say(f"text: {corpus.description}")
    processes = _processes()

    def work(jobs: Sequence[shard_writer.Job]) -> Iterator[shard_writer.Report]:
        if processes == 1 or len(jobs) == 1:
            return shard_writer.work_here(jobs)
        return work_in_processes(shard_writer.__name__, jobs, processes)

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("tokens")
        said = time.monotonic()
        for done in shard_writer.write_shards(corpora, out, tokenizer, work):
            shown = f"{done.tokens:,} tokens, {done.shards} of {done.of} shards"
            bar.update(task, completed=done.read, total=done.total, description=shown)
            if not console.is_terminal and time.monotonic() - said > EVERY:
                said = time.monotonic()
                say(f"{done.read / done.total:.0%}: {shown}")
    index = read_index(out)
    tokens = sum(shard.tokens for shard in index.shards)
    if json:
        show_json(
            {
                "folder": str(out),
                "tokens": tokens,
                "shards": len(index.shards),
                "vocab_size": index.vocab_size,
                "dtype": index.dtype,
                "tokenizer": index.tokenizer,
            }
        )
    else:
        shards = f"{len(index.shards)} shard{'s' * (len(index.shards) > 1)}"
        say(f"tokens: {tokens:,} in {shards} ({index.vocab_size:,} ids)")
        say(f"wrote {out}. Train on it: {command('train', out)}")


def _processes() -> int:
    """How many processes work: --threads, or the variable behind it, or one for each core."""
    from tinygpt.machine import resources

    value = os.environ.get("TINYGPT_THREADS", "").strip()
    if value and not value.isdecimal():
        raise UsageError(f"TINYGPT_THREADS={value!r} is no number of threads.")
    return max(1, int(value)) if value else resources.cores()
