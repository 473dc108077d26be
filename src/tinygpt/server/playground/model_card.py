"""What the model is, and what its checkpoint and its run say of how it came to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt.errors import CheckpointError
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import choose_checkpoint, text_of
from tinygpt.server.openai.service import Service


def model_card(service: Service) -> dict[str, Any]:
    """Everything that a page tells of the model."""
    config, tokenizer = service.model.config, service.tokenizer
    return {
        "name": service.name,
        "parameters": service.model.num_params(),
        "config": config.to_dict(),
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
        "limits": {
            "max_tokens": service.limits.max_tokens,
            "prompt_tokens": service.limits.prompt_tokens,
        },
        **_history(service.folder),
    }


def _history(folder: Path | None) -> dict[str, Any]:
    """Of the training, as far as anybody wrote it down."""
    unknown = dict.fromkeys(("step", "best_val_loss", "best_iter", "train", "data"))
    if folder is None:
        return unknown
    try:
        meta = checkpoint.read_meta(choose_checkpoint(folder))
    except CheckpointError:
        return unknown
    return {
        "step": meta.iter_num,
        "best_val_loss": meta.progress.get("best_val_loss"),
        "best_iter": meta.progress.get("best_iter"),
        "train": None if meta.train is None else meta.train.to_dict(),
        "data": text_of(folder),
    }
