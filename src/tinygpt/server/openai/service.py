"""What is served: a model with its tokenizer and its engine, under a name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from tinygpt.model.transformer import Transformer
from tinygpt.server.engine.scheduler import Engine
from tinygpt.server.http.body import read_json
from tinygpt.server.http.limits import Limits
from tinygpt.server.http.refusal import Refusal
from tinygpt.server.openai.ignored import Ignored
from tinygpt.server.openai.metrics_page import Counts
from tinygpt.server.openai.schema import Schema, check
from tinygpt.text.tokenizers import Tokenizer


@dataclass
class Service:
    """One model behind HTTP. Every handler of a request takes it as an argument."""

    engine: Engine
    model: Transformer
    tokenizer: Tokenizer
    name: str
    """What clients call the model: the name of the run's folder."""
    folder: Path | None = None
    """Folder of the run, or the checkpoint; None for a model from elsewhere."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds of the checkpoint, or of the start."""
    limits: Limits = field(default_factory=Limits)
    counts: Counts = field(default_factory=Counts)
    strict: bool = False
    """Whether unknown fields are refused."""
    ignored: Ignored = field(default_factory=Ignored)
    beginnings: Callable[[], list[str]] = list
    """Finds texts that a page offers as beginnings."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that may stand in a prompt: the model and the tokenizer both have them."""
        return min(self.model.config.vocab_size, self.tokenizer.vocab_size)

    async def body(self, request: Request, schema: Schema) -> Any:
        """The JSON in a request, checked against a schema; Refusal if anything is wrong.

        A wrong model is OpenAI's 404, whatever else may be wrong.
        """
        body = await read_json(request, self.limits)
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            self.check_name(body["model"])
        check(body, schema)
        return body

    def check_name(self, model: str) -> None:
        """Refuse the name of a model that is not served."""
        if model != self.name:
            message = f"There is no such model here. The one that is served: {self.name}"
            raise Refusal(404, message, param="model", code="model_not_found")
