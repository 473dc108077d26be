"""``tinygpt train``: from a text to a run folder, with a view of what happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tinygpt.cli.budgeting import asked, plan
from tinygpt.cli.console import BROKEN_PIPE, command, say, show_json
from tinygpt.cli.finetuning import Beginning
from tinygpt.cli.flags import Flat, Switch
from tinygpt.cli.joining import in_ranks, present
from tinygpt.cli.newest import RUNS, newest_runs
from tinygpt.cli.options import (
    AUTO,
    Separator,
    Settings,
    Tables,
    file_tables,
    flags,
    given_tables,
    preset_tables,
    resolve,
    run_tables,
)
from tinygpt.cli.running import (
    check_devices,
    fit_batch,
    foresee,
    gather,
    introduce,
    make_run,
    new_folder,
    say_material,
    say_mix,
)
from tinygpt.cli.serving import Names, dashboard_beside, dashboard_listener
from tinygpt.cli.signals import run_signals
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import ChangedRunError, CheckpointError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.machine import device
from tinygpt.runs.folder import TOKENIZER
from tinygpt.runs.lock import check_free
from tinygpt.text.corpus import NAMES
from tinygpt.training.metrics import perplexity

if TYPE_CHECKING:
    from tinygpt.runs.run import TrainingRun
    from tinygpt.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    ModelFlags = dict[str, Any]
    TrainFlags = dict[str, Any]
else:
    automatic = {"batch_size": "auto: the most that fit in memory, with as many a step."}
    ModelFlags = flags(GPTConfig, "Model")
    TrainFlags = flags(TrainConfig, "Training", automatic=automatic)


@in_ranks
def train(
    source: str | None = None,
    /,
    *,
    mix: str | None = None,
    out: Path | None = None,
    init: Path | None = None,
    resume: Switch = False,
    allow_change: Names | None = None,
    allow_memory: Switch = False,
    minutes: str | None = None,
    size: str | None = None,
    preset: str | None = None,
    config: Path | None = None,
    tokenizer: str | None = None,
    val_fraction: float | None = None,
    field: str | None = None,
    glob: str | None = None,
    separator: Separator | None = None,
    markers: Switch = False,
    eval_chats: Path | None = None,
    dry_run: Switch = False,
    dashboard: Switch = False,
    dashboard_port: int = 8001,
    no_token: Switch = False,
    print_config: Switch = False,
    json: Switch = False,
    model: Annotated[ModelFlags | None, Flat] = None,
    train: Annotated[TrainFlags | None, Flat] = None,
) -> int:
    """Train a GPT on a text and keep the run in a folder.

    Unless --preset, --config, --init or --max-iters says what to train, settings are chosen for
    the text, this machine and the time of --minutes; flags win over what is chosen.

    Settings come from, later ones winning: the defaults, --preset, --config, and the flags. With
    --init the defaults are those of fine-tuning, and the shape is that of the weights.

    Parameters
    ----------
    source
        Text file, folder, JSONL or Parquet file, each perhaps .gz or .zst; token file, or folder of
        token files, such as tokenize writes; or shakespeare, pydocs, auto. With --resume, the run
        or the checkpoint to go on from, such as runs/mine/ckpt_100.
    mix
        Several sources in place of one, with their shares of the batches: wiki=0.7,code=0.3.
    out
        Folder of the run, which must be missing or empty. [default: runs/ and a name made from the
        text and the time]
    init
        Run or checkpoint to begin with: its weights, its shape and its tokenizer.
    resume
        Go on with the run in --out, or the newest in runs/, from its newest checkpoint, or from the
        one that is named, with its own settings. Later checkpoints are set aside in a folder below.
    allow_change
        Fields that may differ from the run that goes on: max_iters, data, … by comma, or repeated.
    allow_memory
        Start although the memory will probably not suffice.
    minutes
        Time from the start of the program to its end: 10, or 30s, 2h. With --preset, --config or
        --init it decides the number of steps alone. [default: 5, if nothing else decides]
    size
        Parameters of the model that --minutes chooses, such as 800k or 3M, or a preset's shape.
    preset
        demo (minutes on a laptop), baby (nanoGPT on a CPU) or gpt2 (124M, for a GPU).
    config
        TOML file with tables [model], [train] and [data], such as --print-config writes.
    tokenizer
        gpt2, bpe:N, char, byte, or a saved tokenizer. [default: a BPE of 1024 from a small text]
    val_fraction
        Share of the text, at its end, that is kept for validation. [default: 0.1]
    field
        Field of a JSONL file, or column of a table, that holds the text. [default: text]
    glob
        Files of a folder that are read. [default: **/*.txt]
    separator
        What parts documents: end, the token <|endoftext|> where the vocabulary has it, as all have
        that are made of several documents; or blank, a blank line. [default: end]
    markers
        Give the vocabulary the tokens that mark the turns of a conversation, such as <|user|>, and
        the weights of --init rows of the embedding for them.
    eval_chats
        JSONL file of conversations that are not learned from: up to 64 of their short answers are
        asked for at evaluations, and the share of exact ones is shown by kind.
    dry_run
        Say what would happen, with tokens, parameters, memory and time, and write no run. Of a
        run that --minutes plans, a few steps are timed.
    dashboard
        Show the run in the browser while it trains.
    dashboard_port
        Port of that page; if it is taken, one of the next.
    no_token
        Show the run, with samples, to everybody on this machine; saving and stopping need the key.
    print_config
        Print the resolved settings as TOML and stop.
    json
        Print a summary of the run as JSON at the end.
    """
    if no_token and not dashboard:
        raise UsageError("--no-token is about the dashboard: give --dashboard too.")
    if mix is not None:
        source = _mixed(source, mix)
    start: Path | None = None
    if resume:
        start, out, source = _where_to_go_on(source, out)
        out = _newest_run() if out is None else out
    given = {
        "source": source,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "field": field,
        "glob": glob,
        "separator": separator,
        "markers": markers or None,
        "eval_chats": None if eval_chats is None else str(eval_chats),
        "init": None if init is None else str(init),
    }
    tables = given_tables(model, train, given)
    fitted = tables["train"].get("batch_size") == AUTO
    if fitted:
        del tables["train"]["batch_size"]
        if resume:
            raise UsageError(
                "--batch-size auto is for a run that begins: one that goes on keeps its batches."
            )
    if init is not None:
        tables["data"]["init_sha256"] = None  # a file's would be of other weights
    if not resume:
        tables["data"]["plan"] = None  # a file's would be of another run
    allow = _fields(allow_change or [])
    if allow and not resume:
        raise UsageError("--allow-change is for a run that goes on: give --resume too.")
    if allow:
        from tinygpt.runs.changes import parse

        parse(allow)  # before the text is read
    kept = _settings_of(out, start) if resume and out else {}
    layers = [kept, preset_tables(preset), file_tables(config), tables]
    ranks = present()
    beginning = None if resume else _beginning(layers, out)
    settled = {"--preset": preset, "--config": config, "--init": beginning}
    steps = tables["train"].get("max_iters")
    budget = asked(minutes, size, [flag for flag in settled if settled[flag]], steps, resume)
    if beginning is not None:
        layers = beginning.layers(*layers[1:])
    settings = resolve(*layers, planned=budget is not None and budget.whole)
    _check_init(settings, kept, resume)
    if budget is not None and ranks.size > 1:
        raise UsageError(
            "Settings are chosen by the pace of one process, and mpiexec started several. Say what "
            "to train: give --preset, --config or --max-iters, and no --minutes."
        )
    if fitted:
        _check_fitting(budget is not None, ranks.size)
    ranks.check(settings.train)
    known = budget is None or (minutes is None and settings.data.source is None)
    if print_config and known and not fitted:
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
    if out is not None:
        from tinygpt.runs.checkpoint import check_claim

        check_free(out)
        check_claim(out)
    # Before the text is read, and before there is a folder: it may not be possible.
    page = dashboard and ranks.first
    with dashboard_listener(dashboard_port) if page else nullcontext() as listener:
        device.prefer(settings.train.devices)
        check_devices(settings.train)
        device.require_device()
        _check_machine(settings.train)
        if beginning is not None:
            own = beginning.tokenizer(settings.data)
        else:
            own = _saved_tokenizer(out, start) if resume and out and tokenizer is None else None
        if budget is None:
            material, begun = gather(settings, own), None
            if fitted:
                settings = fit_batch(material.shape, settings)
            foresee(material.shape, settings, allow_memory)
            say_material(material)
            count, rate = material.shape.num_params(), settings.train.learning_rate
            say(f"model: {count:,} parameters, learning rate {rate:g}")
        else:
            settings, material, begun = plan(budget, settings, own, tables, allow_memory)
        say_mix(material, settings.train)
        if print_config:
            print(settings.to_toml(), end="")
            return 0
        if dry_run:
            say(f"dry run: nothing was written. The run would go to {out or RUNS / '…'}")
            return 0
        folder = out or (new_folder(material.name) if ranks.first else RUNS / "…")
        try:
            run = make_run(settings, material, folder, start or resume, allow, begun, ranks)
        except ChangedRunError as error:
            others = {"--out": out, "--preset": preset, "--config": config}
            same = _same_command(tables, others, start)
            knowingly = command(*same, "--allow-change", ",".join(sorted({*allow, *error.fields})))
            raise CheckpointError(f"{error.reason}; or, knowingly:\n  {knowingly}") from error
        except BaseException:
            if out is None:
                with suppress(OSError):
                    folder.rmdir()  # nothing is in it yet
            raise
        introduce(run)
        if listener is None:
            return _follow(run, json)
        with dashboard_beside(run, listener, dashboard_port, no_token) as stopped:
            return _follow(run, json, stopped)


def _check_machine(config: TrainConfig) -> None:
    """DeviceError if there are not the devices, or if they have not the type of the products."""
    from tinygpt.machine import precision, several

    for name in several.open_devices(config.devices):
        precision.require(config.dtype, name)


def _mixed(source: str | None, mix: str) -> str:
    """The source that --mix stands for; UsageError if it is wrong, or there is another."""
    from tinygpt.text.mix_shares import parse_mix

    if source is not None:
        raise UsageError(f"{source} and --mix both say what to read. Give one.")
    parse_mix(mix)
    return mix


def _beginning(layers: Sequence[Tables], out: Path | None) -> Beginning | None:
    """What --init or a file asks to begin with."""
    given = [t["data"]["init"] for t in layers if "init" in t.get("data", {})]
    return Beginning(given[-1], out) if given and isinstance(given[-1], str) else None


def _check_fitting(planned: bool, processes: int) -> None:
    """UsageError where --batch-size auto has no step to cut, or would differ between processes."""
    if planned:
        raise UsageError(
            "--batch-size auto cuts a step that is settled, and --minutes chooses one for the time "
            "there is. Leave auto out, or settle the step with --preset, --config or --max-iters."
        )
    if processes > 1:
        raise UsageError(
            "--batch-size auto looks at the memory of one machine, and mpiexec started several "
            "processes. Give a number, such as what auto finds on the smallest machine."
        )


def _check_init(settings: Settings, kept: Tables, resume: bool) -> None:
    """Weights are taken over when a run begins, and frozen only if they were."""
    if resume:
        if settings.data.init != kept.get("data", {}).get("init"):
            raise UsageError(
                "--init is for a run that begins: one that goes on has its own weights. Leave it "
                "out, or leave --resume out and give another --out."
            )
    elif settings.data.init is None:
        for name in ("lora_rank", "freeze"):
            if getattr(settings.train, name) is not None:
                raise UsageError(
                    f"{name} is for weights that have learned something: give --init RUN too."
                )


def _saved_tokenizer(folder: Path, start: Path | None) -> Tokenizer | None:
    """The tokenizer of a run that goes on, from its folder or the checkpoint to ``start`` from."""
    from tinygpt.runs.checkpoint import read_meta
    from tinygpt.text.tokenizers import load_tokenizer, tokenizer_from_dict

    if start is not None:
        described = read_meta(start).tokenizer
        return None if described is None else tokenizer_from_dict(described)
    saved = folder / TOKENIZER
    return load_tokenizer(saved) if saved.is_file() else None


def _fields(allow: Sequence[str]) -> list[str]:
    """The names in ``--allow-change a,b --allow-change c``, in the spelling of flags or fields."""
    names = (name.strip().replace("-", "_") for text in allow for name in text.split(","))
    return [name.removeprefix("train.").removeprefix("model.") for name in names if name]


def _same_command(
    tables: Tables, others: dict[str, Any], start: Path | None = None
) -> list[object]:
    """The words that resume a run with the settings that were given."""
    data = dict(tables["data"])
    source = data.pop("source", start)
    words: list[object] = ["train", *([source] if source else []), "--resume"]
    given = {**others, **{f"--{name}": value for name, value in data.items()}}
    for table in ("model", "train"):
        given |= {f"--{name}": value for name, value in tables[table].items()}
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, value]
    return words


def _where_to_go_on(
    source: str | None, out: Path | None
) -> tuple[Path | None, Path | None, str | None]:
    """What ``train --resume SOURCE --out OUT`` means; -> checkpoint, folder of the run, text

    SOURCE may be a checkpoint, also without its suffix, or a run folder; else it is a text.
    """
    from tinygpt.runs.checkpoint import read_meta
    from tinygpt.runs.folder import SUFFIX, latest_checkpoint, named_checkpoint, run_of

    if source in NAMES:
        return None, out, source
    path = named_checkpoint(user_path(source or ""))
    if path.suffix == SUFFIX:
        read_meta(path)  # CheckpointError if it is none
        return path, out or path.parent, None
    if source and run_of(path) is not None:
        if out is None or out.resolve() == path.resolve():
            return None, path, None
        return latest_checkpoint(path), out, None
    return None, out, source


def _newest_run() -> Path:
    try:
        return newest_runs(1, checkpoints=False)[0]
    except UsageError as error:
        raise UsageError(f"--resume needs --out with the folder of the run. {error}") from error


def _settings_of(folder: Path, start: Path | None = None) -> Tables:
    """The settings of the run in a folder, or of the checkpoint to ``start`` from and its run."""
    from tinygpt.runs.checkpoint import read_meta

    tables = run_tables(folder if start is None else start.parent)
    if start is not None:
        meta = read_meta(start)
        tables["model"] = meta.model.to_dict()
        return tables if meta.train is None else {**tables, "train": meta.train.to_dict()}
    if not tables:
        raise CheckpointError(
            f"There is no run in {folder} to resume: it has no config.toml. Leave --resume out to "
            f"start one there."
        )
    return tables


# Watching it ------------------------------------------------------------------------------------


def _follow(run: TrainingRun, json: bool, stopped: Callable[[], bool] | None = None) -> int:
    """Train to the end, or until a signal; -> the exit code. Others can stop it too."""
    from tinygpt.runs.display import hung_up, make_display

    display = make_display(run.config, start=run.iter_num, title=str(run.folder))
    messages, last = sys.stderr, None  # the live view puts another stream in its place
    with run_signals(run.stop, run.save_soon, display.notice) as received, display:
        for last in run:
            display.update(last)
            if hung_up(messages):
                run.stop()
    for message in run.take_notices():
        say(message)
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
                "skipped": result.skipped,
                "train_loss": last.train_loss if last else None,
                "best_val_loss": loss,
                "best_bits_per_byte": run.bits_per_byte(loss),
                "perplexity": None if loss is None else perplexity(loss),
                "seconds": last.elapsed if last else 0.0,
                "parameters": run.model.num_params(),
            }
        )
    asked = bool(received) or run.ranks.stopping or (stopped is not None and stopped())
    _tell_end(run, interrupted=asked and result.stopped)
    if not result.stopped:
        return 0
    return 128 + received[0] if received else BROKEN_PIPE if hung_up(messages) else 0


def _tell_end(run: TrainingRun, interrupted: bool) -> None:
    result = run.result
    if interrupted:
        say(f"stopped at step {result.iter_num:,}, all of it kept. To go on:")
        say("  " + command("train", "--resume", "--out", run.folder))
        return
    from tinygpt.text.chat.packing import Conversations

    best = result.best_val_loss
    quality = f", best validation loss {best:.4f}" if best is not None else ""
    if (bits := run.bits_per_byte(best)) is not None:
        quality += f" ({bits:.4f} bits per byte)"
    early = " early: the validation loss no longer improves" if result.stopped else ""
    talks = isinstance(run.train_tokens, Conversations)
    verb, what = ("chat", "Talk to it") if talks else ("generate", "Let it write")
    say(f"done{early}, {result.iter_num:,} steps{quality}. {what}:")
    say("  " + command(verb, run.folder))
