"""The JSON of answers, as OpenAI's clients expect it: of completions and of chats, whole and in
chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tinygpt.server.openai.choices import Choice, Delta, Told, finite, token_name
from tinygpt.text.tokenizers import Tokenizer

Json = dict[str, Any]


def usage(prompt_tokens: int, choices: Iterable[Choice]) -> Json:
    """How many tokens went in and came out; a prompt counts once, however many texts it gets."""
    completion_tokens = sum(choice.count for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


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

    def whole(self, texts: Sequence[tuple[Choice, Delta]], counted: Json) -> Json:
        """The answer when all of it is there."""
        choices = [self.choice(choice, delta) for choice, delta in texts]
        return {**self.head, "object": self.kind, "choices": choices, "usage": counted}

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        """A part of a streamed answer."""
        return {**self.head, "object": self.chunk_kind, "choices": choices, **more}

    def choice(self, choice: Choice, delta: Delta) -> Json:
        return self._choice(choice, delta, choice.finish_reason)

    def opening(self, choice: Choice) -> Json | None:
        """What a stream sends before the first token."""
        return self.part(choice, choice.echo) if choice.echo else None

    def part(self, choice: Choice, delta: Delta) -> Json:
        return self._choice(choice, delta, None)

    def closing(self, choice: Choice) -> Json:
        return self._choice(choice, Delta(), choice.finish_reason)

    def _choice(self, choice: Choice, delta: Delta, reason: str | None) -> Json:
        told = None if self.logprobs is None else self._logprobs(delta.tokens)
        return {
            "text": delta.text,
            "index": choice.index,
            "logprobs": told if delta.tokens else None,
            "finish_reason": reason,
        }

    def _logprobs(self, tokens: Sequence[Told]) -> Json:
        return {
            "tokens": [token_name(self.tokenizer, t.id) for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if self.logprobs else None,
            "text_offset": [t.offset for t in tokens],
        }

    def _top(self, token: Told) -> dict[str, float | None] | None:
        """The likeliest, and the one that was taken, which may be less likely."""
        if token.logprob is None:
            return None
        pairs = dict((*token.top, (token.id, token.logprob)))
        return {token_name(self.tokenizer, id_): finite(value) for id_, value in pairs.items()}


class ChatShape(CompletionShape):
    """Answers of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl-"

    def choice(self, choice: Choice, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        told = None if self.logprobs is None else self._logprobs(delta.tokens)
        return self._put(choice, "message", message, told, choice.finish_reason)

    def opening(self, choice: Choice) -> Json | None:
        return self._put(choice, "delta", {"role": "assistant", "content": ""}, None, None)

    def part(self, choice: Choice, delta: Delta) -> Json:
        told = None if self.logprobs is None else self._logprobs(delta.tokens)
        return self._put(choice, "delta", {"content": delta.text}, told, None)

    def closing(self, choice: Choice) -> Json:
        return self._put(choice, "delta", {}, None, choice.finish_reason)

    def _put(
        self, choice: Choice, name: str, content: Json, told: Json | None, reason: str | None
    ) -> Json:
        return {"index": choice.index, name: content, "logprobs": told, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Told]) -> Json:
        content = [
            {**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*each) for each in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        return {
            "token": token_name(self.tokenizer, token),
            "logprob": finite(logprob),
            "bytes": list(self.tokenizer.decode_bytes([token])),
        }
