"""Loading a model for a command, with a tokenizer to go with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt import runtime
from tinygpt.errors import UsageError

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.tokenizers import Tokenizer


def load_model(run: Path, tokenizer: str | None) -> tuple[GPT, Tokenizer]:
    """The model of a run or checkpoint, and its tokenizer or the one that ``tokenizer`` names."""
    from tinygpt.api import load
    from tinygpt.tokenizers import make_tokenizer

    runtime.require_device()
    model, own = load(run)
    if tokenizer is not None:
        return model, make_tokenizer(tokenizer, lambda: _no_text(tokenizer))
    if own is None:
        raise UsageError(
            f"{run} holds no tokenizer. Name the one its tokens were made with: --tokenizer gpt2, "
            f"byte, or the path of a saved one."
        )
    return model, own


def _no_text(spec: str) -> list[str]:
    raise UsageError(
        f"--tokenizer {spec} would have to be trained. Give gpt2, byte or a saved one."
    )
