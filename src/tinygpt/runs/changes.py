"""What may differ between a run and its resumption, and what was allowed to.

A run that goes on with another text or other settings is another run under the old one's name.
So it is refused, unless the user names the fields that are meant to change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import ChangedRunError, CheckpointError, UsageError, nearest
from tinygpt.files.strict_json import to_json
from tinygpt.runs.checkpoint import Meta
from tinygpt.text.batches import ORDER

ALWAYS_FREE = {
    "eval_interval",
    "eval_iters",
    "checkpoint_interval",
    "keep_last",
    "early_stop_patience",
    "sample_interval",
    "sample_prompt",
    "max_skipped",
    "devices",
    "shard_optimizer",
    "recompute",
}
"""Settings that do not change the course of the weights."""
ORDER_CHANGED = "batches"
"""The change of a run that was begun when batches were drawn in another way."""
TOLD = {ORDER_CHANGED, "dtype"}
"""Changes that a notice reports, and that need no permission: weights and moments are float32."""
SHAPE = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "tie_embeddings"}
"""What decides which weights there are, and what they mean."""
LEARNING = {"freeze", "lora_rank", "lora_alpha", "lora_layers", "lora_rows", "init", "optimizer"}
"""What decides which weights learn, and how, and where they began."""
START_ANEW = (
    "To go on in another way from the weights of a run, start a new one from it, with --init."
)
FIXED = {
    **dict.fromkeys(
        SHAPE,
        "it is part of the model's shape, and the checkpoint's weights would not fit. Use the "
        "run's own settings, or start a new run in another folder.",
    ),
    **dict.fromkeys(
        LEARNING,
        "the optimizer's moments are those of the weights that learned so far, and others would "
        f"learn, or in another way. Use the run's own settings. {START_ANEW}",
    ),
}
"""Fields that never change within a run, and why."""
TRAIN_FIELDS = [f.name for f in fields(TrainConfig)]
MODEL_FIELDS = [f.name for f in fields(GPTConfig)]
FIELDS = [f for f in (*TRAIN_FIELDS, *MODEL_FIELDS, "data", "tokenizer") if f not in FIXED]
"""What can be named in ``allow_change``."""
KNOWN = ", ".join(FIELDS)


@dataclass(frozen=True)
class Change:
    """A field that is not what it was."""

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} (was {self.was!r}, now {self.now!r})"

    def at(self, iter_num: int) -> dict[str, Any]:
        """The record of a change that was allowed, as it is kept in the checkpoints."""
        return {"iter": iter_num, **asdict(self)}


def parse(allow: Sequence[str]) -> frozenset[str]:
    """The names in ``allow``, checked; UsageError for one that is unknown or can never change."""
    for name in allow:
        if name not in FIELDS and name not in FIXED:
            raise UsageError(
                f"There is no field {name!r} to allow.{nearest(name, FIELDS)} Known: {KNOWN}."
            )
        if name in FIXED:
            raise UsageError(f"{name} cannot change within a run: {FIXED[name]}")
    return frozenset(allow)


def differences(
    meta: Meta,
    model: GPTConfig,
    train: TrainConfig,
    data: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None,
) -> list[Change]:
    """Every field that is not what it was when the checkpoint was written."""
    found = list(_differing(meta.model.to_dict(), model.to_dict()))
    if meta.train is not None:
        found += _differing(meta.train.to_dict(), train.to_dict())
    if meta.data is not None and dict(meta.data) != dict(data):
        found.append(Change("data", _texts(meta.data), _texts(data)))
    if _vocabulary_alone(meta.tokenizer) != _vocabulary_alone(tokenizer):
        found.append(Change("tokenizer", vocabulary(meta.tokenizer), vocabulary(tokenizer)))
    if meta.train is not None and (meta.random_state or {}).get("order", 0) != ORDER:
        found.append(Change(ORDER_CHANGED, "from random places", "each token once an epoch"))
    return [change for change in found if change.field not in ALWAYS_FREE]


def check(path: Path, found: Sequence[Change], allow: frozenset[str], iter_num: int) -> None:
    """Raise ChangedRunError unless everything that differs is allowed, and makes sense."""
    refused = [change for change in found if change.field not in allow | TOLD]
    if fixed := [change for change in refused if change.field in FIXED]:
        raise CheckpointError(
            f"{path} cannot be resumed with {', '.join(map(str, fixed))}: {FIXED[fixed[0].field]}"
        )
    if refused:
        raise ChangedRunError(
            f"{path} cannot be resumed: {', '.join(map(str, refused))} would change. Use the run's "
            f"own settings and data, or start a new run in another folder",
            tuple(change.field for change in refused),
        )
    for change in found:
        if change.field == "max_iters" and change.now < iter_num:
            raise UsageError(
                f"max_iters={change.now} is less than the {iter_num} steps that {path} has done."
            )


def check_random_state(path: Path, meta: Meta) -> None:
    """The seed and the step are all the randomness there is: a run without them is another run."""
    if meta.train is None:  # not of a run: weights and moments alone
        return
    wanted = {"seed": meta.train.seed, "step": meta.iter_num}
    if {k: v for k, v in (meta.random_state or {}).items() if k != "order"} != wanted:
        raise CheckpointError(
            f"{path} has lost its random state: it says {meta.random_state}, and its settings say "
            f"{wanted}. It cannot be resumed bit for bit; use another checkpoint."
        )


def past(progress: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The changes that were allowed before, as a checkpoint tells them."""
    kept = progress.get("changes")
    return [row for row in kept if isinstance(row, dict)] if isinstance(kept, list) else []


def as_comments(changes: Iterable[Mapping[str, Any]]) -> str:
    """The changes of a run as comments of its config.toml."""
    lines = [f"# {to_json(dict(change))}" for change in changes]
    return "\n".join(["", "# Changed on the way:", *lines, ""]) if lines else ""


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[Change]:
    return (Change(k, then[k], v) for k, v in now.items() if k in then and then[k] != v)


def _texts(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {str(value)[:12]}…" for part, value in data.items())


def _vocabulary_alone(tokenizer: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What makes the tokens of a text: the chat template, which may be new, is none of it."""
    return tokenizer and {name: each for name, each in tokenizer.items() if name != "template"}


def vocabulary(tokenizer: Mapping[str, Any] | None) -> str:
    if tokenizer is None:
        return "none"
    text = to_json(tokenizer, sort=True, other=str)
    return f"{tokenizer.get('kind')} {hashlib.sha256(text.encode()).hexdigest()[:12]}…"
