"""Ctrl-C in a Python program, and in a notebook, loses no step."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import threading
import time

import numpy as np
import pytest

from tinygpt import GPT, GPTConfig, TrainConfig, train
from tinygpt.runs import checkpoint, interrupts
from tinygpt.runs import run as runs
from tinygpt.runs.folder import list_checkpoints
from tinygpt.runs.history import read
from tinygpt.training.loop import Step

MODEL = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8)
CONFIG = TrainConfig(max_iters=6, batch_size=2, checkpoint_interval=100, eval_interval=100)
TOKENS = np.arange(200, dtype=np.uint16) % 16


class Steps:
    """Stand in for training; in the third step a signal arrives, and is waited for."""

    def __init__(self):
        self.signal, self.arrived, self.seen = signal.SIGINT, threading.Event(), []
        self.wait, self.again = True, False

    def __call__(self, model, optimizer, config, *_, start=0, **__):
        for done in range(start + 1, config.max_iters + 1):
            if done == 3 and self.signal:
                os.kill(os.getpid(), self.signal)
                assert not self.wait or self.arrived.wait(20)
                while self.again:
                    os.kill(os.getpid(), self.signal)
                    time.sleep(0.01)
            self.seen.append(done)
            yield Step(done, 1.0, 0.1, 0.1, 1.0, 0.1)


@pytest.fixture
def steps(monkeypatch):
    made = Steps()
    stop = runs.TrainingRun.stop

    def arrived(run):
        stop(run)
        made.arrived.set()

    monkeypatch.setattr(runs, "train_steps", made)
    monkeypatch.setattr(runs.TrainingRun, "stop", arrived)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield made
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    left = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert left == handlers
    assert not any(thread.name == "tinygpt-signals" for thread in threading.enumerate())


def go(folder, **options):
    return train(GPT(MODEL), CONFIG, TOKENS, out_dir=folder, **options)


def test_ctrl_c_is_an_interrupt_after_the_step_and_its_checkpoint(tmp_path, steps, capsys):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    [path] = list_checkpoints(tmp_path / "run")
    assert checkpoint.read_meta(path).iter_num == 3 == steps.seen[-1]
    err = capsys.readouterr().err
    assert "stopping after this step; once more stops at once" in err
    assert f"stopped at step 3, all of it kept in {tmp_path / 'run'}. To go on: train(" in err
    steps.signal = None
    assert go(tmp_path / "run", resume=True).iter_num == 6
    assert [row["iter"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_without_a_folder_the_model_keeps_what_it_has_learned(steps, capsys):
    with pytest.raises(KeyboardInterrupt):
        go(None)
    assert steps.seen == [1, 2, 3]
    assert "stopped at step 3, no folder was given to keep it in" in capsys.readouterr().err


def test_a_second_ctrl_c_interrupts_the_step(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(interrupts, "ECHO", 0)
    steps.again = True
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    assert steps.seen == [1, 2]
    steps.signal = None
    with pytest.raises(ValueError, match="no checkpoint"):  # not: somebody is training there
        go(tmp_path / "run", resume=tmp_path / "run")


def test_sigterm_ends_the_process_after_the_checkpoint(tmp_path, steps, monkeypatch):
    ended = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    steps.signal = signal.SIGTERM
    assert go(tmp_path / "run").stopped and ended == [signal.SIGTERM]
    assert (tmp_path / "run" / "ckpt_3.safetensors").is_file()
    monkeypatch.undo()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_or_handled_by_the_program_stays_so(steps, number):
    got = []
    own = signal.SIG_IGN if number == signal.SIGINT else lambda *_: got.append(number)
    before = signal.signal(number, own)
    try:
        steps.signal, steps.wait = number, False
        assert go(None).iter_num == 6
        assert got == ([] if number == signal.SIGINT else [number])
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_an_event_loop_gets_its_ctrl_c_when_the_step_is_done(steps):
    results = []

    async def training():
        results.append(go(None))
        await asyncio.sleep(0)
        results.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(training())
    [result] = results
    assert result.stopped and result.iter_num == 3


def test_in_another_thread_training_leaves_signals_alone(steps):
    steps.signal, results = None, []
    thread = threading.Thread(target=lambda: results.append(go(None)))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert results[0].iter_num == 6 and signal.getsignal(signal.SIGINT) is before


def test_notices_are_in_the_result_whether_shown_or_not(tmp_path, steps, capsys):
    steps.signal = None
    go(tmp_path / "run")
    longer = TrainConfig(**{**CONFIG.to_dict(), "max_iters": 8})
    result = train(
        GPT(MODEL), longer, TOKENS, out_dir=tmp_path / "run", resume=True,
        allow_change=("max_iters",), show=False,
    )  # fmt: skip
    assert "max_iters" in result.notices[0] and "changed from here on" in result.notices[0]


# A notebook -------------------------------------------------------------------------------------

CELL = """
import asyncio, os, signal, numpy as np
from tinygpt import GPT, GPTConfig, TrainConfig, train
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import list_checkpoints
from pathlib import Path
model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
tokens = np.arange(200, dtype=np.uint16) % 16
run = Path(RUN)
def config(steps):
    never = 10**6
    return TrainConfig(
        max_iters=steps, batch_size=2, eval_interval=never, checkpoint_interval=never
    )
def done():
    return checkpoint.read_meta(list_checkpoints(run)[-1]).iter_num
"""
LONG = "train(model, config(10**6), tokens, out_dir=run)"
REST = """
before = done()
change = ["max_iters"]
longer = config(before + 3)
result = train(model, longer, tokens, out_dir=run, resume=True, allow_change=change)
print(result.iter_num - before, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
BESIDE = """
ticks = 0
async def tick():
    global ticks
    while True:
        ticks += 1
        await asyncio.sleep(0)
beside = asyncio.ensure_future(tick())
result = await asyncio.to_thread(train, model, config(3), tokens)
beside.cancel()
print(result.iter_num, ticks > 0)
"""


class Notebook:
    """A kernel of Jupyter's, as a notebook uses it."""

    def __init__(self, client, manager):
        self.client, self.manager = client, manager

    def run(self, code, interrupt_at=None):
        """-> the error's name or None, and what was printed on both streams"""
        sent, text = self.client.execute(code), {"stdout": "", "stderr": ""}
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != sent:
                continue
            content, kind = message["content"], message["msg_type"]
            if kind == "stream":
                text[content["name"]] += content["text"]
                if interrupt_at and interrupt_at in content["text"]:
                    self.manager.interrupt_kernel()
                    interrupt_at = None
            if kind == "status" and content["execution_state"] == "idle":
                break
        while True:  # answers to wait_for_ready, which asks time and again, may still come
            reply = self.client.get_shell_msg(timeout=120)
            if reply["parent_header"].get("msg_id") == sent:
                return reply["content"].get("ename"), text["stdout"], text["stderr"]


@pytest.fixture
def notebook(tmp_path):
    jupyter = pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    manager = jupyter.KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path), stdout=-3, stderr=-3)  # -3: /dev/null
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield Notebook(client, manager)
    except queue.Empty:
        pytest.fail("The kernel did not answer within two minutes.")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_notebook_shows_training_and_loses_nothing_to_its_stop_button(notebook, tmp_path):
    assert notebook.run(f"RUN = {str(tmp_path / 'run')!r}\n{CELL}") == (None, "", "")
    error, _, err = notebook.run(LONG, interrupt_at="step 1/")
    assert error == "KeyboardInterrupt"
    assert "stopping after this step" in err and "all of it kept" in err
    [path] = list_checkpoints(tmp_path / "run")
    done = checkpoint.read_meta(path).iter_num
    error, _, err = notebook.run(LONG)  # the cell is run again: nothing is lost, or locked
    assert error == "UsageError"
    assert list_checkpoints(tmp_path / "run") == [path]
    error, out, err = notebook.run(REST)
    assert (error, out) == (None, "3 True\n")
    assert "changed from here on: max_iters" in err and f"step {done + 3}/" in err
    assert notebook.run(BESIDE)[:2] == (None, "3 True\n")  # while its event loop is running
