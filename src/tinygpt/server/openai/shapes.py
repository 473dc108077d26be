"""The JSON of answers in OpenAI's shapes: completions and chats, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from tinygpt.server.engine.sequence import Piece
from tinygpt.server.openai.choices import Choice, Delta, finite, token_name
from tinygpt.text.tokenizers import Tokenizer

Json = dict[str, Any]


class CompletionShape:
    """Answers of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self.tokenizer, self.logprobs = tokenizer, logprobs
        self.head: Json = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[tuple[Choice, Delta]], usage: Json) -> Json:
        """The whole answer."""
        choices = [self.choice(choice, delta) for choice, delta in texts]
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        """A part of a streamed answer."""
        return {**self.head, "object": self.chunk_kind, "choices": choices, **more}

    def choice(self, choice: Choice, delta: Delta) -> Json:
        """A whole text."""
        return self.part(choice, delta, choice.finish_reason)

    def opening(self, choice: Choice) -> Json | None:
        """What a stream sends before the first token."""
        return self.part(choice, choice.echo) if choice.echo else None

    def part(self, choice: Choice, delta: Delta, reason: str | None = None) -> Json:
        """A part of a text; the last has a reason, and nothing else."""
        return {
            "text": delta.text,
            "index": choice.index,
            "logprobs": self._logprobs(choice, delta) if delta.tokens else None,
            "finish_reason": reason,
        }

    def _logprobs(self, choice: Choice, delta: Delta) -> Json | None:
        if self.logprobs is None:
            return None
        echoed, tokens = len(choice.echo.text), delta.tokens
        return {
            "tokens": [token_name(t.raw) for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if self.logprobs else None,
            "text_offset": [echoed + t.begins for t in tokens],
        }

    def _top(self, token: Piece) -> dict[str, float | None] | None:
        """The likeliest tokens and the chosen one, by name."""
        if token.logprob is None:
            return None
        top = {token_name(self.raw(id_)): finite(value) for id_, value in token.top}
        return {**top, token_name(token.raw): finite(token.logprob)}

    def raw(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.tokenizer.decode_bytes([token])


class ChatShape(CompletionShape):
    """Answers of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl-"

    def choice(self, choice: Choice, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        logprobs = self._logprobs(choice, delta)
        return self._put(choice, choice.finish_reason, logprobs, message=message)

    def opening(self, choice: Choice) -> Json | None:
        return self._put(choice, None, None, delta={"role": "assistant", "content": ""})

    def part(self, choice: Choice, delta: Delta, reason: str | None = None) -> Json:
        if reason is not None:
            return self._put(choice, reason, None, delta={})
        return self._put(choice, None, self._logprobs(choice, delta), delta={"content": delta.text})

    def _put(self, choice: Choice, reason: str | None, logprobs: Json | None, **said: Json) -> Json:
        return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, choice: Choice, delta: Delta) -> Json | None:
        if self.logprobs is None:
            return None
        content = [
            {
                **_entry(t.raw, t.logprob),
                "top_logprobs": [_entry(self.raw(id_), value) for id_, value in t.top],
            }
            for t in delta.tokens
        ]
        return {"content": content, "refusal": None}


def _entry(raw: bytes, logprob: float | None) -> Json:
    return {"token": token_name(raw), "logprob": finite(logprob), "bytes": list(raw)}
