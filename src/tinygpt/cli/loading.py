"""What a command loads of a run: its model, its tokenizer, and the text that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinygpt.cli.console import say
from tinygpt.cli.options import DataConfig, flags, run_tables
from tinygpt.config import Config, Precision
from tinygpt.errors import DataError, TinyGPTError, TokenizerError, UsageError
from tinygpt.machine import device
from tinygpt.runs.folder import choose_checkpoint, folder_of
from tinygpt.text.mix_shares import is_mix

if TYPE_CHECKING:
    from tinygpt.api import GPT
    from tinygpt.text.tokenizers import Tokenizer
    from tinygpt.text.tokens import Tokens

Quantize = Literal["int8", "int4"]
"""What weights can be rounded to; see ``tinygpt.model.int8``."""


@dataclass(frozen=True)
class Loading(Config):
    """How a command that writes text takes a model."""

    tokenizer: str | None = None
    """gpt2, byte or a saved tokenizer, for a checkpoint that holds none."""
    dtype: Precision = "float32"
    """Type of weights, products and cache: bfloat16 and float16 take half of the memory."""
    quantize: Quantize | None = None
    """Round the weights: int8 to a quarter of the memory, for faster writing, int4 to an eighth."""
    quantize_data: str | None = None
    """Text to compare the losses on, before and after; not set means the run's validation text."""
    kv: Literal["int8"] | None = None
    """int8: round the keys and values of the cache, which then takes a quarter of the memory."""


if TYPE_CHECKING:
    LoadingFlags = dict[str, Any]
else:
    LoadingFlags = flags(Loading, "Loading")

LARGEST_BEGUN = 1 << 25
"""Bytes of a text of which beginnings are offered."""


# ---- the text ----


def own_source(run: Path) -> DataConfig:
    """Where the text of a run, or of the run that a checkpoint lies in, comes from."""
    return DataConfig.from_dict(run_tables(folder_of(run)).get("data", {}))


def read_tokens(source: DataConfig, model: GPT, tokenizer: Tokenizer) -> tuple[str, Tokens]:
    """-> a name for the text, and its tokens"""
    from tinygpt.text import sources

    name = str(source.source)
    found = sources.opened(name, source.field, source.glob, source.separator)
    tokens = sources.read_tokens(name, found, tokenizer, model.config.vocab_size, source.glob)
    corpus = found.get(name)
    return name if corpus is None else corpus.description, tokens


def unlike_training(run: Path, part: str, tokens: Tokens) -> str:
    """What to say behind the name of a run's own text if it is no longer the one it was.

    ``part`` is ``train`` or ``val``. An empty string where the run does not say what it was.
    """
    changed = _is_unchanged(run, part, tokens) is False
    return " (not what it was when the run was trained)" if changed else ""


def _is_unchanged(run: Path, part: str, tokens: Tokens) -> bool | None:
    """Whether a text is the one that a run was trained on; None if the run does not say."""
    from tinygpt.runs import checkpoint
    from tinygpt.text.tokens import data_fingerprint

    known = (checkpoint.read_meta(choose_checkpoint(run)).data or {}).get(part)
    return None if known is None else known == data_fingerprint(tokens)


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
    from tinygpt.text.tokenizers import document_end

    try:
        source = Path(own_source(run).source or "")
        small = source.is_file() and source.stat().st_size <= LARGEST_BEGUN
        if is_mix(str(source)) or (source.exists() and not small):
            return []
        _, tokens = own_validation(run, model, tokenizer, "")
        if not _is_unchanged(run, "val", tokens):
            return []
        starts = [len(tokens) * i // count for i in range(count)]
        end = document_end(tokenizer)
        passages = [
            tokenizer.decode(int(i) for i in tokens[at : at + 200] if i != end) for at in starts
        ]
    except (TinyGPTError, OSError):
        return []
    lines = ["".join(passage.splitlines(keepends=True)[1:3]) for passage in passages]
    return [line[:80].rstrip() for line in lines if line.strip()]


# ---- the model ----


def ready_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that ``spec`` names; UsageError if it would have to be trained."""
    from tinygpt.text.tokenizers import make_tokenizer

    def refuse() -> list[str]:
        raise UsageError(
            f"The tokenizer {spec!r} has to be trained first, and not here. Give gpt2, byte, a run "
            f"folder, or a file written by tokenizer train."
        )

    return make_tokenizer(spec, refuse)


def load_model(run: Path, **given: Any) -> tuple[GPT, Tokenizer]:
    """The model of a run or checkpoint, and its tokenizer or the one that is given.

    ``given`` are fields of ``Loading``. What is rounded is so for generation only, and messages say
    what that has saved and what it costs.
    """
    from tinygpt.api import load

    how = Loading.from_dict(given)
    quantize, quantize_data, dtype = how.quantize, how.quantize_data, how.dtype
    if quantize_data is not None and quantize is None:
        raise UsageError("--quantize-data goes with --quantize int8 or int4.")
    if quantize is not None and dtype != "float32":
        raise UsageError(f"Weights are rounded once: give --quantize or --dtype {dtype}, not both.")
    device.require_device()
    model, own = load(run, quantize, dtype, how.kv)
    own = own if how.tokenizer is None else ready_tokenizer(how.tokenizer)
    if own is None:
        raise UsageError(
            f"{run} holds no tokenizer. Name the one its tokens were made with: --tokenizer gpt2, "
            f"byte, or the path of a saved one."
        )
    if quantize is not None:
        _say_quantized(run, model, own, quantize, quantize_data)
    elif dtype != "float32":
        say(_saved(model, dtype))
    if how.kv is not None:
        say(_saved_cache(model))
    return model, own


def _saved(model: GPT, name: str) -> str:
    from tinygpt.files.disk import size
    from tinygpt.model import int8

    before, after = int8.sizes(model)
    return f"{name}: the weights take {size(after)} instead of {size(before)}"


def _saved_cache(model: GPT) -> str:
    from tinygrad import dtypes

    from tinygpt.files.disk import size
    from tinygpt.model.cache import cache_bytes

    kinds = dtypes.int8, model.half or dtypes.float32
    after, before = (size(cache_bytes(model.config, kind)) for kind in kinds)
    return f"int8: the keys and values of a text take {after} instead of {before}"


def _say_quantized(
    run: Path, model: GPT, tokenizer: Tokenizer, kind: Quantize, data: str | None
) -> None:
    from tinygpt.model import int8
    from tinygpt.runs import checkpoint

    say(_saved(model, kind))
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
