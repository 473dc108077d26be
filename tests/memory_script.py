"""What a run takes, in a process of its own: MODEL TRAIN FOLDER, the first two as JSON.

Prints one JSON object: what was foreseen, what was taken, and the memory after every evaluation.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
from tinygrad import Tensor
from tinygrad.helpers import GlobalCounters

from tinygpt import GPT
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.machine import resources
from tinygpt.runs.run import TrainingRun
from tinygpt.text.tokenizers import ByteTokenizer
from tinygpt.training import preflight, probe

NO_HUGE_PAGES = 41  # PR_SET_THP_DISABLE of prctl


def without_huge_pages():
    """Let the process have pages of 4 KiB only: where the system gives huge ones to all memory, it
    counts 2 MiB as taken where less is, and more as time goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(NO_HUGE_PAGES, 1, 0, 0, 0)


def resident():
    """-> bytes of the process that are its own, and those of files that are mapped into it.

    The system takes the latter away where they are not used for a while, and they come back: for
    memory that grows they say nothing.
    """
    try:
        status = Path("/proc/self/status").read_text()
        files = int(status.partition("RssFile:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        files = 0
    return resources.memory() - files, files


def main(model, train, folder):
    without_huge_pages()
    model, train = GPTConfig(**json.loads(model)), TrainConfig(**json.loads(train))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 5000).astype(np.uint16)
    Tensor([1.0]).realize()  # the device is open
    files = resident()[1]
    estimate = preflight.preflight(model, train)
    probe.seconds_per_step(model, train)  # as the command does
    tokenizer = ByteTokenizer() if model.vocab_size == 256 else None
    run = TrainingRun(
        GPT(model), train, tokens, tokens[-2000:], tokenizer=tokenizer, folder=folder
    )  # fmt: skip
    after = []
    for step in run:
        if step.val_loss is not None:
            after.append((step.iter, resident()[0], GlobalCounters.mem_used))
    taken = resources.peak_memory() - estimate.process - (resident()[1] - files)
    device = max(used for _, _, used in after)
    print(json.dumps({"foreseen": estimate.to_dict(), "taken": taken, "device": device,
                      "files": [files, resident()[1]], "after": after}))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
