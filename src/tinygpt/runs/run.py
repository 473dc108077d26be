"""A training run and its folder: what is written, when, and how a run goes on after a stop.

config.toml          the resolved settings
tokenizer.json       the tokenizer, if the run has one
metrics.jsonl        one object per step
samples.jsonl        the sample texts, with the step they were taken at
ckpt_N.safetensors   the newest checkpoints and the best one
best.json            which of them that is
run.lock             who is training it now
run.json             which run they belong to: the mark of a folder that takes runs
left-after-N         what came after step N, before the run went back to it
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad.nn.optim import Optimizer

from tinygpt.config import Config, SampleConfig, TrainConfig, check_toml, to_toml
from tinygpt.errors import (
    CheckpointError,
    DataError,
    TinyGPTError,
    TokenizerError,
    TrainingError,
    UsageError,
)
from tinygpt.files.atomic import remove_stale, replacing, user_path
from tinygpt.files.disk import writing
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import generate_tokens
from tinygpt.machine import resources
from tinygpt.model import lora
from tinygpt.model.transformer import Transformer
from tinygpt.runs import changes, checkpoint
from tinygpt.runs.folder import (
    CONFIG,
    METRICS,
    SAMPLES,
    TOKENIZER,
    latest_checkpoint,
    list_checkpoints,
    run_of,
)
from tinygpt.runs.history import Cut, History
from tinygpt.runs.lock import FolderLock, check_free
from tinygpt.text import batches
from tinygpt.text.tokenizers import Tokenizer, check_readable, ends_of
from tinygpt.text.tokens import byte_count, data_fingerprint
from tinygpt.training.diagnose import bad_parameter
from tinygpt.training.guard import Guard
from tinygpt.training.loop import Step, train_steps
from tinygpt.training.metrics import bits_per_byte, short
from tinygpt.training.optim import make_optimizer
from tinygpt.untrusted import clip, is_number

Tokens = npt.NDArray[np.integer]

SAMPLE_TOKENS = 120
"""Length of the sample texts."""
SAMPLE_CHARS = 20_000
"""A longer one, of very long tokens, is cut: rows of more than a megabyte are not read."""
LAYER_ROWS = 2000
"""About so many rows of a run, and those of skipped steps, have the gradient norm by layer."""


@dataclass
class Progress:
    """The best result so far, and how long ago it was."""

    best_val_loss: float | None = None
    best_iter: int = 0
    evaluations_since_best: int = 0

    def see(self, val_loss: float, iter_num: int) -> bool:
        """Take note of an evaluation; true if it is the best so far."""
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if val_loss < best:  # which NaN never is
            self.best_val_loss, self.best_iter = val_loss, iter_num
            self.evaluations_since_best = 0
            return True
        self.evaluations_since_best += 1
        return False


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    iter_num: int
    optimizer: Optimizer
    history: History
    """One row per step: iter, train_loss, val_loss where evaluated, lr, grad_norm, …"""
    best_val_loss: float | None
    checkpoint: Path | None = None
    """The newest checkpoint that is written, if the run has a folder."""
    stopped: bool = False
    """Stopped before max_iters, by stop() or early stopping."""
    skipped: int = 0
    """Steps that were skipped because of their loss or gradient."""
    notices: tuple[str, ...] = ()
    """The last 1,000 things there were to tell, whether they were shown or not."""


class TrainingRun:
    """One run: iterate over it to train, step by step; ``result`` tells what came of it.

    Without a folder nothing is written. With ``resume=True`` the run goes on from the newest
    checkpoint in its folder, with a path from that checkpoint, bit for bit as if never interrupted.
    ``allow_change`` names what may differ from the run that is resumed: fields of its configs,
    ``"data"`` or ``"tokenizer"``. Changes are kept in the checkpoints and in config.toml.
    ``init`` says where the model's weights are from, see ``checkpoint.start_from``; a run that is
    resumed knows it. Which of the weights learn, the config says, see ``lora.prepare``.

    From here to the end of the iteration, or ``close()``, nobody else can train in the folder.

    A folder takes a run if it is missing, empty, or a run's; if the run goes on from an older
    checkpoint, later ones are set aside in a folder below. Raises UsageError for another folder, if
    it holds a run already and is not to be resumed, or is being trained; CheckpointError if the
    data or the settings are not those of the run to resume. What is refused changes nothing there.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        train_tokens: Tokens,
        val_tokens: Tokens | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        optimizer: Optimizer | None = None,
        folder: str | Path | None = None,
        resume: bool | str | Path | None = None,
        source: Mapping[str, Any] | None = None,
        allow_change: Sequence[str] = (),
        init: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.train_tokens, self.val_tokens = train_tokens, val_tokens
        for tokens in (train_tokens, val_tokens):
            if tokens is not None:
                batches.check_length(tokens, model.config.block_size)
        if optimizer is None:
            lora.prepare(model, config)
        self.optimizer = optimizer or make_optimizer(model.trainable(), config)
        self._check_optimizer()
        self.init = None if init is None else dict(init)
        self.folder = user_path(folder) if folder is not None else None
        self.source = dict(source or {})
        self.progress, self.iter_num, self.elapsed = Progress(), 0, 0.0
        self.guard = Guard(config)
        self.newest: Path | None = None
        self.decoder = Decoder(model)
        self.changes: list[dict[str, Any]] = []
        """What was allowed to change when the run was resumed, and at which step."""
        self._allow = changes.parse(allow_change)
        self._lock = None if self.folder is None else FolderLock(self.folder)
        self._stop = self._save_soon = False
        self._notices: list[str] = []
        self._found: list[Path] = []
        """The checkpoints that were there before the folder was taken."""
        self._told: deque[str] = deque(maxlen=1000)
        self.fingerprints = {"train": data_fingerprint(train_tokens)}
        if val_tokens is not None:
            self.fingerprints["val"] = data_fingerprint(val_tokens)
        try:
            self._check_folder(resume)
            self._resume(resume)
            self._rehearse()
            self._saver = self._make_saver()
            self._prepare_folder(anew=resume is not True)
        except BaseException:
            self._let_go()
            raise

    def _check_optimizer(self) -> None:
        """UsageError if it was given, and would train other weights than the config says."""
        learning, found = lora.learning(self.model.config, self.config), self.model.trainable()
        held = {id(p) for p in self.optimizer.params}
        if learning.keys() != found.keys() or not held <= {id(p) for p in found.values()}:
            raise UsageError(
                "The optimizer holds weights that the config freezes, or lacks adapters. Call "
                "lora.prepare(model, config), then make it from model.trainable(); or give none."
            )

    def stop(self) -> None:
        """End the run after the step in progress, with a checkpoint. Safe in a signal handler."""
        self._stop = True

    def save_soon(self) -> None:
        """Write a checkpoint after the step in progress and go on. Safe in a signal handler."""
        self._save_soon = True

    def close(self) -> None:
        """Give the folder up before the run has ended; iterating takes it again."""
        for history in (self.history, self.samples):
            history.close()
            if history.waiting:
                self.notice(f"{history.path} lacks its last {history.waiting:,}: not written.")
        self._let_go()

    def notice(self, message: str) -> None:
        """Tell whoever watches, along with the step in progress."""
        self._notices.append(message)
        self._told.append(message)

    def take_notices(self) -> tuple[str, ...]:
        """What there is to tell since the last step; it will not come with the next one."""
        notices, self._notices = tuple(self._notices), []
        return notices

    @property
    def result(self) -> TrainResult:
        stopped = self.iter_num < self.config.max_iters
        return TrainResult(
            self.iter_num,
            self.optimizer,
            self.history,
            self.progress.best_val_loss,
            self.newest,
            stopped,
            self.guard.skipped,
            tuple(self._told),
        )

    def __iter__(self) -> Iterator[Step]:
        steps = train_steps(
            self.model,
            self.optimizer,
            self.config,
            self.train_tokens,
            self.val_tokens,
            start=self.iter_num,
            guard=self.guard,
        )
        before = self.elapsed
        try:
            self._take_folder()
            if self._out_of_patience():  # it was over when it stopped
                return
            with self._saver or nullcontext():  # which ends when all is written
                for step in steps:
                    self.iter_num, self.elapsed = step.iter, before + step.elapsed
                    self._hear_of_saves()
                    step = self._record(replace(step, elapsed=self.elapsed))
                    yield step
                    if self._stopping() and step.checkpoint is None and self._save_due(step):
                        self._save(step)  # asked to stop after the step was written down
                    if self._stopping():
                        return
        except TrainingError as error:
            self._hear_of_saves()
            kept = f"The last checkpoint is {self.newest}." if self.newest else ""
            raise TrainingError(f"{error} {kept}".rstrip()) from error
        finally:
            self._hear_of_saves()
            self.close()

    @cached_property
    def _bits_per_nat(self) -> float | None:
        """Bits per byte of the validation text for each nat per token; None if it is unknown."""
        if self.tokenizer is None or self.val_tokens is None:
            return None
        n_bytes = byte_count(self.val_tokens, self.tokenizer)
        return bits_per_byte(1.0, len(self.val_tokens), n_bytes) if n_bytes else None

    def _record(self, step: Step) -> Step:
        """Judge, sample, save and write down one step; -> the step, completed."""
        if step.skipped:
            self.notice(f"step {step.iter} skipped: {step.skipped}")
        if step.val_loss is not None:
            step = replace(step, best=self.progress.see(step.val_loss, step.iter))
        if self._due(step, self.config.sample_interval):
            step = replace(step, sample=self._sample(step.iter))
        row: dict[str, Any] = {"iter": step.iter, "train_loss": step.train_loss}
        if step.val_loss is not None:
            row |= {"val_loss": step.val_loss, "best": step.best}
            if self._bits_per_nat is not None:
                row["val_bits_per_byte"] = step.val_loss * self._bits_per_nat
        if step.skipped:
            row["skipped"] = step.skipped
        row |= {
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens_per_second": step.tokens_per_second,
            "elapsed": step.elapsed,
            "memory": resources.memory(),
        }
        if step.skipped or step.iter % max(1, self.config.max_iters // LAYER_ROWS) == 0:
            row["grad_norms"] = {name: short(norm) for name, norm in step.grad_norms.items()}
        self._append(self.history, row)
        if step.sample is not None:
            self._append(self.samples, {"iter": step.iter, "text": step.sample})
        if self._save_due(step):
            step = replace(step, checkpoint=self._save(step))
        return replace(step, notices=self.take_notices())

    def _save_due(self, step: Step) -> bool:
        asked, self._save_soon = self._save_soon, False
        due = self._due(step, self.config.checkpoint_interval) or self.guard.exhausted
        if self.folder is None or not (step.best or asked or due or self._stopping()):
            return False
        return not (step.skipped and bad_parameter(self.model))  # damaged weights are not kept

    def _sync(self) -> list[str]:
        """The rows go to the disk before their checkpoint, so that they are never behind it.

        Runs in the thread that saves; -> what went wrong.
        """
        news = []
        for history in (self.history, self.samples):
            try:
                history.sync()
            except (OSError, ValueError, AttributeError) as error:  # the last: closed meanwhile
                news.append(f"{history.path} may not be on the disk: {error}.")
        return news

    def _append(self, history: History, row: Mapping[str, Any]) -> None:
        """Write a row; a disk that takes none is no reason to stop, and the row waits."""
        waited = history.waiting
        try:
            history.append(row)
        except OSError as error:
            if not waited:  # said once, not at every step
                self.notice(f"NOT WRITTEN: {history.path}: {error.strerror}. Its rows wait.")
        else:
            if waited:
                self.notice(f"{history.path} is written again, with the {waited:,} that waited.")

    def _due(self, step: Step, interval: int | None) -> bool:
        interval = interval or self.config.eval_interval
        return step.iter % interval == 0 or step.iter == self.config.max_iters

    def _stopping(self) -> bool:
        return self._stop or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stop_patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    # ---- the folder ----

    def _check_folder(self, resume: bool | str | Path | None) -> None:
        """UsageError if the folder must not be written to; nothing is changed to find out."""
        if self.folder is None:
            return
        check_free(self.folder)
        self._found = list_checkpoints(self.folder)
        if self._found and not resume:
            raise UsageError(
                f"{self.folder} holds a run already. Resume it, or choose another folder: nothing "
                f"there is overwritten."
            )
        checkpoint.check_claim(self.folder)

    def _rehearse(self) -> None:
        """UsageError if what the run is going to write would be refused when it is read."""
        if self.folder is None:
            return
        self._settings()
        if self.tokenizer is not None:
            check_readable(self.tokenizer)
        layout = checkpoint.layout_of(checkpoint.named_tensors(self.model, self.optimizer))
        checkpoint.rehearse(self._meta(self.elapsed, None), layout)

    def _prepare_folder(self, anew: bool) -> None:
        """Take the folder and put it in order; all that can be refused has been.

        ``anew``: the run does not go on from what the folder holds, unless that has checkpoints.
        """
        if self.folder is None:
            self.history, self.samples = History(), History()
            return
        self._take_folder()
        checkpoint.check_claim(self.folder)
        if list_checkpoints(self.folder) != self._found:
            raise UsageError(f"{self.folder} was being trained until just now: try again.")
        remove_stale(self.folder)
        self.history = History(self.folder / METRICS)
        self.samples = History(self.folder / SAMPLES)
        self._set_aside(anew and not self._found)
        self._write_settings()
        own = self.newest is not None and self.newest.parent == self.folder
        for written, every_step in ((self.history, own), (self.samples, False)):
            self._cut(written, every_step)

    def _set_aside(self, anew: bool) -> None:
        """What the folder holds of steps after the one to go on from is another branch."""
        assert self.folder is not None
        lost = anew and self._had_a_checkpoint()
        found = self.progress
        best = None if found.best_val_loss is None else (found.best_iter, found.best_val_loss)
        aside = checkpoint.set_aside(self.folder, self.iter_num, best, rows_too=lost)
        if aside is not None:
            self.notice(
                f"{self.folder} has come further than step {self.iter_num}: what came after it is "
                f"set aside in {aside}, whole, and the run goes on from step {self.iter_num}."
            )

    def _had_a_checkpoint(self) -> bool:
        """Whether rows go so far that a checkpoint must have been there, which somebody deleted."""
        interval = self.config.checkpoint_interval or self.config.eval_interval
        try:
            return any(is_number(row.get("iter"), interval, math.inf) for row in self.history)
        except DataError:  # damaged lines: told when they are dropped
            return True

    def _cut(self, history: History, every_step: bool) -> None:
        try:
            cut = history.truncate_after(self.iter_num if self._found else 0, every_step)
        except OSError as error:
            self.notice(f"{history.path} could not be put in order: {error.strerror}.")
        else:
            for message in _lost(history.path, cut):
                self.notice(message)

    def _take_folder(self) -> None:
        if self._lock is not None and self.folder is not None:
            with writing(self.folder):
                if warning := self._lock.acquire():
                    self.notice(warning)

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _settings(self) -> str:
        """The text of config.toml. Raises ConfigError if it could not be read again."""
        tables: dict[str, Config | Mapping[str, Any]] = {
            "model": self.model.config,
            "train": self.config,
            "data": self.source,
        }
        text = to_toml(tables, comments=True) + changes.as_comments(self.changes)
        check_toml(text)
        return text

    def _write_settings(self) -> None:
        """First the mark that makes the folder a run's, so that it can be taken again."""
        assert self.folder is not None
        text = self._settings()
        checkpoint.ensure_run(self.folder)
        with writing(self.folder), replacing(self.folder / CONFIG) as file:
            file.write(text.encode())
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder / TOKENIZER)

    def _make_saver(self) -> checkpoint.Saver | None:
        """What writes the checkpoints. Raises CheckpointError if the disk has no room for one."""
        if self.folder is None:
            return None
        interval = self.config.checkpoint_interval or self.config.eval_interval
        coming = math.ceil((self.config.max_iters - self.iter_num) / interval)
        kept = min(self.config.keep_last or coming, coming) + 2  # the best, and one in the making
        size = checkpoint.state_size(self.model, self.optimizer)
        if warning := checkpoint.foresee_space(self.folder, size, kept):
            self.notice(warning)
        return checkpoint.Saver(self.folder, self.config.keep_last)

    def _save(self, step: Step) -> Path:
        """Begin to save the state; what came of it is heard with a later step."""
        assert self.folder is not None and self._saver is not None
        if not self.folder.is_dir():
            self._make_folder_again()
        meta = self._meta(step.elapsed, step.train_loss)
        best_loss = step.val_loss if step.best else None
        return self._saver.save(self.model, self.optimizer, meta, best_loss, first=self._sync)

    def _meta(self, elapsed: float, train_loss: float | None) -> checkpoint.Meta:
        """What a checkpoint of this moment says of itself."""
        progress = {**vars(self.progress), "elapsed": elapsed, "train_loss": train_loss}
        progress["skips"] = self.guard.state()
        if self.changes:
            progress["changes"] = self.changes
        return checkpoint.Meta(
            iter_num=self.iter_num,
            model=self.model.config,
            train=self.config,
            tokenizer=None if self.tokenizer is None else self.tokenizer.to_dict(),
            data=self.fingerprints,
            progress=progress,
            random_state={"seed": self.config.seed, "step": self.iter_num},
            init=self.init,
        )

    def _hear_of_saves(self) -> None:
        if self._saver is not None:
            self.newest = self._saver.newest or self.newest
            for message in self._saver.news():
                self.notice(message)

    def _make_folder_again(self) -> None:
        """Somebody moved or deleted the folder, or its disk is gone; the weights are still here."""
        self.notice(f"{self.folder} HAS VANISHED. It is made again, with what comes from now on.")
        for written in (self.history, self.samples):
            written.close()
        self._let_go()  # of a file that is no longer there
        try:
            self._take_folder()
            self._write_settings()
        except TinyGPTError as error:
            self.notice(str(error))

    def _sample(self, iter_num: int) -> str | None:
        """A short text in the model's present manner; a notice, and None, where that fails."""
        try:
            return None if self.tokenizer is None else self._text(self.tokenizer, iter_num)
        except Exception as error:  # whatever it is, it is no reason to lose a run
            self.notice(f"step {iter_num}: no sample could be written: {clip(error)}")
            return None

    def _text(self, tokenizer: Tokenizer, iter_num: int) -> str:
        """A short text in the model's present manner, the prompt included."""
        try:
            prompt = tokenizer.encode(self.config.sample_prompt)
        except TokenizerError:
            prompt = []
        prompt = prompt or [int(self.train_tokens[0])]
        config = SampleConfig(temperature=0.8, top_k=min(200, self.model.config.vocab_size))
        ends, limit = ends_of(tokenizer), tokenizer.vocab_size
        tokens = generate_tokens(
            self.decoder, [prompt], SAMPLE_TOKENS, config, iter_num, limit=limit, ends=ends
        )
        ids = prompt + [int(token[0]) for token in tokens]
        return tokenizer.decode(ids[:-1] if ids[-1] in ends else ids)[:SAMPLE_CHARS]

    # ---- going on ----

    def _resume(self, resume: bool | str | Path | None) -> None:
        if resume is None or resume is False:
            if self._allow:
                raise UsageError("allow_change is for a run that is resumed: give resume=True too.")
            return
        if resume is True and self.folder is None:
            raise UsageError("To resume, say which run: give its folder or a checkpoint.")
        begun = self.folder is not None and (self.folder / CONFIG).is_file()
        if resume is True and begun and not self._found:
            self.notice(f"{self.folder} has no checkpoint yet: it starts from its first step.")
            return
        path = self._good_checkpoint(self.folder if resume is True else user_path(resume))  # type: ignore[arg-type]
        meta = checkpoint.read_meta(path)
        self._check_same_run(path, meta)
        changes.check_random_state(path, meta)
        self._check_same_folder(path, meta)
        checkpoint.load(path, self.model, self.optimizer)
        self.iter_num, self.newest, self.init = meta.iter_num, path, meta.init
        known = {k: v for k, v in meta.progress.items() if k in vars(self.progress)}
        self.progress = Progress(**known)
        self.elapsed = float(meta.progress.get("elapsed", 0.0))
        self.guard.load(meta.progress.get("skips"))

    def _check_same_folder(self, path: Path, meta: checkpoint.Meta) -> None:
        """UsageError if the run would go on in the folder of another one."""
        if self.folder is None or path.resolve().parent == self.folder.resolve():
            return
        same = meta.run in (None, run_of(self.folder)) and meta.train is not None
        if self._found and not same:  # None: one that could only be saved to another place
            raise UsageError(
                f"{self.folder} holds another run than {path}, and nothing there is overwritten. "
                f"Choose a folder that is missing or empty."
            )

    def _good_checkpoint(self, given: Path) -> Path:
        """The newest one in a folder that is whole, telling what the ones after it lack."""
        if not given.is_dir():
            return latest_checkpoint(given)
        latest_checkpoint(given)  # there is one, whole or not
        path, problems = checkpoint.newest_good(given)
        if path is None:
            raise CheckpointError("\n".join(["No checkpoint is whole.", *map(str, problems)]))
        for problem in problems:
            self.notice(f"{problem} Going on from {path} instead.")
        return path

    def _check_same_run(self, path: Path, meta: checkpoint.Meta) -> None:
        """Refuse what differs from the run, but for what is allowed, which is written down."""
        described = None if self.tokenizer is None else self.tokenizer.to_dict()
        found = changes.differences(
            meta, self.model.config, self.config, self.fingerprints, described
        )
        changes.check(path, found, self._allow, meta.iter_num)
        self.changes = [*changes.past(meta.progress), *(c.at(meta.iter_num) for c in found)]
        for change in found:
            self.notice(f"changed from here on, as allowed: {change}")
        self._save_soon = bool(found)  # the next checkpoint, which knows of it, comes at once


def _lost(path: Path | None, cut: Cut) -> Iterator[str]:
    """What to say of a history that was not whole."""
    if cut.damaged:
        yield f"{path}: {cut.damaged} damaged line(s) were dropped."
    if cut.missing:
        steps = f"{len(cut.missing):,} of its steps, from {cut.missing[0]} to {cut.missing[-1]}"
        yield f"{path} lacks {steps}: they were lost, but not what was learned in them."
