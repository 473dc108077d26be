"""A training run: iterate over it to train; it judges, samples and saves on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tinygrad.nn.optim import Optimizer

from tinygpt.config import Config, SampleConfig, TrainConfig, check_toml, to_toml
from tinygpt.errors import TokenizerError, TrainingError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import generate_tokens
from tinygpt.generation.grading import Exam
from tinygpt.machine import precision, resources
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.several import open_devices
from tinygpt.model import lora
from tinygpt.model.transformer import Transformer
from tinygpt.runs import changes, checkpoint
from tinygpt.runs.folder import checkpoint_path
from tinygpt.runs.history import History
from tinygpt.runs.output import Output
from tinygpt.runs.trial import SAMPLE_TOKENS, Trial
from tinygpt.text import batches
from tinygpt.text.chat.packing import Conversations
from tinygpt.text.tokenizers import Tokenizer, check_readable, ends_of
from tinygpt.text.tokens import Tokens, bytes_per_token, data_fingerprint
from tinygpt.training.diagnose import bad_parameter
from tinygpt.training.guard import Guard
from tinygpt.training.loop import Step, train_steps
from tinygpt.training.meeting import give_outer_momentum
from tinygpt.training.metrics import bits_per_byte, short
from tinygpt.training.optim import make_optimizer, optimizer_state
from tinygpt.training.rank_shares import RankShares
from tinygpt.training.scaling import LossScale
from tinygpt.untrusted import clip

SAMPLE_CHARS = 20_000
"""A longer text, of very long tokens, is cut: rows of more than a megabyte are not read."""
LAYER_ROWS = 2000
"""About so many rows of a run, and those of skipped steps, have the gradient norm by layer."""


@dataclass
class Progress:
    """The best result so far, and how long ago it was."""

    best_val_loss: float | None = None
    best_iter: int = 0
    evaluations_since_best: int = 0

    def see(self, val_loss: float, iter_num: int) -> bool:
        """Take note of an evaluation; -> whether it is the best so far."""
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if val_loss < best:  # which NaN never is
            self.best_val_loss, self.best_iter = val_loss, iter_num
            self.evaluations_since_best = 0
            return True
        self.evaluations_since_best += 1
        return False


def shared(config: TrainConfig, devices: Sequence[str]) -> str:
    """How several devices share a run, in a line."""
    moments = "divided among them" if config.shard_optimizer else f"on {devices[0]}"
    return (
        f"devices: {', '.join(devices)}, each with {config.batch_size // len(devices)} of the "
        f"{config.batch_size} sequences of a micro-batch; the optimizer's moments {moments}"
    )


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
    """The last 1,000 messages, whether they were shown or not."""


class TrainingRun:
    """One run: iterate over it to train, step by step; ``result`` says what came of it.

    Without a folder nothing is written. With ``resume=True`` the run goes on from the newest
    checkpoint in its folder, with a path from that checkpoint, bit for bit as if never interrupted.
    ``allow_change`` names what may differ from the run that is resumed: fields of its configs,
    ``"data"`` or ``"tokenizer"``. Changes are kept in the checkpoints and in config.toml.
    ``init`` says where the model's weights are from, see ``checkpoint.start_from``; a run that is
    resumed knows it. The config says which of the weights learn, see ``lora.prepare``. A ``trial``
    of the same model and config lends its optimizer and its jitted functions to a new run. An
    ``exam`` is held at evaluations, by the first rank.

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
        trial: Trial | None = None,
        ranks: Alone | None = None,
        exam: Exam | None = None,
    ) -> None:
        self.exam = exam
        self.ranks = ranks or Alone()
        self.ranks.check(config)
        precision.require(config.dtype)
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.train_tokens, self.val_tokens = train_tokens, val_tokens
        parts = {"train": train_tokens} | ({} if val_tokens is None else {"val": val_tokens})
        for tokens in parts.values():
            batches.check_length(tokens, model.config.block_size)
        devices = open_devices(config.devices)
        if trial is not None:
            optimizer = trial.optimizer
        elif optimizer is None:
            lora.prepare(model, config)
        self.optimizer = optimizer or make_optimizer(model.trainable(), config)
        if config.sync_every is not None:
            give_outer_momentum(self.optimizer)
        self._jitted = None if trial is None else trial.jitted
        self._check_optimizer()
        self.init = None if init is None else dict(init)
        self.folder = user_path(folder) if folder is not None and self.ranks.first else None
        self._keeps = self.folder is not None
        """Whether the first rank writes checkpoints."""
        self.source = dict(source or {})
        self.progress, self.iter_num, self.elapsed = Progress(), 0, 0.0
        self.guard, self.scaling = Guard(config), LossScale(config.dtype)
        self.decoder = Decoder(model) if trial is None else trial.decoder
        self.changes: list[dict[str, Any]] = []
        """What was allowed to change when the run was resumed, and at which step."""
        self.output = Output(self.folder, config)
        if len(devices) > 1:
            self.notice(shared(config, devices))
        self.fingerprints = {part: data_fingerprint(tokens) for part, tokens in parts.items()}
        try:
            self.ranks.same(self._facts())
            if self.ranks.first:
                self.output.check(bool(resume))
                self._resume(resume, changes.parse(allow_change))
            if self.folder is not None:
                self._begin(anew=resume is not True)
            self._go_on_as_first()
            divided = config.shard_optimizer and self.ranks.size > 1
            self.rank_shares = RankShares(self.optimizer, self.ranks) if divided else None
        except BaseException:
            self.output.release()
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

    def _resume(self, resume: bool | str | Path | None, allow: frozenset[str]) -> None:
        """Go on from a checkpoint, if one is asked for; refuse what differs and is not allowed."""
        if resume is None or resume is False:
            if allow:
                raise UsageError("allow_change is for a run that is resumed: give resume=True too.")
            return
        path = self.output.find(resume)
        if path is None:
            return
        meta = checkpoint.read_meta(path)
        described = None if self.tokenizer is None else self.tokenizer.to_dict()
        found = changes.differences(
            meta, self.model.config, self.config, self.fingerprints, described
        )
        changes.check(path, found, allow, meta.iter_num)
        self.changes = [*changes.past(meta.progress), *(c.at(meta.iter_num) for c in found)]
        for change in found:
            self.notice(f"changed from here on: {change}")
        self.ranks.save_asked = bool(found)  # the next checkpoint, which records them, is due
        changes.check_random_state(path, meta)
        self.output.check_same_run(path, meta)
        checkpoint.load(path, self.model, self.optimizer)
        self.iter_num, self.output.newest, self.init = meta.iter_num, path, meta.init
        known = {k: v for k, v in meta.progress.items() if k in vars(self.progress)}
        self.progress = Progress(**known)
        self.elapsed = float(meta.progress.get("elapsed", 0.0))
        self.guard.load(meta.progress.get("skips"))
        self.scaling.load(meta.progress.get("loss_scale"))

    def _facts(self) -> dict[str, str]:
        """What ranks that train together must have in common, by name."""
        tables = {"model": self.model.config.to_dict(), "train": self.config.to_dict()}
        settings = {f"{t}.{k}": repr(v) for t, values in tables.items() for k, v in values.items()}
        described = None if self.tokenizer is None else self.tokenizer.to_dict()
        data = {f"data ({part})": mark for part, mark in self.fingerprints.items()}
        return {"vocabulary": changes.vocabulary(described), **settings, **data}

    def _go_on_as_first(self) -> None:
        """Take over the weights, the moments and the progress of the first rank."""
        state = optimizer_state(self.optimizer, self.model.parameters())
        found = self.ranks.copy_first(
            lambda: {
                "iter_num": self.iter_num,
                "progress": vars(self.progress),
                "skips": self.guard.state(),
                "loss_scale": self.scaling.state(),
                "keeps": self.folder is not None,
            },
            [*self.model.parameters().values(), *state.values()],
        )
        if found is not None:
            self.iter_num, self.progress = found["iter_num"], Progress(**found["progress"])
            self.guard.load(found["skips"])
            self.scaling.load(found["loss_scale"])
            self._keeps = found["keeps"]

    def _begin(self, anew: bool) -> None:
        """Take the folder, after all that can be refused has been checked.

        Raises UsageError if what the run is going to write would be refused when it is read.
        """
        settings = self._settings()
        if self.tokenizer is not None:
            check_readable(self.tokenizer)
        layout = checkpoint.layout_of(checkpoint.named_tensors(self.model, self.optimizer))
        checkpoint.rehearse(self._meta(self.elapsed, None), layout)
        size = checkpoint.state_size(self.model, self.optimizer)
        self.output.foresee(size, self.config.max_iters - self.iter_num)
        found = self.progress
        best = None if found.best_val_loss is None else (found.best_iter, found.best_val_loss)
        bytes_per_token = self.bytes_per_token
        self.output.begin(settings, self.tokenizer, bytes_per_token, self.iter_num, best, anew)

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

    # ---- while it trains ----

    @property
    def history(self) -> History:
        """The rows of the run, one per step."""
        return self.output.history

    def stop(self) -> None:
        """End the run after the step in progress, with a checkpoint. Safe in a signal handler.

        Several ranks end after the next step that all of them take.
        """
        self.ranks.stop_asked = True

    def save_soon(self) -> None:
        """Write a checkpoint after the step in progress and go on. Safe in a signal handler.

        Of several ranks the first writes it, after the next step that all of them take.
        """
        self.ranks.save_asked = True

    def close(self) -> None:
        """Give the folder up before the run has ended; iterating takes it again."""
        self.output.close()

    def notice(self, message: str) -> None:
        """Add a message for the user, which comes with the step in progress."""
        self.output.notices.add(message)

    def take_notices(self) -> tuple[str, ...]:
        """The messages since the last step; they will not come with the next one."""
        return self.output.notices.take()

    @property
    def result(self) -> TrainResult:
        return TrainResult(
            self.iter_num,
            self.optimizer,
            self.history,
            self.progress.best_val_loss,
            self.output.newest,
            stopped=self.iter_num < self.config.max_iters,
            skipped=self.guard.skipped,
            notices=tuple(self.output.notices.kept),
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
            jitted=self._jitted,
            ranks=self.ranks,
            scaling=self.scaling,
            rank_shares=self.rank_shares,
        )
        before = self.elapsed
        try:
            self.output.take()
            if self._out_of_patience():  # it was over when it stopped
                self.ranks.over = True
                return
            with self.output.saving():
                for step in steps:
                    self.iter_num, self.elapsed = step.iter, before + step.elapsed
                    self.output.hear()
                    step = self._record(replace(step, elapsed=self.elapsed))
                    yield step
                    if self._stopping() and step.checkpoint is None and self._save_due(step):
                        self._save(step)  # stop() was called after the step was written down
                    if self._stopping():
                        break
                self.ranks.over = True
        except TrainingError as error:
            self.output.hear()
            newest = self.output.newest
            kept = f"The last checkpoint is {newest}." if newest else ""
            raise TrainingError(f"{error} {kept}".rstrip()) from error
        finally:
            self.close()
            if self.ranks.over:
                self.ranks.leave()

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Bytes per token of the validation text, or else of the training text; None if unknown."""
        text = self.train_tokens if self.val_tokens is None else self.val_tokens
        return None if self.tokenizer is None else bytes_per_token(text, self.tokenizer)

    def bits_per_byte(self, loss: float | None) -> float | None:
        """A loss in nats per token as bits per byte of text; None without a loss or tokenizer."""
        return bits_per_byte(loss, self.bytes_per_token)

    def _record(self, step: Step) -> Step:
        """Judge, sample, save and write down one step; -> the step, completed.

        Ranks other than the first judge it only, and give up their moments for a checkpoint.
        """
        if step.skipped:
            self.notice(f"step {step.iter} skipped: {step.skipped}")
        elif step.overflows:
            self.notice(
                f"step {step.iter}: gradients overflowed float16; the loss scale is "
                f"{step.loss_scale:g} from here on"
            )
        step = replace(
            step,
            train_bits_per_byte=self.bits_per_byte(step.train_loss),
            val_bits_per_byte=self.bits_per_byte(step.val_loss),
        )
        if step.val_loss is not None:
            step = replace(step, best=self.progress.see(step.val_loss, step.iter))
        if not self.ranks.first:
            due = self._save_due(step)
            return replace(step, checkpoint=self._save(step)) if due else step
        for message in self.ranks.news:
            self.notice(f"step {step.iter}: {message}")
        self.ranks.news.clear()
        if self._due(step, self.config.sample_interval):
            step = replace(step, sample=self._sample(step.iter))
        if step.val_loss is not None and self.exam is not None:
            step = replace(step, exact=self._examined(self.exam, step))
        self.output.append(self.history, self._row(step))
        if step.sample is not None:
            self.output.append(self.output.samples, {"iter": step.iter, "text": step.sample})
        if self._save_due(step):
            step = replace(step, checkpoint=self._save(step))
        return replace(step, notices=self.take_notices())

    def _row(self, step: Step) -> dict[str, Any]:
        """A step as it is written into metrics.jsonl."""
        row: dict[str, Any] = {"iter": step.iter, "train_loss": step.train_loss}
        if step.train_bits_per_byte is not None:
            row["train_bits_per_byte"] = step.train_bits_per_byte
        if step.val_loss is not None:
            row |= {"val_loss": step.val_loss, "best": step.best}
        if step.val_bits_per_byte is not None:
            row["val_bits_per_byte"] = step.val_bits_per_byte
        if step.exact is not None:
            row |= {"exact": step.exact["total"], "exact_by_kind": step.exact}
        if step.skipped:
            row["skipped"] = step.skipped
        if self.ranks.lost:
            row["lost_ranks"], self.ranks.lost = self.ranks.lost, []
        row |= {
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens_per_second": step.tokens_per_second,
            "elapsed": step.elapsed,
            "memory": resources.memory(),
        }
        if step.loss_scale is not None:
            row["loss_scale"] = step.loss_scale
        if (devices := self.config.n_devices) > 1:
            row["devices"] = devices
        if step.skipped or step.iter % max(1, self.config.max_iters // LAYER_ROWS) == 0:
            row["grad_norms"] = {name: short(norm) for name, norm in step.grad_norms.items()}
        return row

    def _save_due(self, step: Step) -> bool:
        asked = self.ranks.saving
        self.ranks.saved()
        due = self._due(step, self.config.checkpoint_interval) or self.guard.exhausted
        if not self._keeps or not (step.best or asked or due or self._stopping()):
            return False
        return not (step.skipped and bad_parameter(self.model))  # damaged weights are not kept

    def _save(self, step: Step) -> Path:
        """Begin to save the state; -> where it will be, for ranks other than the first its name."""
        if not self.ranks.first:
            if self.rank_shares is not None:
                self.rank_shares.send()
            return checkpoint_path(Path(), step.iter)
        meta = self._meta(step.elapsed, step.train_loss)
        return self.output.save(
            self.model, self.optimizer, meta, step.val_loss if step.best else None
        )

    def _due(self, step: Step, interval: int | None) -> bool:
        interval = interval or self.config.eval_interval
        return step.iter % interval == 0 or step.iter == self.config.max_iters

    def _stopping(self) -> bool:
        return self.ranks.stopping or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stop_patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _meta(self, elapsed: float, train_loss: float | None) -> checkpoint.Meta:
        """What a checkpoint of this moment says of itself."""
        progress = {**vars(self.progress), "elapsed": elapsed, "train_loss": train_loss}
        progress["skips"] = self.guard.state()
        if (scale := self.scaling.state()) is not None:
            progress["loss_scale"] = scale
        if self.changes:
            progress["changes"] = self.changes
        return checkpoint.Meta(
            iter_num=self.iter_num,
            model=self.model.config,
            train=self.config,
            tokenizer=None if self.tokenizer is None else self.tokenizer.to_dict(),
            data=self.fingerprints,
            progress=progress,
            random_state={
                "seed": self.config.seed,
                "step": self.iter_num,
                "order": batches.ORDER,
            },
            init=self.init,
        )

    def _sample(self, iter_num: int) -> str | None:
        """A short text in the model's present manner; a notice, and None, where that fails."""
        try:
            return None if self.tokenizer is None else self._text(self.tokenizer, iter_num)
        except Exception as error:  # whatever it is, it must not end the run
            self.notice(f"step {iter_num}: no sample could be written: {clip(error)}")
            return None

    def _examined(self, exam: Exam, step: Step) -> Mapping[str, float] | None:
        """The marks of an exam, if there is time for one; a notice, and None, where it fails."""
        if not (exam.due(step.elapsed) or step.iter == self.config.max_iters):
            return None
        try:
            return exam.take(self.decoder)
        except Exception as error:  # whatever it is, it must not end the run
            self.notice(f"step {step.iter}: no questions could be asked: {clip(error)}")
            return None

    def _text(self, tokenizer: Tokenizer, iter_num: int) -> str:
        """The prompt and its continuation; ``iter_num`` is the seed."""
        asked = self.train_tokens if self.val_tokens is None else self.val_tokens
        if isinstance(asked, Conversations):
            return self._answer(tokenizer, asked.question(iter_num), iter_num)
        try:
            prompt = tokenizer.encode(self.config.sample_prompt)
        except TokenizerError:
            prompt = []
        prompt = prompt or [int(self.train_tokens[0])]
        return self._answer(tokenizer, prompt, iter_num)

    def _answer(self, tokenizer: Tokenizer, prompt: list[int], iter_num: int) -> str:
        config = SampleConfig(temperature=0.8, top_k=min(200, self.model.config.vocab_size))
        ends, limit = ends_of(tokenizer), tokenizer.vocab_size
        tokens = generate_tokens(
            self.decoder, [prompt], SAMPLE_TOKENS, config, iter_num, limit=limit, ends=ends
        )
        ids = prompt + [int(token[0]) for token in tokens]
        return tokenizer.decode(ids[:-1] if ids[-1] in ends else ids)[:SAMPLE_CHARS]
