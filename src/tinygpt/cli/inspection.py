"""``tinygpt plot``, ``info``, ``gradcheck`` and ``doctor``: looking at runs, files and machines."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.cli.console import aligned, say, show_json
from tinygpt.cli.options import Switch, Values, flags
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.machine import device
from tinygpt.machine.doctor import clear_caches, examine, time_devices

SMALL_MODEL: Values = {
    "block_size": 8,
    "vocab_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
}
"""What ``gradcheck`` checks unless told otherwise: it takes many forward passes."""

if TYPE_CHECKING:
    SmallModelFlags = dict[str, Any]
else:
    SmallModelFlags = flags(GPTConfig, "Model", SMALL_MODEL)


def plot(
    *runs: Path,
    out: Path | None = None,
    terminal: Switch = False,
) -> None:
    """Draw the loss curves of runs, in the terminal or as a PNG or SVG.

    Parameters
    ----------
    runs
        Run folders; several are drawn over each other.
    out
        File to draw into, .png or .svg.
    terminal
        Draw in the terminal, also with --out.
    """
    from tinygpt.runs.plots import save_plot, terminal_plot

    if not runs:
        raise UsageError("Say which run to draw: the folder that training wrote.")
    if out is not None:
        say(f"drew {save_plot(runs, out)}")
    if terminal or out is None:
        size = shutil.get_terminal_size((100, 30))
        height = max(min(size.lines - 2, 32), 12)
        print(terminal_plot(runs, min(size.columns, 140), height, color=sys.stdout.isatty()))


def info(path: Path, /, *, json: Switch = False) -> None:
    """Show what a checkpoint, or the best one of a run, holds.

    Parameters
    ----------
    path
        Checkpoint or run folder.
    json
        Print everything as JSON, the tensors' names, types and shapes included.
    """
    from tinygpt.runs import checkpoint
    from tinygpt.runs.folder import best_checkpoint, choose_checkpoint, list_checkpoints

    if not path.exists():
        raise CheckpointError(f"There is no checkpoint and no run at {path}.")
    chosen = choose_checkpoint(path)
    found = {"path": str(chosen), **checkpoint.describe(chosen)}
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


def _summary(found: dict[str, Any], config: GPTConfig) -> list[tuple[str, object]]:
    tensors, progress = found["tensors"], found["progress"] or {}
    tokenizer = found["tokenizer"] or {}
    rows: list[tuple[str, object]] = [
        ("checkpoint", found["path"]),
        ("format", found["format_version"]),
        ("size", f"{found['bytes'] / 1e6:,.1f} MB in {len(tensors)} tensors"),
        ("step", f"{found['iter_num']:,}"),
        ("parameters", f"{config.num_params():,}"),
        ("optimizer", "yes" if any(n.startswith("optimizer.") for n in tensors) else "no"),
        ("tokenizer", tokenizer.get("kind", "none")),
    ]
    if init := found.get("init"):
        rows.append(("began with", f"{init.get('path')}, step {init.get('iter_num')}"))
    best = progress.get("best_val_loss")
    return rows if best is None else [*rows, ("best loss", f"{best:.4f}")]


def gradcheck(
    *,
    model: SmallModelFlags | None = None,
    batch_size: int = 2,
    samples: int = 3,
    seed: int = 1337,
    json: Switch = False,
) -> int:
    """Check the model's gradients against numeric ones in float64; exit code 1 if one is wrong.

    Without flags it checks a small model; with --model flags one of that shape.

    Parameters
    ----------
    batch_size
        Sequences of random tokens in the batch.
    samples
        Single elements tried per parameter, besides a random direction.
    seed
        Seed of weights, tokens and directions.
    json
        Print the report as JSON.
    """
    config = GPTConfig.from_dict({**SMALL_MODEL, **(model or {})})
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is too small: it must be at least 1.")
    device.require_device()
    import numpy as np
    from tinygrad import Tensor

    from tinygpt.model.transformer import Transformer
    from tinygpt.training.gradcheck import gradcheck as check

    shape = (batch_size, config.block_size + 1)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)
    idx, targets = Tensor(tokens[:, :-1].copy()), Tensor(tokens[:, 1:].copy())
    report = check(Transformer(config, seed), idx, targets, samples=samples, seed=seed)
    if json:
        show_json(report.to_dict())
    else:
        print(report.table())
    return 0 if report.ok else 1


def doctor(*, json: Switch = False, clear_cache: Switch = False) -> int:
    """Look at device, compiler, caches, versions and vocabulary, and say how to mend them.

    Where there are several devices, a small step is timed on each of them. The exit code is 1 if
    something is missing that tinygpt cannot do without.

    Parameters
    ----------
    json
        Print the checks as JSON.
    clear_cache
        First delete compiled kernels and token files, which are made again when they are needed.
    """
    if clear_cache:
        freed, failed = clear_caches()
        say(f"cleared {freed / 1e6:,.1f} MB of kernels and token files")
        for path in failed:
            say(f"could not delete {path}")
    checks = [*examine(), *time_devices()]
    healthy = all(check.ok or check.optional for check in checks)
    if json:
        show_json({"ok": healthy, "checks": [vars(check) for check in checks]})
        return 0 if healthy else 1
    marks = {(True, False): "ok", (True, True): "ok", (False, True): "optional"}
    rows = [(marks.get((c.ok, c.optional), "MISSING"), c.name, c.found) for c in checks]
    print(aligned(rows))
    cures = list(dict.fromkeys((c.name, c.cure) for c in checks if not c.ok and c.cure))
    if cures:
        print("\nTo mend it:")
        print(aligned([(f"  {name}", cure) for name, cure in cures]))
    print("\nEverything needed is there." if healthy else "\nSomething needed is missing.")
    return 0 if healthy else 1
