"""A training run and its folder: what is written, when, and how a run goes on after a stop.

config.toml          the resolved settings
tokenizer.json       the tokenizer, if the run has one
metrics.jsonl        one object per step
samples.jsonl        the sample texts, with the step they were taken at
ckpt_N.safetensors   the newest checkpoints and the best one
best.json            which of them that is
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad.nn.optim import Optimizer

from tinygpt import checkpoint, data, runtime
from tinygpt.config import Config, SampleConfig, TrainConfig, to_toml
from tinygpt.errors import CheckpointError, TokenizerError, TrainingError, UsageError
from tinygpt.files import remove_stale, replacing
from tinygpt.generate import Decoder, generate_tokens
from tinygpt.metrics import History
from tinygpt.model import Transformer
from tinygpt.optim import make_optimizer
from tinygpt.tokenizers import Tokenizer
from tinygpt.train import Step, train_steps

Tokens = npt.NDArray[np.integer]

SAMPLE_TOKENS = 120
"""Length of the sample texts."""
FREE_TO_CHANGE = {
    "eval_interval",
    "eval_iters",
    "checkpoint_interval",
    "keep_last",
    "early_stop_patience",
    "sample_interval",
    "sample_prompt",
}
"""Settings that do not change the course of the weights, so that a resumed run may have others."""


@dataclass
class Progress:
    """The best result so far, and how long ago it was."""

    best_val_loss: float | None = None
    best_iter: int = 0
    evaluations_since_best: int = 0

    def see(self, val_loss: float, iter_num: int) -> bool:
        """Take note of an evaluation; true if it is the best so far."""
        if self.best_val_loss is None or val_loss < self.best_val_loss:
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
    """The newest checkpoint, if the run has a folder."""
    stopped: bool = False
    """Stopped before max_iters, by stop() or early stopping."""


class TrainingRun:
    """One run: iterate over it to train, step by step; ``result`` tells what came of it.

    Without a folder nothing is written. With ``resume=True`` the run goes on from the newest
    checkpoint in its folder, with a path from that checkpoint, bit for bit as if never interrupted.

    Raises UsageError if the folder holds a run already and is not to be resumed, CheckpointError if
    the data or the settings are not those of the run to resume.
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
    ) -> None:
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.train_tokens, self.val_tokens = train_tokens, val_tokens
        for tokens in (train_tokens, val_tokens):
            if tokens is not None:
                data.check_length(tokens, model.config.block_size)
        self.optimizer = optimizer or make_optimizer(model.parameters(), config)
        self.folder = Path(folder) if folder is not None else None
        self.source = dict(source or {})
        self.progress, self.iter_num, self.elapsed = Progress(), 0, 0.0
        self.newest: Path | None = None
        self.decoder = Decoder(model)
        self._stop = False
        self._notices: list[str] = []
        self.fingerprints = {"train": data.data_fingerprint(train_tokens)}
        if val_tokens is not None:
            self.fingerprints["val"] = data.data_fingerprint(val_tokens)
        self._resume(resume)
        self._prepare_folder()

    def stop(self) -> None:
        """End the run after the step in progress, with a checkpoint. Safe in a signal handler."""
        self._stop = True

    def notice(self, message: str) -> None:
        """Tell whoever watches, along with the step in progress."""
        self._notices.append(message)

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
        )

    def __iter__(self) -> Iterator[Step]:
        steps = train_steps(
            self.model,
            self.optimizer,
            self.config,
            self.train_tokens,
            self.val_tokens,
            start=self.iter_num,
        )
        before = self.elapsed
        try:
            for step in steps:
                self.iter_num, self.elapsed = step.iter, before + step.elapsed
                step = self._record(replace(step, elapsed=self.elapsed))
                yield step
                if self._stopping() and self.folder is not None and step.checkpoint is None:
                    self._save(step)  # asked to stop after the step was written down
                if self._stopping() or step.iter == self.config.max_iters:
                    return
        finally:
            self.history.close()
            self.samples.close()

    def _record(self, step: Step) -> Step:
        """Judge, sample, save and write down one step; -> the step, completed."""
        if not math.isfinite(step.train_loss):
            kept = f" The last checkpoint is {self.newest}." if self.newest else ""
            raise TrainingError(
                f"The loss became {step.train_loss} at step {step.iter}: training cannot go on."
                f"{kept} Try a lower learning_rate (now {self.config.learning_rate}) or a longer "
                f"warm-up."
            )
        if step.val_loss is not None:
            step = replace(step, best=self.progress.see(step.val_loss, step.iter))
        if self._due(step, self.config.sample_interval):
            step = replace(step, sample=self._sample(step.iter))
        if self.folder is not None and (
            step.best or self._stopping() or self._due(step, self.config.checkpoint_interval)
        ):
            step = replace(step, checkpoint=self._save(step))
        row = {"iter": step.iter, "train_loss": step.train_loss}
        if step.val_loss is not None:
            row |= {"val_loss": step.val_loss, "best": step.best}
        row |= {
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens_per_second": step.tokens_per_second,
            "elapsed": step.elapsed,
            "memory": runtime.memory(),
        }
        self.history.append(row)
        if step.sample is not None:
            self.samples.append({"iter": step.iter, "text": step.sample})
        notices, self._notices = tuple(self._notices), []
        return replace(step, notices=notices)

    def _due(self, step: Step, interval: int | None) -> bool:
        interval = interval or self.config.eval_interval
        return step.iter % interval == 0 or step.iter == self.config.max_iters

    def _stopping(self) -> bool:
        patience = self.config.early_stop_patience
        out_of_patience = patience is not None and self.progress.evaluations_since_best >= patience
        return self._stop or out_of_patience

    # ---- the folder ----

    def _prepare_folder(self) -> None:
        if self.folder is None:
            self.history, self.samples = History(), History()
            return
        if self.iter_num == 0 and checkpoint.list_checkpoints(self.folder):
            raise UsageError(
                f"{self.folder} holds a run already. Resume it, or choose another folder: nothing "
                f"there is overwritten."
            )
        tables: dict[str, Config | Mapping[str, Any]] = {
            "model": self.model.config,
            "train": self.config,
            "data": self.source,
        }
        text = to_toml(tables, comments=True)
        with checkpoint.writing(self.folder), replacing(self.folder / "config.toml") as file:
            file.write(text.encode())
        remove_stale(self.folder)
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder / "tokenizer.json")
        self.history = History(self.folder / "metrics.jsonl")
        self.samples = History(self.folder / "samples.jsonl")
        for written in (self.history, self.samples):
            written.truncate_after(self.iter_num)

    def _save(self, step: Step) -> Path:
        assert self.folder is not None
        progress = {**vars(self.progress), "elapsed": step.elapsed, "train_loss": step.train_loss}
        meta = checkpoint.Meta(
            iter_num=step.iter,
            model=self.model.config,
            train=self.config,
            tokenizer=None if self.tokenizer is None else self.tokenizer.to_dict(),
            data=self.fingerprints,
            progress=progress,
            random_state={"seed": self.config.seed, "step": step.iter},
        )
        path = checkpoint.checkpoint_path(self.folder, step.iter)
        self.newest = checkpoint.save(path, self.model, self.optimizer, meta)
        if step.best and step.val_loss is not None:
            checkpoint.mark_best(path, step.val_loss)
        checkpoint.remove_old(self.folder, self.config.keep_last)
        return path

    def _sample(self, iter_num: int) -> str | None:
        """A short text in the model's present manner, the prompt included."""
        if self.tokenizer is None:
            return None
        try:
            prompt = self.tokenizer.encode(self.config.sample_prompt)
        except TokenizerError:
            prompt = []
        prompt = prompt or [int(self.train_tokens[0])]
        config = SampleConfig(temperature=0.8, top_k=min(200, self.model.config.vocab_size))
        tokens = generate_tokens(
            self.decoder, np.array([prompt], np.int32), SAMPLE_TOKENS, config, seed=iter_num
        )
        return self.tokenizer.decode(prompt + [int(token[0]) for token in tokens])

    # ---- going on ----

    def _resume(self, resume: bool | str | Path | None) -> None:
        if resume is None or resume is False:
            return
        if resume is True and self.folder is None:
            raise UsageError("To resume, say which run: give its folder or a checkpoint.")
        path = latest_checkpoint(self.folder if resume is True else Path(resume))  # type: ignore[arg-type]
        meta = checkpoint.read_meta(path)
        self._check_same_run(path, meta)
        checkpoint.load(path, self.model, self.optimizer)
        self.iter_num, self.newest = meta.iter_num, path
        known = {k: v for k, v in meta.progress.items() if k in vars(self.progress)}
        self.progress = Progress(**known)
        self.elapsed = float(meta.progress.get("elapsed", 0.0))

    def _check_same_run(self, path: Path, meta: checkpoint.Meta) -> None:
        """Going on with other data or settings would be another run under the old one's name."""
        differing = []
        if meta.train is not None:
            then, now = meta.train.to_dict(), self.config.to_dict()
            differing = [
                f"{name} (was {then[name]!r}, now {now[name]!r})"
                for name in now
                if then[name] != now[name] and name not in FREE_TO_CHANGE
            ]
        for part, value in (meta.data or {}).items():
            if self.fingerprints.get(part) != value:
                differing.append(f"the {part} data")
        now_used = None if self.tokenizer is None else self.tokenizer.to_dict()
        if meta.tokenizer != now_used:
            differing.append("the tokenizer")
        if differing:
            raise CheckpointError(
                f"{path} cannot be resumed: {', '.join(differing)} would change. Use the run's own "
                f"settings and data, or start a new run in another folder."
            )


def latest_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder; a checkpoint file is itself."""
    if path.is_file():
        return path
    found = checkpoint.list_checkpoints(path)
    if not found:
        raise CheckpointError(f"There is no checkpoint in {path}. {_runs_nearby(path)}")
    return found[-1]


def choose_checkpoint(path: Path) -> Path:
    """The checkpoint to use of a run folder: the best one, or else the newest."""
    return checkpoint.best_checkpoint(path) or latest_checkpoint(path)


def _runs_nearby(path: Path) -> str:
    parent = path.parent if path.parent.is_dir() else Path()
    runs = [p for p in sorted(parent.iterdir()) if p.is_dir() and checkpoint.list_checkpoints(p)]
    names = ", ".join(str(run) for run in runs[-5:])
    return f"Runs nearby: {names}." if names else "Train one first: tinygpt train YOUR_TEXT.txt"
