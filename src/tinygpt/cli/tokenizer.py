"""``tinygpt tokenizer``: train a vocabulary, look at one, and turn text into numbers and back."""

from __future__ import annotations

import sys
from pathlib import Path

from cyclopts import App

from tinygpt.cli.console import aligned, read_stdin, say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.loading import ready_tokenizer
from tinygpt.cli.options import DataConfig
from tinygpt.errors import UsageError
from tinygpt.runs.display.text import printable

app = App(name="tokenizer", help="Train a vocabulary, or turn text into tokens and back.")

SHOWN = 12
"""Tokens that ``info`` gives as examples."""


@app.command
def train(
    source: str,
    /,
    *,
    out: Path,
    vocab_size: int = 1024,
    field: str = DataConfig.field,
    glob: str = DataConfig.glob,
) -> None:
    """Learn a byte-pair vocabulary from a text.

    Parameters
    ----------
    source
        Text file, folder or JSONL file; or shakespeare, pydocs, auto.
    out
        File to write, such as tokenizer.json.
    vocab_size
        Number of different tokens; at least 256, the bytes.
    field
        Field of a JSONL file that holds the text.
    glob
        Files of a folder that are read.
    """
    from tinygpt.files.atomic import check_overwritable
    from tinygpt.runs.folder import run_of
    from tinygpt.text.corpus import open_corpus
    from tinygpt.text.sources import specials_for
    from tinygpt.text.tokenizers import BPETokenizer
    from tinygpt.text.tokenizers.base import MARK

    check_overwritable(out, MARK, "a tokenizer")
    if run_of(out.parent) is not None:
        raise UsageError(
            f"{out.parent} is the folder of a run, whose tokenizer has to stay. Write elsewhere."
        )
    corpus = open_corpus(source, field=field, glob=glob)
    say(f"text: {corpus.description}")
    tokenizer = BPETokenizer.train(corpus.pieces(), vocab_size, specials_for([corpus]))
    say(f"wrote {tokenizer.save(out)}, {tokenizer.vocab_size:,} tokens")


@app.command
def encode(
    tokenizer: str,
    text: str | None = None,
    /,
    *,
    json: Switch = False,
) -> None:
    """Turn a text into token ids.

    Parameters
    ----------
    tokenizer
        gpt2, byte, a saved tokenizer, or a run folder.
    text
        The text. [default: stdin]
    json
        Print a JSON list instead of numbers between spaces.
    """
    ids = ready_tokenizer(tokenizer).encode(read_stdin() if text is None else text)
    if json:
        show_json(ids)
    else:
        print(*ids)


@app.command
def decode(tokenizer: str, /, *ids: int) -> None:
    """Turn token ids into text.

    Parameters
    ----------
    tokenizer
        gpt2, byte, a saved tokenizer, or a run folder.
    ids
        The ids. [default: stdin, between spaces]
    """
    wanted = list(ids) or _numbers(read_stdin())
    text = ready_tokenizer(tokenizer).decode(wanted)
    print(printable(text) if sys.stdout.isatty() else text)


@app.command
def info(tokenizer: str, /, *, json: Switch = False) -> None:
    """Show what a tokenizer is.

    Parameters
    ----------
    tokenizer
        gpt2, byte, a saved tokenizer, or a run folder.
    json
        Print it as JSON.
    """
    from tinygpt.text.tokenizers import fingerprint

    found = ready_tokenizer(tokenizer)
    spelled = [found.decode_bytes([i]).decode(errors="replace") for i in range(found.vocab_size)]
    longest = sorted(spelled, key=len, reverse=True)[:SHOWN]
    described = {
        "kind": found.kind,
        "vocab_size": found.vocab_size,
        "fingerprint": fingerprint(found),
        "longest": longest,
    }
    if json:
        show_json(described)
    else:
        shown = described | {"longest": " ".join(map(repr, longest))}
        print(aligned([(name.replace("_", " "), value) for name, value in shown.items()]))


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"Token ids are whole numbers between spaces: {error}.") from error
