"""What is served: a model with its tokenizer and its engine, under a name."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from tinygpt.model.transformer import Transformer
from tinygpt.server.engine.scheduler import Engine
from tinygpt.server.http.body import read_json
from tinygpt.server.http.limits import Limits
from tinygpt.server.http.refusal import Refusal
from tinygpt.server.openai.metrics_page import Counts
from tinygpt.server.openai.schema import Schema, check
from tinygpt.text.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

IGNORED = "x-tinygpt-ignored-fields"
PLAIN = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
"""Names that a log or a header may show; others could hold anything."""
MOST_NAMES = 32
"""Names in one header."""
REMEMBERED = 1000


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
    beginnings: Callable[[], list[str]] = list
    """Finds texts that a page offers as beginnings."""
    _logged: set[str] = field(default_factory=set, init=False)

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

    def ignored(self, paths: Iterable[str]) -> dict[str, str]:
        """The header that names a body's unknown fields; the log names each of them once."""
        names = sorted({p if PLAIN.fullmatch(p) else "(other)" for p in paths})[:MOST_NAMES]
        new = [name for name in names if name not in self._logged]
        if new and len(self._logged) < REMEMBERED:
            self._logged.update(new)
            listed = ", ".join(new)
            logger.warning("Requests have unknown fields, which are ignored: %s", listed)
        return {IGNORED: ", ".join(names)} if names else {}
