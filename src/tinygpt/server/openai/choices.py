"""One text of an answer while it is written: what of it can be sent, and which tokens it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinygpt.server.engine.sequence import Piece
from tinygpt.text.tokenizers import TextStream, Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for a token that is out of the question: JSON has no infinity."""


@dataclass(frozen=True)
class Told:
    """A token of a text, with its log probability: None for the first, which nothing precedes."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int
    """Where in the text it begins, in characters."""


@dataclass
class Delta:
    """What is new of a text."""

    text: str = ""
    tokens: list[Told] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Choice:
    """Turns the pieces of a stream into deltas.

    A token is told together with the text that it begins, so one that a stop string cuts off is
    told no more than its text is.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, echo: Delta, tells_tokens: bool) -> None:
        """Only with ``tells_tokens`` do deltas say which tokens they were: it takes its time."""
        self.index, self.echo, self.tells_tokens = index, echo, tells_tokens
        self.count = 0
        """Tokens that were generated."""
        self.finish_reason: str | None = None
        self._decoded = TextStream(tokenizer)
        self._begins = self._sent = len(self.echo.text)
        self._untold: deque[Told] = deque()

    def take(self, pieces: Sequence[Piece]) -> Delta:
        """The next tokens; -> what can be sent with them."""
        self.count += len(pieces)
        text = "".join([piece.text for piece in pieces])
        if not self.tells_tokens:
            return Delta(text)
        for piece in pieces:
            self._untold.append(Told(piece.token, piece.logprob, piece.top, self._begins))
            self._begins += len(self._decoded.push(piece.token))
        self._sent += len(text)
        return Delta(text, self._told(self._sent))

    def end(self, reason: str | None) -> Delta:
        """No more will come; -> tokens whose characters stayed incomplete.

        Whatever ended the text but a stop string, the client hears that its length did.
        """
        self.finish_reason = "stop" if reason == "stop" else "length"
        return Delta() if reason == "stop" else Delta("", self._told(self._begins + 1))

    def _told(self, end: int) -> list[Told]:
        told = []
        while self._untold and self._untold[0].offset < end:
            told.append(self._untold.popleft())
        return told


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; one that holds parts of characters as OpenAI writes it.

    >>> from tinygpt.text.tokenizers import ByteTokenizer
    >>> token_name(ByteTokenizer(), 65), token_name(ByteTokenizer(), 226)
    ('A', 'bytes:\\\\xe2')
    """
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float | None) -> float | None:
    """A log probability that JSON can hold."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
