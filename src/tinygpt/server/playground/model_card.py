"""The model's card: its shape, and how its checkpoint and its run say that it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt.config import MAX_TOKENS, SampleConfig
from tinygpt.errors import CheckpointError
from tinygpt.pages.run_card import run_card
from tinygpt.runs.folder import choose_checkpoint
from tinygpt.server.openai.service import Service
from tinygpt.text.tokenizers import ends_of


def model_card(service: Service) -> dict[str, Any]:
    """The card as JSON values."""
    config, tokenizer = service.model.config, service.tokenizer
    return {
        "name": service.name,
        **_history(service.folder),
        "parameters": service.model.num_params(),
        "dtype": service.model.rounded_to or "float32",
        "config": config.to_dict(),
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "ends": bool(ends_of(tokenizer)),
        },
        "sampling": {**SampleConfig().to_dict(), "max_tokens": MAX_TOKENS},
        "can": {"attention": True, "api": True},
        "limits": {
            "max_tokens": service.limits.max_tokens,
            "prompt_tokens": service.limits.prompt_tokens,
        },
    }


def _history(folder: Path | None) -> dict[str, Any]:
    """The card of the training; empty where no checkpoint can be read."""
    try:
        return {} if folder is None else run_card(choose_checkpoint(folder))
    except CheckpointError:
        return {}
