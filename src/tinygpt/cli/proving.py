"""``tinygpt doctor --resume``: the proof that a run which was stopped goes on bit for bit."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

from tinygpt.cli.console import aligned, say, show_json
from tinygpt.cli.flags import Flat, Switch
from tinygpt.cli.options import (
    ModelFlags,
    Settings,
    Tables,
    TrainFlags,
    file_tables,
    given_tables,
    preset_tables,
    resolve,
    run_tables,
)
from tinygpt.cli.running import Material, gather, make_run
from tinygpt.errors import TrainingError, UsageError, extras
from tinygpt.files.atomic import user_path
from tinygpt.machine import children
from tinygpt.machine.device import require_device
from tinygpt.machine.ranks.join import own_launcher
from tinygpt.runs.folder import METRICS, SAMPLES, TOKENIZER, latest_checkpoint
from tinygpt.runs.history import read
from tinygpt.text.corpus import NAMES
from tinygpt.text.names import is_name

VARYING = {"elapsed", "tokens_per_second", "memory", "run", "lost_ranks"}
"""What two equal runs need not have in common: times, lost ranks, and the number of the run."""
MOST_ACCUMULATION = 2
"""Micro-batches of a step in the proof: more would only take longer."""


@dataclass(frozen=True)
class Compared:
    """One kind of thing that two runs leave behind."""

    what: str
    count: int
    differing: tuple[str, ...] = ()
    """Names of those that are not the same in both."""


def verify_resume(
    source: str | None = None,
    /,
    *,
    preset: str | None = None,
    config: Path | None = None,
    tokenizer: str | None = None,
    field: str | None = None,
    glob: str | None = None,
    steps: int = 4,
    ranks: int = 1,
    json: Switch = False,
    model: Annotated[ModelFlags | None, Flat] = None,
    train: Annotated[TrainFlags | None, Flat] = None,
) -> int:
    """Prove on this machine that a run which is stopped and resumed is the run never stopped.

    A few steps are trained at once, and once more with a stop in the middle after which a fresh
    process goes on. Both must leave the same behind, bit for bit. Nothing is kept, and the run
    that is named is not touched. The exit code is 1 if anything differs.

    Parameters
    ----------
    source
        Text as for train, or a run, whose text and settings are taken. [default: auto]
    preset
        demo, baby or gpt2.
    config
        TOML file with tables [model], [train] and [data].
    tokenizer
        gpt2, bpe:N, char, byte, or a saved tokenizer.
    field
        Field of a JSONL file that holds the text. [default: text]
    glob
        Files of a folder that are read. [default: **/*.txt]
    steps
        Steps of the proof, half of them before the stop.
    ranks
        Go on with so many ranks of an MPI (extra mpi), 2 for example; a step then has as many
        micro-batches at least.
    json
        Print the verdict as JSON.
    """
    if steps < 2:
        raise UsageError(f"--steps {steps} is too few: there must be one before and one after.")
    if ranks < 1 or ranks & (ranks - 1):
        raise UsageError(f"--ranks {ranks} is not a power of two, such as 2.")
    if ranks > 1:
        extras.need("mpi", "--ranks", "mpi4py")
    given = {"source": source, "tokenizer": tokenizer, "field": field, "glob": glob}
    tables = given_tables(model, train, given)
    kept = _tables_of_run(source)
    if kept:
        tables["data"].pop("source")
    if "max_iters" in tables["train"]:
        raise UsageError("--max-iters is what --steps says here: give that.")
    resolved = resolve(kept, preset_tables(preset), file_tables(config), tables)
    settings = _short(resolved, steps, tables["train"])
    if settings.train.grad_accum_steps % ranks:
        settings = replace(settings, train=replace(settings.train, grad_accum_steps=ranks))
    device = require_device()
    began = time.perf_counter()
    material = gather(settings)
    with _temporary_folder() as folder:
        compared, same_twice = prove(settings, material, folder, ranks)
    seconds = time.perf_counter() - began
    exact = all(not row.differing for row in compared)
    if json:
        show_json(
            {
                "exact": exact,
                "device": device,
                "steps": steps,
                "seconds": round(seconds, 1),
                "deterministic": same_twice,
                "compared": [asdict(row) for row in compared],
            }
        )
    else:
        print(_table(compared))
        print(_verdict(exact, same_twice, device, steps, seconds))
    return 0 if exact else 1


def _tables_of_run(source: str | None) -> Tables:
    """The settings of a run folder, its tokenizer included; none if ``source`` is no run."""
    folder = user_path(source or "")
    if source is None or is_name(source, NAMES) or not (tables := run_tables(folder)):
        return {}
    saved = folder / TOKENIZER
    if saved.is_file():
        tables.setdefault("data", {})["tokenizer"] = str(saved.resolve())
    return tables


def _short(settings: Settings, steps: int, given: Collection[str]) -> Settings:
    """The same settings for a run of a few steps, with all that a run does in them.

    What was ``given`` as a flag stays as it is.
    """
    train, data = settings.train, settings.data
    shorter: dict[str, Any] = {
        "max_iters": steps,
        "warmup_steps": min(1, train.warmup_steps),
        "eval_interval": max(1, steps // 2),
        "eval_iters": min(2, train.eval_iters),
        "sample_interval": steps,
        "checkpoint_interval": None,
        "keep_last": 0,
        "grad_accum_steps": min(MOST_ACCUMULATION, train.grad_accum_steps),
        "early_stop_patience": train.early_stop_patience and steps,
    }
    train = replace(train, **{name: v for name, v in shorter.items() if name not in given})
    return replace(settings, train=train, data=replace(data, source=data.source or "auto"))


# The proof --------------------------------------------------------------------------------------


def prove(
    settings: Settings, material: Material, folder: Path, ranks: int = 1
) -> tuple[list[Compared], bool | None]:
    """Train twice in ``folder``, once with a stop; -> what is the same.

    Where something is not, the run without a stop is repeated, to tell a device that does not
    repeat itself from a resumption that goes wrong; the second value says which (None: no need).
    """
    steps = settings.train.max_iters
    half = steps // 2
    whole, parts, again = folder / "whole", folder / "parts", folder / "again"
    say(f"{steps} steps at once …")
    _train(settings, material, whole, steps)
    say(f"{half} steps, and a stop …")
    _train(settings, material, parts, half)
    fresh = "a fresh process" if ranks == 1 else f"{ranks} fresh processes"
    say(f"{fresh} for the other {steps - half} …")
    go_on(parts, ranks)
    compared = compare(whole, parts)
    if all(not row.differing for row in compared):
        return compared, None
    say("they differ: is the device to blame? Once more without a stop …")
    _train(settings, material, again, steps)
    return compared, all(not row.differing for row in compare(whole, again))


def _train(settings: Settings, material: Material, folder: Path, steps: int) -> None:
    run = make_run(settings, material, folder)
    for step in run:
        if step.iter == steps:
            run.stop()


def go_on(folder: Path, ranks: int = 1) -> None:
    """Resume a run in a process of its own, or several, as a user does."""
    program = children.python_module("tinygpt", "train", "--resume", "--out", str(folder))
    if ranks > 1:
        program["args"] = [own_launcher(), "-n", str(ranks), *program["args"]]
        more_than_cores = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
        program["env"] = more_than_cores | program["env"]  # for Open MPI
    done = subprocess.run(**program, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise TrainingError(f"The fresh process ended with exit code {done.returncode}:\n{last}")


def compare(one: Path, two: Path) -> list[Compared]:
    """What two run folders hold, from their newest checkpoints and their histories."""
    first, second = _contents(one), _contents(two)
    return [_compared(what, first[what], second[what]) for what in first]


def _contents(folder: Path) -> dict[str, dict[str, Any]]:
    """All that a run leaves behind, but for times and its number: values by kind and name."""
    from tinygpt.runs import checkpoint

    meta, arrays = checkpoint.read(latest_checkpoint(folder))
    found: dict[str, dict[str, Any]] = {
        what: {name: a.tobytes() for name, a in arrays.items() if name.startswith(prefix)}
        for what, prefix in (("weights", "model."), ("optimizer", "optimizer."))
    }
    for what, name in (("metrics", METRICS), ("samples", SAMPLES)):
        rows = [(f"step {row.get('iter')}", row) for row in read(folder / name)]
        found[what] = {f"{step}: {k}": repr(v) for step, row in rows for k, v in row.items()}
    progress = {f"progress: {name}": value for name, value in meta.progress.items()}
    found["state"] = meta.to_dict() | {"progress": None} | progress
    return {
        what: {k: v for k, v in values.items() if k.rpartition(": ")[2] not in VARYING}
        for what, values in found.items()
    }


def _compared(what: str, one: dict[str, Any], two: dict[str, Any]) -> Compared:
    names = {**one, **two}
    differing = [name for name in names if one.get(name) != two.get(name)]
    if what in ("metrics", "samples"):
        differing = [f"{name} {one.get(name)} and {two.get(name)}" for name in differing]
    return Compared(what, len(names), tuple(differing))


# What is said of it -----------------------------------------------------------------------------


def _table(compared: list[Compared]) -> str:
    rows = []
    for row in compared:
        more = f" and {len(row.differing) - 3} more" if len(row.differing) > 3 else ""
        found = "; ".join(row.differing[:3]) + more
        rows.append((row.what, row.count, f"DIFFERS: {found}" if found else "identical"))
    return aligned(rows, right=[1])


def _verdict(exact: bool, same_twice: bool | None, device: str, steps: int, seconds: float) -> str:
    half = steps // 2
    if exact:
        return (
            f"Resuming is exact on {device}: {half} steps, a fresh process and {steps - half} more "
            f"are the {steps} steps never stopped, bit for bit ({seconds:.0f} s)."
        )
    if same_twice:
        return (
            f"RESUMING IS NOT EXACT on {device}, although the same steps, taken twice, give the "
            f"same. That is a fault of this program: please report it with the table above."
        )
    return (
        f"{device} DOES NOT REPEAT ITSELF: the same steps, taken twice without a stop, differ too. "
        f"A resumed run is as good as any other there, but not the same bit for bit."
    )


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that is gone at the end, also when the program is told to end by SIGTERM."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if ours else None
    try:
        with tempfile.TemporaryDirectory(prefix="tinygpt-verify-") as name:
            yield Path(name)
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
