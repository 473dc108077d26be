"""One text of an answer while it is generated: the part that can be sent, with its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinygpt.server.engine.sequence import Piece

LEAST_LOGPROB = -9999.0
"""Replaces the log probability of an impossible token: JSON has no infinity."""


@dataclass
class Delta:
    """New text, and new tokens."""

    text: str = ""
    tokens: list[Piece] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)

    def __iadd__(self, other: Delta) -> Delta:
        self.text += other.text
        self.tokens += other.tokens
        return self


class Choice:
    """Turns the pieces of a sequence into deltas.

    A token is sent together with the text that it begins, so one that a stop string cuts off is
    not sent, as its text is not.
    """

    def __init__(self, index: int, echo: Delta, with_tokens: bool) -> None:
        """Without ``with_tokens`` deltas hold text only, which is faster."""
        self.index, self.echo, self.with_tokens = index, echo, with_tokens
        self.count = 0
        """Tokens that were generated."""
        self.finish_reason: str | None = None
        self._sent = 0  # characters of the generated text
        self._pending: deque[Piece] = deque()

    def take(self, pieces: Sequence[Piece]) -> Delta:
        """Take the next tokens; -> what can be sent now."""
        self.count += len(pieces)
        text = "".join([piece.text for piece in pieces])
        if not self.with_tokens:
            return Delta(text)
        self._pending += pieces
        self._sent += len(text)
        return Delta(text, self._begun(self._sent))

    def end(self, reason: str | None) -> Delta:
        """End the text; -> tokens whose characters stayed incomplete.

        The finish reason is "length" unless a stop string, or a token that ends texts, came.
        """
        self.finish_reason = "stop" if reason == "stop" else "length"
        return Delta() if reason == "stop" else Delta("", list(self._pending))

    def _begun(self, end: int) -> list[Piece]:
        begun = []
        while self._pending and self._pending[0].begins < end:
            begun.append(self._pending.popleft())
        return begun


def token_name(raw: bytes) -> str:
    """A token's text; if it holds parts of characters, as OpenAI writes it.

    >>> token_name(b"A"), token_name(bytes([226]))
    ('A', 'bytes:\\\\xe2')
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float | None) -> float | None:
    """A log probability that JSON can hold."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
