"""``tinygpt doctor --resume``: the proof that a run which was stopped goes on bit for bit."""

from __future__ import annotations

import contextlib
import json as jsonlib
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from tinygpt.cli.console import aligned, say, show_json
from tinygpt.cli.flags import Flat, Switch
from tinygpt.cli.options import (
    Settings,
    Tables,
    file_tables,
    flags,
    given_tables,
    preset_tables,
    resolve,
    run_tables,
)
from tinygpt.cli.running import Material, gather, make_run
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import TrainingError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.machine import children
from tinygpt.machine.device import require_device
from tinygpt.runs.folder import METRICS, SAMPLES, TOKENIZER
from tinygpt.text.corpus import NAMES
from tinygpt.text.names import is_name

if TYPE_CHECKING:
    from tinygpt.runs.checkpoint import Meta

VARYING = {"elapsed", "tokens_per_second", "memory"}
"""What two equal runs need not have in common."""
MOST_ACCUMULATION = 2
"""Micro-batches of a step in the proof: more would only take longer."""

if TYPE_CHECKING:
    ModelFlags = dict[str, Any]
    TrainFlags = dict[str, Any]
else:
    ModelFlags, TrainFlags = flags(GPTConfig, "Model"), flags(TrainConfig, "Training")


@dataclass(frozen=True)
class Compared:
    """One kind of thing that two runs leave behind."""

    what: str
    count: int
    differing: tuple[str, ...] = ()
    """Names of those that are not the same in both."""

    @property
    def same(self) -> bool:
        return not self.differing


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
    json
        Print the verdict as JSON.
    """
    if steps < 2:
        raise UsageError(f"--steps {steps} is too few: there must be one before and one after.")
    given = {"source": source, "tokenizer": tokenizer, "field": field, "glob": glob}
    tables = given_tables(model, train, given)
    kept = _tables_of_run(source)
    if kept:
        tables["data"].pop("source")
    if "max_iters" in tables["train"]:
        raise UsageError("--max-iters is what --steps says here: give that.")
    resolved = resolve(kept, preset_tables(preset), file_tables(config), tables)
    settings = _short(resolved, steps, tables["train"])
    device = require_device()
    began = time.perf_counter()
    material = gather(settings)
    with _temporary_folder() as folder:
        compared, same_twice = prove(settings, material, folder)
    seconds = time.perf_counter() - began
    exact = all(row.same for row in compared)
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
    settings: Settings, material: Material, folder: Path
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
    say(f"a fresh process for the other {steps - half} …")
    go_on(parts)
    compared = compare(whole, parts)
    if all(row.same for row in compared):
        return compared, None
    say("they differ: is the device to blame? Once more without a stop …")
    _train(settings, material, again, steps)
    return compared, all(row.same for row in compare(whole, again))


def _train(settings: Settings, material: Material, folder: Path, steps: int) -> None:
    run = make_run(settings, material, folder)
    for step in run:
        if step.iter == steps:
            run.stop()


def go_on(folder: Path) -> None:
    """Resume a run in a process of its own, as a user does."""
    program = children.python_module("tinygpt", "train", "--resume", "--out", str(folder))
    done = subprocess.run(**program, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise TrainingError(f"The fresh process ended with exit code {done.returncode}:\n{last}")


def compare(one: Path, two: Path) -> list[Compared]:
    """What two run folders hold, from their newest checkpoints and their histories."""
    from tinygpt.runs import checkpoint
    from tinygpt.runs.folder import latest_checkpoint

    (a, first), (b, second) = (checkpoint.read(latest_checkpoint(path)) for path in (one, two))
    names = sorted({*first, *second})
    differing = [
        name
        for name in names
        if name not in first
        or name not in second
        or first[name].tobytes() != second[name].tobytes()
    ]
    tensors = [
        Compared(
            what,
            sum(name.startswith(prefix) for name in names),
            tuple(name for name in differing if name.startswith(prefix)),
        )
        for what, prefix in (("weights", "model."), ("optimizer", "optimizer."))
    ]
    return [
        *tensors,
        _compare_rows("metrics", one / METRICS, two / METRICS),
        _compare_rows("samples", one / SAMPLES, two / SAMPLES),
        _compare_values("state", _state(a), _state(b)),
    ]


def _compare_rows(what: str, one: Path, two: Path) -> Compared:
    from tinygpt.runs.history import read

    first, second = (list(read(path)) for path in (one, two))
    found = []
    for i in range(max(len(first), len(second))):
        if i >= min(len(first), len(second)):
            found.append(f"row {i + 1} is in one only")
            continue
        a, b = first[i], second[i]
        found += [
            f"step {a.get('iter')}: {name} {a.get(name)} and {b.get(name)}"
            for name in {**a, **b}
            if name not in VARYING and jsonlib.dumps(a.get(name)) != jsonlib.dumps(b.get(name))
        ]
    return Compared(what, max(len(first), len(second)), tuple(found))


def _state(meta: Meta) -> dict[str, Any]:
    """What a checkpoint remembers besides its tensors, but for times and the name of the run."""
    values = meta.to_dict()
    values.pop("run", None)
    values["progress"] = {k: v for k, v in values["progress"].items() if k not in VARYING}
    return values


def _compare_values(what: str, one: dict[str, Any], two: dict[str, Any]) -> Compared:
    differing = tuple(name for name in {**one, **two} if one.get(name) != two.get(name))
    return Compared(what, len(one), differing)


# What is said of it -----------------------------------------------------------------------------


def _table(compared: list[Compared]) -> str:
    rows = []
    for row in compared:
        more = f" and {len(row.differing) - 3} more" if len(row.differing) > 3 else ""
        found = "; ".join(row.differing[:3]) + more
        rows.append((row.what, row.count, "identical" if row.same else f"DIFFERS: {found}"))
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
