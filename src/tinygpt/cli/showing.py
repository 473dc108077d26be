"""``tinygpt info``: what a checkpoint or a run holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt.cli.console import aligned, show_json
from tinygpt.cli.flags import Switch
from tinygpt.cli.newest import run_or_newest
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError
from tinygpt.files.disk import size


def info(path: Path | None = None, /, *, json: Switch = False) -> None:
    """Show what a checkpoint, or the best one of a run, holds.

    Parameters
    ----------
    path
        Checkpoint or run folder. [default: the newest run in runs/]
    json
        Print everything as JSON, the tensors' names, types and shapes included.
    """
    from tinygpt.runs import checkpoint
    from tinygpt.runs.folder import (
        best_checkpoint,
        bytes_per_token_of,
        choose_checkpoint,
        list_checkpoints,
        number_of,
    )
    from tinygpt.training.metrics import bits_per_byte

    path = run_or_newest(path)
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint and no run at {path}.")
    chosen = choose_checkpoint(path)
    found = {"path": str(chosen), **checkpoint.describe(chosen)}
    loss = number_of(found["progress"] or {}, "best_val_loss")
    found["best_bits_per_byte"] = bits_per_byte(loss, bytes_per_token_of(chosen))
    if json:
        show_json(found)
        return
    print(aligned(_summary(found, GPTConfig.from_dict(found["model"]))))
    for title in ("model", "train"):
        if found[title]:
            print(f"\n[{title}]")
            print(aligned([(name, _shown(value)) for name, value in found[title].items()]))
    if path.is_dir():
        print("\n[checkpoints]")
        best = best_checkpoint(path)
        print(aligned([(p, "best" * (p == best)) for p in list_checkpoints(path)]))


def _shown(value: object) -> object:
    """Texts such as a line break in quotes, so that they can be seen."""
    return repr(value) if isinstance(value, str) and not value.isprintable() else value


def _in_memory(count: int) -> str:
    """What so many weights take to write with: as they are, with --dtype, and with --quantize."""
    named = {"float32": 4, "bfloat16 or float16": 2, "int8": 1, "int4": 0.5625}
    return ", ".join(
        f"{size(int(count * bytes_each))} in {name}" for name, bytes_each in named.items()
    )


def _summary(found: dict[str, Any], config: GPTConfig) -> list[tuple[str, object]]:
    tensors, progress = found["tensors"], found["progress"] or {}
    tokenizer = found["tokenizer"] or {}
    rows: list[tuple[str, object]] = [
        ("checkpoint", found["path"]),
        ("format", found["format_version"]),
        ("size", f"{size(found['bytes'])} in {len(tensors)} tensors"),
        ("step", f"{found['iter_num']:,}"),
        ("parameters", f"{config.num_params():,}"),
        ("in memory", _in_memory(config.num_params())),
        ("optimizer", "yes" if any(n.startswith("optimizer.") for n in tensors) else "no"),
        ("tokenizer", tokenizer.get("kind", "none")),
    ]
    if init := found.get("init"):
        rows.append(("began with", f"{init.get('path')}, step {init.get('iter_num')}"))
    best, bits = progress.get("best_val_loss"), found["best_bits_per_byte"]
    in_bits = "" if bits is None else f" ({bits:.4f} bits per byte)"
    return rows if best is None else [*rows, ("best loss", f"{best:.4f}{in_bits}")]
