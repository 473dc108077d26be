"""What one client may ask for, and how long it may take, before anything is spent on it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tinygpt.config import Config
from tinygpt.errors import ConfigError


@dataclass(frozen=True)
class Limits(Config):
    """Bounds on every request and connection; the defaults suit one machine and a few people."""

    body_bytes: int = 1 << 20
    """Bytes of a request's body."""
    prompt_tokens: int = 8192
    """Tokens of one prompt."""
    max_tokens: int = 4096
    """Tokens of each text; a request for more gets this many."""
    choices: int = 16
    """Texts of one request: its prompts times n."""
    queue: int = 128
    """Texts that may wait for a slot, and texts that may wait for their scores."""
    stops: int = 64
    """Stop strings of one request."""
    stop_length: int = 128
    """Characters of a stop string."""
    logprobs: int = 5
    """Likeliest tokens reported with each token."""
    top_logprobs: int = 20
    """The same in a chat."""
    messages: int = 256
    """Messages of one chat."""
    request_seconds: float = 300.0
    """Time for one answer; what is written by then is what there is."""
    header_seconds: float = 10.0
    """Time to send the head of a request, from the first byte or the answer before."""
    body_seconds: float = 20.0
    """Time to send the body of a request."""
    write_seconds: float = 20.0
    """Time a client may leave bytes unread before it is cut off."""
    connections: int = 256
    """Connections at once."""
    shutdown_seconds: int = 30
    """Time for running answers to end when the server is stopped."""

    def check(self) -> None:
        """Anything above nothing is a limit; ConfigError otherwise."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = (
                0 if field.name in ("queue", "shutdown_seconds", "logprobs", "top_logprobs") else 1
            )
            if value < least and not (isinstance(value, float) and value > 0):
                raise ConfigError(f"{field.name}={value!r} is no limit: give a number above 0.")
