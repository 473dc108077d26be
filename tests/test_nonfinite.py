"""Numbers that go wrong change nothing, are counted, and are explained when they do not stop.

The bad numbers come by way of the data: a batch with the token BAD in it has a loss, or a gradient,
that is NaN, infinite or merely large. So they hit single steps, single micro-batches, and the same
ones again after a resume.
"""

import importlib
import io
import json
import math
from itertools import count

import numpy as np
import pytest
from rich.console import Console
from tinygrad import Tensor, nn
from tinygrad.helpers import Context

from tinygpt.api import GPT
from tinygpt.cli import main
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import CheckpointError, TrainingError
from tinygpt.machine.transfer import write
from tinygpt.runs import plots
from tinygpt.runs.display.live import LiveDisplay
from tinygpt.runs.display.plain import PlainDisplay
from tinygpt.runs.folder import list_checkpoints
from tinygpt.runs.run import TrainingRun
from tinygpt.text.batches import batch
from tinygpt.training.diagnose import diagnose
from tinygpt.training.guard import WINDOW, Guard, why_skipped
from tinygpt.training.loop import Step, train_steps
from tinygpt.training.optim import make_optimizer, optimizer_state
from tinygpt.training.step import make_train_step

BAD = 12
CONFIG = GPTConfig(block_size=4, vocab_size=13, n_layer=1, n_head=2, n_embd=8)
DEEP = GPTConfig(block_size=4, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
CLEAN = (np.arange(2000) * 7 % 11).astype(np.uint16)


class Poisoned(GPT):
    """A model whose loss, or gradient, is bad for a batch with the token BAD."""

    def __init__(self, where="loss", what=math.nan, seed=1):
        super().__init__(CONFIG, seed)
        self.where, self.what = where, what

    def loss(self, tokens, targets, drop=None, half=None):
        loss = super().loss(tokens, targets, drop, half)
        bad = (tokens == BAD).any()
        if self.where == "loss":
            return loss + bad.where(self.what, 0.0)
        if self.where == "size":
            return loss * bad.where(self.what, 1.0)
        # The square root is steep at 0: a loss that is finite, and a gradient that is not.
        w = self.ln_f.weight[0]
        on = bad.cast(loss.dtype)
        return loss + on * (w - w.detach() + 1 - on).sqrt()


def adamw(parameters):
    return make_optimizer(parameters, TrainConfig(weight_decay=0.1))


def muon(parameters):
    return make_optimizer(parameters, TrainConfig(weight_decay=0.1, optimizer="muon"))


OPTIMIZERS = {
    "ours": adamw,
    "Muon": muon,
    "SGD": lambda named: nn.optim.SGD(list(named.values()), momentum=0.9, weight_decay=0.1),
    "Adam": lambda named: nn.optim.Adam(list(named.values())),
}


def state(model, optimizer):
    """Every bit that a step may change; the rate is set for each step, whatever comes of it."""
    named = {**model.parameters(), **optimizer_state(optimizer, model.parameters())}
    return {name: t.numpy().tobytes() for name, t in named.items() if name != "lr"}


def batches(config, poison=None):
    """x, y (A, B, T) of one step after the other; ``poison`` is the micro-batch to spoil."""
    rows, shape = config.grad_accum_steps * config.batch_size, (-1, config.batch_size, 4)
    for i in count():
        x, y = (a.reshape(shape).copy() for a in batch(CLEAN, i, config.seed, rows, 4))
        if poison is not None:
            x[poison, -1, -1] = BAD
        yield x, y


@pytest.mark.parametrize(
    ("name", "where", "what", "micro_batches", "jit", "threads"),
    [
        ("ours", "loss", math.nan, 1, 1, "1"),
        ("ours", "loss", -math.inf, 3, 1, "2"),
        ("ours", "gradient", math.inf, 1, 1, "2"),
        ("ours", "gradient", math.inf, 3, 1, "1"),
        pytest.param("ours", "gradient", math.inf, 1, 0, "2", marks=pytest.mark.slow),
        ("ours", "loss", math.nan, 2, 0, "1"),
        ("Muon", "gradient", math.inf, 1, 1, "2"),
        ("SGD", "gradient", math.inf, 1, 1, "1"),
        pytest.param("SGD", "loss", math.nan, 3, 1, "2", marks=pytest.mark.slow),
        ("Adam", "gradient", math.inf, 3, 1, "1"),
    ],
)
def test_a_bad_step_leaves_every_bit_and_the_others_go_on_without_it(
    name, where, what, micro_batches, jit, threads, monkeypatch
):
    monkeypatch.setenv("TINYGPT_THREADS", threads)
    config = TrainConfig(batch_size=2, grad_accum_steps=micro_batches)
    sides = []
    for _ in range(2):
        model = Poisoned(where, what)
        optimizer = OPTIMIZERS[name](model.parameters())
        sides.append((model, optimizer, make_train_step(model, optimizer, config)))
    (model, optimizer, step), (twin, other, spared) = sides
    good, bad = batches(config), batches(config, poison=micro_batches // 2)
    with Context(JIT=jit):
        for i in range(5 if jit else 1):
            x, y = next(good)
            assert step(x, y, 1e-3, (0, i)) == spared(x, y, 1e-3, (0, i))
            before = state(model, optimizer)
            loss, norm, taken, _ = step(*next(bad), 1e-3, (0, i))
            assert not taken and math.isfinite(loss) is (where == "gradient")
            assert not math.isfinite(norm) or where == "loss"
            assert state(model, optimizer) == before
            assert before == state(twin, other)


def test_a_weight_that_is_no_number_stays_the_only_one():
    model = GPT(DEEP, 1)
    weight = model.parameters()["h.1.mlp.c_fc.weight"]
    values = weight.numpy()
    values[3, 2] = np.nan
    write(weight, values)
    config = TrainConfig(batch_size=2, warmup_steps=0, max_iters=9, max_skipped=4)
    optimizer = make_optimizer(model.parameters(), config)
    before = state(model, optimizer)
    steps = []
    with pytest.raises(TrainingError) as error:
        steps.extend(train_steps(model, optimizer, config, CLEAN))
        pytest.fail("it went on")
    assert state(model, optimizer) == before
    for words in ["4 steps in a row", "step 4", "loss nan", "parameter h.1.mlp.c_fc.weight",
                  "1 NaN of 1,024 values", "earlier checkpoint"]:  # fmt: skip
        assert words in str(error.value)


# What is named -------------------------------------------------------------------------------


def test_the_first_tensor_that_is_not_finite_is_named():
    x, y = next(batches(TrainConfig(batch_size=2), poison=0))
    key = [Tensor([1, 2], dtype="uint32").realize()]

    def named(model, xs=x, ys=y, keys=key):
        return diagnose(model, xs, ys, keys)

    fine = named(Poisoned("size", 1.0))
    assert fine.name is None and "everything is finite" in str(fine)
    assert named(Poisoned()).name == "loss"
    steep = Poisoned("gradient")
    assert named(steep).name == "gradient of ln_f.weight"
    assert type(steep.h[0].ln_1).__name__ == "LayerNorm"  # the layers are as they were
    for part, wanted in [
        ("h.1.mlp.c_fc.weight", "h.1.mlp.c_fc output"),
        ("h.1.attn.c_attn.weight", "h.1.attn.c_attn output"),
        ("h.0.ln_2.weight", "h.0.ln_2 output"),
        ("wpe.weight", "h.0.ln_1 output"),
    ]:
        model = GPT(DEEP, 1)
        weight = model.parameters()[part]
        write(weight, weight.numpy() * np.float32(3e38) / np.abs(weight.numpy()).max())
        assert named(model).name == wanted
    model = Poisoned("loss", math.inf)
    spoiled = np.concatenate([x, x, x])
    spoiled[:2] = np.where(spoiled[:2] == BAD, 1, spoiled[:2])
    assert named(model, spoiled, np.concatenate([y] * 3), key * 3).name == (
        "loss in micro-batch 3 of 3"
    )


def test_what_to_try_depends_on_how_the_run_was_set():
    x, y = next(batches(TrainConfig(batch_size=2), poison=0))
    finding = diagnose(Poisoned(), x, y, [Tensor([1, 2], dtype="uint32").realize()])
    advice = finding.advice(TrainConfig(learning_rate=0.25, warmup_steps=7, grad_clip=0.0))
    assert "learning_rate (now 0.25)" in advice and "now 7" in advice and "grad_clip=1.0" in advice
    assert "grad_clip" not in finding.advice(TrainConfig())


# Runs ----------------------------------------------------------------------------------------

TRAIN = TrainConfig(
    max_iters=12, warmup_steps=2, batch_size=2, eval_interval=3, eval_iters=1, keep_last=0,
    checkpoint_interval=1, seed=4, max_skipped=4,
)  # fmt: skip


def poisoned_tokens(steps, config=TRAIN):
    """CLEAN, with BAD where just these steps, from 1, read it: none of the others does."""
    tokens = CLEAN.copy()
    rows = config.batch_size * config.grad_accum_steps
    where = np.arange(tokens.size)

    def read(step):
        return set(batch(where, step - 1, config.seed, rows, 4)[0].ravel().tolist())

    others = set().union(*(read(i) for i in range(1, config.max_iters + 1) if i not in steps))
    for step in steps:
        tokens[min(read(step) - others)] = BAD
    return tokens


def run_of(folder, tokens, config=TRAIN, resume=None, what=math.nan, where="loss"):
    model = Poisoned(where, what)
    return TrainingRun(model, config, tokens, CLEAN[:200], folder=folder, resume=resume)


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    varying = ("elapsed", "tokens_per_second", "memory")
    return [{k: v for k, v in row.items() if k not in varying} for row in rows]


def weights_of(path):
    return {name: t.tobytes() for name, t in checkpoint_arrays(path).items()}


def checkpoint_arrays(path):
    from safetensors.numpy import load_file

    return load_file(path)


def test_skipped_steps_are_told_written_down_and_survive_a_resume(tmp_path):
    bad = {2, 6, 7}
    tokens = poisoned_tokens(bad)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = run_of(whole, tokens)
    steps = list(run)
    assert {s.iter for s in steps if s.skipped} == bad
    assert run.result.skipped == 3 and run.result.best_val_loss < 3
    told = [notice for step in steps for notice in step.notices]
    assert told == [f"step {i} skipped: loss nan" for i in (2, 6, 7)]
    for a, b in [(1, 2), (5, 6), (6, 7)]:
        one, two = (weights_of(whole / f"ckpt_{i}.safetensors") for i in (a, b))
        assert {n for n in one if one[n] != two[n]} <= {n for n in one if n.endswith("lr")}
    rows = rows_of(whole)
    assert [row["iter"] for row in rows if row.get("skipped")] == [2, 6, 7]
    assert all(math.isfinite(loss) for _, loss in plots.read_curves(whole).train)
    for stop in (2, 6, 9):  # just after a skipped step, between two, later
        for step in (first := run_of(parts / str(stop), tokens)):
            if step.iter == stop:
                first.stop()
        resumed = run_of(parts / str(stop), tokens, resume=True)
        assert resumed.guard.skipped == sum(i <= stop for i in bad)
        list(resumed)
        assert rows_of(parts / str(stop)) == rows
        last = "ckpt_12.safetensors"
        assert weights_of(parts / str(stop) / last) == weights_of(whole / last)


def test_spikes_are_skipped_by_choice_and_judged_the_same_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("tinygpt.training.guard.WINDOW", 8)
    tokens = poisoned_tokens({9, 11})
    wanted = TrainConfig(**{**TRAIN.to_dict(), "skip_spikes": 6.0})

    def skipped(folder, config, resume=None, until=12):
        run = run_of(folder, tokens, config, resume, what=8.0, where="size")
        found = []
        for step in run:
            found += [step.iter] if step.skipped else []
            if step.iter == until:
                run.stop()
        return found

    assert skipped(tmp_path / "kept", TRAIN) == []
    assert skipped(tmp_path / "whole", wanted) == [9, 11]
    assert skipped(tmp_path / "parts", wanted, until=8) == []
    assert skipped(tmp_path / "parts", wanted, resume=True) == [9, 11]
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert "above" in rows_of(tmp_path / "whole")[8]["skipped"]
    last = "ckpt_12.safetensors"
    assert weights_of(tmp_path / "parts" / last) == weights_of(tmp_path / "whole" / last)


def test_too_many_in_a_row_stop_the_run_with_a_good_checkpoint(tmp_path):
    tokens = poisoned_tokens({3, 6, 7, 8, 9, 10})
    run = run_of(tmp_path, tokens)
    seen = []
    with pytest.raises(TrainingError) as error:
        seen.extend(run)
    message = str(error.value)
    for words in ["4 steps in a row", "at step 9", "not finite: loss", "lower learning_rate",
                  "ckpt_9.safetensors"]:  # fmt: skip
        assert words in message
    assert [row["iter"] for row in rows_of(tmp_path) if row.get("skipped")] == [3, 6, 7, 8, 9]
    arrays = checkpoint_arrays(tmp_path / "ckpt_9.safetensors")
    assert all(np.isfinite(a).all() for a in arrays.values())
    assert run_of(tmp_path, tokens, resume=True).guard.in_a_row == 0  # all its patience again


def test_a_run_whose_last_steps_are_all_bad_does_not_end_well(tmp_path):
    with pytest.raises(TrainingError, match="at step 12"):
        list(run_of(tmp_path, poisoned_tokens({9, 10, 11, 12})))


def test_damaged_weights_are_not_saved(tmp_path):
    run = run_of(tmp_path, CLEAN)
    weight = run.model.parameters()["wpe.weight"]
    with pytest.raises(TrainingError, match=r"parameter wpe\.weight.*ckpt_5"):
        for step in run:
            if step.iter == 5:
                write(weight, np.full(weight.shape, np.inf, np.float32))
    assert max(list_checkpoints(tmp_path)).name == "ckpt_5.safetensors"


def test_a_validation_loss_of_nan_is_never_the_best(tmp_path):
    progress = importlib.import_module("tinygpt.runs.run").Progress()
    assert not progress.see(math.nan, 1) and progress.see(2.0, 2)
    assert not progress.see(math.nan, 3) and progress.best_val_loss == 2.0


def test_the_command_stops_without_a_traceback(tmp_path, monkeypatch, capfd):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    loss = GPT.loss
    monkeypatch.setattr(GPT, "loss", lambda *given, **named: loss(*given, **named) * math.inf)
    code = main(
        ["train", str(text), "--out", str(tmp_path / "run"), "--tokenizer", "char",
         "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16",
         "--model.block-size", "8", "--train.max-iters", "30", "--train.batch-size", "2",
         "--train.max-skipped", "3", "--train.eval-iters", "1"]
    )  # fmt: skip
    told = capfd.readouterr().err
    assert code == 1
    assert "3 steps in a row" in told and "not finite: loss" in told and "Traceback" not in told
    assert "step 1 skipped: loss inf" in told


# The guard -----------------------------------------------------------------------------------


def test_a_spike_is_so_many_deviations_above_the_mean_of_the_window():
    guard = Guard(TrainConfig(skip_spikes=3.0))
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(4, 0.5, 200), rng.normal(1, 0.1, 200)
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if i < WINDOW // 2:
            assert guard.limits() == (math.inf, math.inf)
        guard.see(loss, norm, taken=True)
        guard.see(math.nan, 1e9, taken=False)  # has no say
    for limit, seen in zip(guard.limits(), (losses[-WINDOW:], norms[-WINDOW:]), strict=True):
        assert limit == pytest.approx(seen.mean() + 3 * seen.std())
    assert guard.skipped == 200 and guard.in_a_row == 1
    twin = Guard(TrainConfig(skip_spikes=3.0))
    twin.load(json.loads(json.dumps(guard.state())))
    assert twin.limits() == guard.limits() and twin.state() == guard.state()


def test_a_spike_counts_no_more_than_its_limit():
    guard, other = (Guard(TrainConfig(skip_spikes=3.0)) for _ in range(2))
    for value in np.random.default_rng(0).normal(4, 0.5, 100):
        guard.see(value, 1.0, taken=True)
        other.see(value, 1.0, taken=True)
    limit, _ = guard.limits()
    guard.see(1e9, 1.0, taken=False)
    other.see(limit, 1.0, taken=True)
    assert guard.limits() == other.limits()
    assert limit < guard.limits()[0] < 1.1 * limit


def test_steps_that_are_all_alike_leave_room_for_a_little_more():
    guard = Guard(TrainConfig(skip_spikes=6.0))
    for _ in range(WINDOW):
        guard.see(2.0, 1.0, taken=True)
    assert guard.limits() == pytest.approx((2.12, 1.06))


def test_a_run_that_had_given_up_gets_its_patience_back():
    guard = Guard(TrainConfig(max_skipped=2))
    guard.see(math.nan, 1.0, taken=False)
    assert not guard.exhausted
    guard.see(1.0, math.inf, taken=False)
    assert guard.exhausted
    again = Guard(TrainConfig(max_skipped=2))
    again.load(guard.state())
    assert not again.exhausted and again.skipped == 2


@pytest.mark.parametrize("state", [{}, {"skipped": "x", "in_a_row": 0, "seen": []}, 7,
                                   {"skipped": 0, "in_a_row": 0, "seen": [1]}])  # fmt: skip
def test_a_damaged_state_is_said(state):
    with pytest.raises(CheckpointError, match="skipped steps"):
        Guard(TrainConfig()).load(state)


def test_the_reason_names_what_was_too_large():
    assert why_skipped(math.nan, 1.0, (math.inf, math.inf)) == "loss nan"
    assert why_skipped(9.0, math.inf, (3.5, 2.0)) == "loss 9, above 3.5 and gradient norm inf"


# What is shown -------------------------------------------------------------------------------


def test_the_displays_count_skipped_steps_and_keep_their_numbers_out():
    settings = TrainConfig(max_iters=40)
    stream = io.StringIO()
    live = LiveDisplay(settings, console=Console(file=stream, force_terminal=True, width=100))
    plain = PlainDisplay(settings, stream=stream)
    for i in range(1, 9):
        bad = i in (3, 8)
        loss = 1e9 if bad else 4.0
        step = Step(i, loss, 1e-3, 0.5, 100.0, 1.0, skipped="loss 1e9" if bad else None)
        live.update(step)
        plain.update(step)
    assert stream.getvalue().splitlines()[-1].endswith("skipped 2")
    console = Console(file=io.StringIO(), width=100)
    console.print(live.render())
    shown = console.file.getvalue()
    assert "skipped 2" in shown and "train loss 4.0000" in shown and "8/40" in shown
    assert max(live._curve.points) == 4.0
