"""The text that a command reads: the one it was given, or the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.cli.options import DataConfig, run_tables
from tinygpt.errors import TinyGPTError, UsageError
from tinygpt.runs.folder import choose_checkpoint, folder_of

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.text.tokenizers import Tokenizer
    from tinygpt.text.tokens import Tokens


LARGEST_BEGUN = 1 << 25
"""Bytes of a text of which beginnings are offered."""


def own_source(run: Path) -> DataConfig:
    """Where the text of a run, or of the run that a checkpoint lies in, comes from."""
    return DataConfig.from_dict(run_tables(folder_of(run)).get("data", {}))


def read_tokens(source: DataConfig, model: GPT, tokenizer: Tokenizer) -> tuple[str, Tokens]:
    """-> a name for the text, and its tokens"""
    from tinygpt.text.corpus import open_corpus
    from tinygpt.text.tokens import TOKEN_FILES, load_tokens, tokens_of

    name, vocab_size = str(source.source), model.config.vocab_size
    if Path(name).suffix in TOKEN_FILES:
        return name, load_tokens(name, vocab_size)
    corpus = open_corpus(name, field=source.field, glob=source.glob)
    return corpus.description, tokens_of(corpus, tokenizer, vocab_size)


def unlike_training(run: Path, part: str, tokens: Tokens) -> str:
    """What to say behind the name of a run's own text if it is no longer the one it was.

    ``part`` is ``train`` or ``val``. Nothing is said where nobody knows what it was.
    """
    from tinygpt.runs import checkpoint
    from tinygpt.text.tokens import data_fingerprint

    known = (checkpoint.read_meta(choose_checkpoint(run)).data or {}).get(part)
    same = known is None or known == data_fingerprint(tokens)
    return "" if same else " (not what it was when the run was trained)"


def own_validation(run: Path, model: GPT, tokenizer: Tokenizer, advice: str) -> tuple[str, Tokens]:
    """The text that a run keeps for validation; UsageError, with the advice, if it keeps none."""
    from tinygpt.text import batches

    source = own_source(run)
    if source.source is None:
        raise UsageError(f"{run} does not say what it was trained on. {advice}")
    name, tokens = read_tokens(source, model, tokenizer)
    _, held_out = batches.split(tokens, source.val_fraction, model.config.block_size)
    if held_out is None:
        raise UsageError(f"{run} kept no text for validation. {advice}")
    changed = unlike_training(run, "val", held_out)
    return f"{name}, its last {source.val_fraction:.0%}{changed}", held_out


def beginnings(run: Path, model: GPT, tokenizer: Tokenizer, count: int = 3) -> list[str]:
    """First lines from a run's own validation text, from places far apart; [] without that text.

    Only a text that is known to be the run's is read from: the folder may come from elsewhere, and
    name a file that its author has never seen. A text that would take long to encode is left alone.
    """
    from tinygpt.runs import checkpoint
    from tinygpt.text.tokens import data_fingerprint

    try:
        source = Path(own_source(run).source or "")
        if source.exists() and not (source.is_file() and source.stat().st_size <= LARGEST_BEGUN):
            return []
        _, tokens = own_validation(run, model, tokenizer, "")
        known = (checkpoint.read_meta(choose_checkpoint(run)).data or {}).get("val")
        if known != data_fingerprint(tokens):
            return []
        starts = [len(tokens) * i // count for i in range(count)]
        passages = [tokenizer.decode(tokens[at : at + 200].tolist()) for at in starts]
    except (TinyGPTError, OSError):
        return []
    lines = ["".join(passage.splitlines(keepends=True)[1:3]) for passage in passages]
    return [line[:80].rstrip() for line in lines if line.strip()]
