"""The program, with signals to its whole process group at chosen moments: MOMENTS ARGUMENT…

MOMENTS are phase:number:signal, divided by commas: save:2:SIGTERM is when the second checkpoint is
being written; with AWAITED in place of a signal, it is sent by the test.
"""

import importlib
import os
import signal
import sys
import threading
from pathlib import Path

from tinygpt.cli import main
from tinygpt.runs.checkpoint import background
from tinygpt.runs.run import TrainingRun

train = importlib.import_module("tinygpt.training.loop")
MOMENTS = [moment.split(":") for moment in sys.argv[1].split(",")]
seen = dict.fromkeys(["compile", "step", "evaluation", "save"], 0)


def passes(phase):
    """Count the phases, and send what is due.

    The phase waits until the run knows of its signals: they arrive in a thread of their own, and a
    step of this size can be over before that thread has its turn.
    """
    seen[phase] += 1
    due = [name for where, n, name in MOMENTS if (where, int(n)) == (phase, seen[phase])]
    for name in due:
        if phase == "compile":  # the compiler does it, see test_signals.py
            Path(os.environ["ARMED"]).write_text(name + "\n")
        elif name != "AWAITED":
            os.killpg(0, signal.Signals[name])
    if due and phase != "compile":
        assert known.wait(60)
        known.clear()


def makes_known(function):
    def call(run):
        function(run)
        known.set()

    return call


def announced(phase, function):
    def call(*args, **kwargs):
        passes(phase)
        return function(*args, **kwargs)

    return call


def make_train_step(*args, **others):
    passes("compile")
    return announced("step", made(*args, **others))


known = threading.Event()
TrainingRun.stop = makes_known(TrainingRun.stop)
TrainingRun.save_soon = makes_known(TrainingRun.save_soon)
made, train.make_train_step = train.make_train_step, make_train_step
train.evaluate = announced("evaluation", train.evaluate)
background.write = announced("save", background.write)
sys.exit(main(sys.argv[2:]))
