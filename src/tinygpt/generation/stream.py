"""Text in, text out, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from tinygpt.config import SampleConfig
from tinygpt.errors import TokenizerError, UsageError
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import generate_tokens
from tinygpt.model.transformer import Transformer
from tinygpt.text.tokenizers import TextStream, Tokenizer, ends_of


def generate_text(
    model: Transformer | Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    config: SampleConfig | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    *,
    ignore_eos: bool = False,
) -> Iterator[str]:
    """Continue a text, yielding pieces as soon as they are whole characters, without the prompt.

    Generation ends before the first of the ``stop`` strings, of which nothing is yielded even where
    it falls into several tokens; and at a token that ends a text, which is not yielded either,
    unless ``ignore_eos``. Special tokens written in the prompt are plain text.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError(
            f"The prompt {prompt!r} is empty. Give at least one character, such as '\\n'."
        )
    ends = () if ignore_eos else ends_of(tokenizer)
    return continued(model, tokenizer, ids, max_tokens, config, seed, stop, ends)


def continued(
    model: Transformer | Decoder,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    max_tokens: int,
    config: SampleConfig | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> Iterator[str]:
    """``generate_text`` for a prompt of token ids; the text ends at any of the ids in ``ends``."""
    stopper = StopStrings(stop)
    limit = tokenizer.vocab_size  # a model may have more ids, which decode to nothing
    tokens = generate_tokens(model, [ids], max_tokens, config, seed, limit=limit, ends=ends)

    def pieces() -> Iterator[str]:
        stream = TextStream(tokenizer)
        for (token,) in tokens:
            if token in ends:
                break
            if piece := stopper.push(stream.push(int(token))):
                yield piece
            if stopper.stopped:
                return
        if piece := stopper.push(stream.flush()) + stopper.flush():
            yield piece

    return pieces()


def first_prompt(tokenizer: Tokenizer) -> str:
    """What a text without a prompt goes on from: a line break, or else the first token's text.

    A vocabulary of characters may hold no line break.
    """
    for text in ("\n", *(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))):
        with suppress(TokenizerError):
            if tokenizer.encode(text):
                return text
    raise UsageError("The vocabulary holds no token that a text could begin with.")


class StopStrings:
    """Passes text on up to the first of some strings, holding back what may be its beginning.

    >>> stopper = StopStrings(["END"])
    >>> stopper.push("The E"), stopper.push("agle. EN"), stopper.push("D."), stopper.stopped
    ('The ', 'Eagle. ', '', True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise UsageError(f"stop={strings!r} is not a list of non-empty strings.")
        self.stopped = False
        self._strings, self._held = tuple(strings), ""

    def push(self, text: str) -> str:
        """Take some text; return what can be passed on."""
        if self.stopped:
            return ""
        if not self._strings:
            return text
        held = self._held + text
        # The first to be complete counts, of those the longest: however the text is cut up.
        ends = [(held.find(s) + len(s), -len(s)) for s in self._strings if s in held]
        if ends:
            self.stopped, self._held = True, ""
            end, minus_length = min(ends)
            return held[: end + minus_length]
        keep = max((_overlap(held, s) for s in self._strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``string``."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
