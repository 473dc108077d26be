"""What is served: a model with its tokenizer and its engine, under a name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tinygpt.model.transformer import Transformer
from tinygpt.server.engine.scheduler import Engine
from tinygpt.server.http.limits import Limits
from tinygpt.server.openai.ignored import Ignored
from tinygpt.server.openai.metrics_page import Counts
from tinygpt.text.tokenizers import Tokenizer


@dataclass
class Service:
    """One model behind HTTP. Everything that answers a request gets it by hand."""

    engine: Engine
    model: Transformer
    tokenizer: Tokenizer
    name: str
    """What clients call the model: the name of the run's folder."""
    folder: Path | None = None
    """Folder of the run, or the checkpoint; None for a model that comes from elsewhere."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds of the checkpoint, or of the start."""
    limits: Limits = field(default_factory=Limits)
    counts: Counts = field(default_factory=Counts)
    strict: bool = False
    """Whether fields that nobody knows are refused."""
    ignored: Ignored = field(default_factory=Ignored)
    beginnings: Callable[[], list[str]] = list
    """Finds texts that a page may begin with."""

    @property
    def vocab_size(self) -> int:
        """Ids that may stand in a prompt: those that the model and the tokenizer both have."""
        return min(self.model.config.vocab_size, self.tokenizer.vocab_size)
