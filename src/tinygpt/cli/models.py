"""Loading a model for a command, with a tokenizer to go with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinygpt.cli.console import say
from tinygpt.cli.options import DataConfig
from tinygpt.cli.texts import own_validation, read_tokens
from tinygpt.errors import DataError, TokenizerError, UsageError
from tinygpt.machine import device

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.text.tokenizers import Tokenizer


Quantize = Literal["int8"]
"""What weights can be rounded to, see ``tinygpt.model.int8``."""


def ready_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that ``spec`` names; UsageError if it would have to be trained."""
    from tinygpt.text.tokenizers import make_tokenizer

    def refuse() -> list[str]:
        raise UsageError(
            f"The tokenizer {spec!r} has to be trained first, and not here. Give gpt2, byte, a run "
            f"folder, or a file written by tokenizer train."
        )

    return make_tokenizer(spec, refuse)


def load_model(
    run: Path,
    tokenizer: str | None,
    quantize: Quantize | None = None,
    quantize_data: str | None = None,
) -> tuple[GPT, Tokenizer]:
    """The model of a run or checkpoint, and its tokenizer or the one that ``tokenizer`` names.

    With ``quantize`` its weights are rounded as they are read, for generation only, and messages
    say what that has saved and what it costs, on ``quantize_data`` or the run's validation text.
    """
    from tinygpt.api import load

    if quantize_data is not None and quantize is None:
        raise UsageError("--quantize-data goes with --quantize int8.")
    device.require_device()
    model, own = load(run, quantize)
    own = own if tokenizer is None else ready_tokenizer(tokenizer)
    if own is None:
        raise UsageError(
            f"{run} holds no tokenizer. Name the one its tokens were made with: --tokenizer gpt2, "
            f"byte, or the path of a saved one."
        )
    if quantize is not None:
        _say_quantized(run, model, own, quantize_data)
    return model, own


def _say_quantized(run: Path, model: GPT, tokenizer: Tokenizer, data: str | None) -> None:
    from tinygpt.files.disk import size
    from tinygpt.model import int8
    from tinygpt.runs import checkpoint
    from tinygpt.runs.folder import choose_checkpoint

    before, after = int8.sizes(model)
    say(f"int8: the weights take {size(after)} instead of {size(before)}")
    try:
        name, tokens = (
            own_validation(run, model, tokenizer, "To compare: --quantize-data TEXT.txt")
            if data is None
            else read_tokens(DataConfig(source=data), model, tokenizer)
        )
    except (DataError, TokenizerError, UsageError) as error:
        if data is not None:
            raise
        say(f"loss: not compared. {error}")
        return
    with checkpoint.weights(choose_checkpoint(run), model) as fetch:
        found = int8.compare(model, fetch, tokens)
    say(
        f"loss on {found.tokens:,} tokens of {name}: {found.after:.4f} instead of "
        f"{found.before:.4f} ({found.after - found.before:+.4f})"
    )
