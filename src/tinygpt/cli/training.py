"""``tinygpt train``: from a text to a run folder, with a view of what happens."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tinygpt import runtime
from tinygpt.cli.console import command, finite, program_name, say, show_json
from tinygpt.cli.options import (
    DataConfig,
    Settings,
    Switch,
    file_tables,
    flags,
    preset_tables,
    resolve,
)
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, UsageError
from tinygpt.metrics import perplexity

if TYPE_CHECKING:
    from tinygpt.data import Tokens
    from tinygpt.runs import TrainingRun
    from tinygpt.tokenizers import Tokenizer

RUNS = Path("runs")
"""Where runs go that were given no folder."""

if TYPE_CHECKING:
    ModelFlags = dict[str, Any]
    TrainFlags = dict[str, Any]
else:
    ModelFlags, TrainFlags = flags(GPTConfig, "Model"), flags(TrainConfig, "Training")


def train(
    source: str | None = None,
    /,
    *,
    out: Path | None = None,
    resume: Switch = False,
    preset: str | None = None,
    config: Path | None = None,
    tokenizer: str | None = None,
    val_fraction: float | None = None,
    field: str | None = None,
    glob: str | None = None,
    print_config: Switch = False,
    json: Switch = False,
    model: ModelFlags | None = None,
    train: TrainFlags | None = None,
) -> int:
    """Train a GPT on a text and keep the run in a folder.

    Settings come from, later ones winning: the defaults, --preset, --config, and the flags.

    Parameters
    ----------
    source
        Text file, folder, JSONL file or token file; or shakespeare, pydocs, auto.
    out
        Folder of the run. [default: runs/ and a name made from the text and the time]
    resume
        Go on with the run in --out from its newest checkpoint, with its own settings.
    preset
        demo (minutes on a laptop), baby (nanoGPT on a CPU) or gpt2 (124M, for a GPU).
    config
        TOML file with tables [model], [train] and [data], such as --print-config writes.
    tokenizer
        gpt2, bpe:N, char, byte, or a saved tokenizer. [default: a BPE of 1024 from a small text]
    val_fraction
        Share of the text, at its end, that is kept for validation. [default: 0.1]
    field
        Field of a JSONL file that holds the text. [default: text]
    glob
        Files of a folder that are read. [default: **/*.txt]
    print_config
        Print the resolved settings as TOML and stop.
    json
        Print a summary of the run as JSON at the end.
    """
    given = {
        "source": source,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "field": field,
        "glob": glob,
    }
    tables = {
        "model": dict(model or {}),
        "train": dict(train or {}),
        "data": {name: value for name, value in given.items() if value is not None},
    }
    kept = _settings_of(_folder_to_resume(out)) if resume else {}
    settings = resolve(kept, preset_tables(preset), file_tables(config), tables)
    if print_config:
        print(settings.to_toml(), end="")
        return 0
    if settings.data.source is None:
        raise UsageError(f"There is no text to learn from. Try: {command('train', 'auto')}")
    if not resume and out is not None and any(out.glob("ckpt_*.safetensors")):
        go_on = command("train", "--resume", "--out", out)
        raise UsageError(
            f"{out} holds a run already, and nothing there is overwritten. Give another folder, or "
            f"go on with it: {go_on}"
        )
    runtime.require_device()
    return _follow(_make_run(settings, out, resume, saved_tokenizer=tokenizer is None), json)


def _folder_to_resume(out: Path | None) -> Path:
    if out is not None:
        return out
    recent = max(RUNS.glob("*/config.toml"), key=lambda path: path.stat().st_mtime, default=None)
    last = (
        f" The last one: {command('train', '--resume', '--out', recent.parent)}" if recent else ""
    )
    raise UsageError(f"--resume needs --out with the folder of the run.{last}")


def _settings_of(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / "config.toml").is_file():
        raise CheckpointError(
            f"There is no run in {folder} to resume: it has no config.toml. Leave --resume out to "
            f"start one there."
        )
    return file_tables(folder / "config.toml")


# From settings to a run -------------------------------------------------------------------------


def _make_run(
    settings: Settings, out: Path | None, resume: bool, saved_tokenizer: bool
) -> TrainingRun:
    from tinygpt import data
    from tinygpt.api import GPT
    from tinygpt.runs import TrainingRun

    saved = out / "tokenizer.json" if resume and out and saved_tokenizer else None
    name, tokens, tokenizer = _read(settings, saved)
    vocab_size = tokenizer.vocab_size if tokenizer else int(tokens.max()) + 1
    shape = settings.model_config(vocab_size)
    training, held_out = data.split(tokens, settings.data.val_fraction, shape.block_size)
    folder = out or _new_folder(name)
    model = GPT(shape, settings.train.seed)
    run = TrainingRun(
        model,
        settings.train,
        training,
        held_out,
        tokenizer=tokenizer,
        folder=folder,
        resume=resume,
        source=_lasting(settings.data, name).to_dict(),
    )
    kind = f"{tokenizer.kind} of {tokenizer.vocab_size:,}" if tokenizer else f"{vocab_size:,} ids"
    held = f"{len(held_out):,} for validation" if held_out is not None else "no validation"
    say(f"tokens: {len(training):,} for training, {held} ({kind})")
    say(f"model: {model.num_params():,} parameters")
    say(f"run: {folder}" + (f", from step {run.iter_num:,}" if run.iter_num else ""))
    return run


def _read(settings: Settings, saved: Path | None) -> tuple[str, Tokens, Tokenizer | None]:
    """-> a name for the text, its tokens, and their tokenizer if that is known."""
    from tinygpt import data
    from tinygpt.corpus import open_corpus
    from tinygpt.tokenizers import load_tokenizer, make_tokenizer

    source, spec = str(settings.data.source), settings.data.tokenizer
    if saved is not None and saved.is_file():
        tokenizer: Tokenizer | None = load_tokenizer(saved)
    else:
        tokenizer = None
    if Path(source).suffix in data.TOKEN_FILES:
        if tokenizer is None and spec is not None:
            tokenizer = make_tokenizer(spec, lambda: _no_text(source))
        size = tokenizer.vocab_size if tokenizer else settings.model.get("vocab_size")
        return Path(source).stem, data.load_tokens(source, size), tokenizer
    corpus = open_corpus(source, field=settings.data.field, glob=settings.data.glob)
    say(f"text: {corpus.description}")
    tokenizer = tokenizer or make_tokenizer(spec, corpus.pieces)
    return corpus.name, data.load_tokens(data.tokenize(corpus, tokenizer)), tokenizer


def _no_text(source: str) -> list[str]:
    raise UsageError(
        f"{source} holds tokens, from which no tokenizer can be trained. Name the one that made "
        f"them with --tokenizer gpt2, byte or the path of a saved one; or give none."
    )


def _lasting(data: DataConfig, chosen: str) -> DataConfig:
    """Paths made absolute and ``auto`` replaced by what it chose, so that a run can be resumed."""
    values = data.to_dict()
    if values["source"] == "auto" and not Path("auto").exists():
        values["source"] = chosen
    for name in ("source", "tokenizer"):
        value = values[name]
        if value is not None and Path(value).exists():
            values[name] = str(Path(value).resolve())
    return DataConfig.from_dict(values)


def _new_folder(name: str) -> Path:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:40] or "text"
    folder = RUNS / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    while folder.exists():
        folder = folder.with_name(folder.name + "x")
    return folder


# Watching it ------------------------------------------------------------------------------------


def _follow(run: TrainingRun, json: bool) -> int:
    """Train to the end, or until a signal; -> the exit code."""
    from tinygpt.display import make_display

    display = make_display(run.config, start=run.iter_num, title=str(run.folder))
    last = None
    with stop_signals(run.stop, display.notice) as received, display:
        for last in run:
            display.update(last)
    result = run.result
    loss = result.best_val_loss
    if json:
        show_json(
            {
                "run": str(run.folder),
                "checkpoint": str(result.checkpoint) if result.checkpoint else None,
                "iter": result.iter_num,
                "max_iters": run.config.max_iters,
                "stopped": result.stopped,
                "train_loss": finite(last.train_loss if last else None),
                "best_val_loss": finite(loss),
                "perplexity": None if loss is None else finite(perplexity(loss)),
                "seconds": last.elapsed if last else 0.0,
                "parameters": run.model.num_params(),
            }
        )
    _tell_end(run, interrupted=bool(received) and result.stopped)
    return 128 + received[0] if received and result.stopped else 0


def _tell_end(run: TrainingRun, interrupted: bool) -> None:
    result = run.result
    if interrupted:
        say(f"stopped at step {result.iter_num:,}, all of it kept. To go on:")
        say("  " + command("train", "--resume", "--out", run.folder))
        return
    best = result.best_val_loss
    quality = f", best validation loss {best:.4f}" if best is not None else ""
    early = " early: the validation loss no longer improves" if result.stopped else ""
    say(f"done{early}, {result.iter_num:,} steps{quality}. Let it write:")
    say("  " + command("generate", run.folder))


@contextlib.contextmanager
def stop_signals(
    stop: Callable[[], None], notice: Callable[[str], None]
) -> Iterator[list[signal.Signals]]:
    """The first Ctrl-C or SIGTERM calls ``stop``, the second ends the program at once.

    Yields the list of the signals that arrived. Outside the main thread it changes nothing.
    """
    received: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if len(received) > 1:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        stop()
        notice(f"{program_name()}: stopping after this step; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
