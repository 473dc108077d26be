"""What a run takes, in a process of its own: MODEL TRAIN FOLDER, the first two as JSON.

Prints one JSON object: what was foreseen, what was taken, and the memory after every evaluation.
"""

import json
import sys

import numpy as np
from tinygrad import Tensor
from tinygrad.helpers import GlobalCounters

from tinygpt import GPT
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.machine import resources
from tinygpt.runs.run import TrainingRun
from tinygpt.text.tokenizers import ByteTokenizer
from tinygpt.training import preflight, probe


def main(model, train, folder):
    model, train = GPTConfig(**json.loads(model)), TrainConfig(**json.loads(train))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 5000).astype(np.uint16)
    Tensor([1.0]).realize()  # the device is open
    estimate = preflight.preflight(model, train)
    probe.seconds_per_step(model, train)  # as the command does
    tokenizer = ByteTokenizer() if model.vocab_size == 256 else None
    run = TrainingRun(
        GPT(model), train, tokens, tokens[-2000:], tokenizer=tokenizer, folder=folder
    )  # fmt: skip
    after = []
    for step in run:
        if step.val_loss is not None:
            after.append((step.iter, resources.memory(), GlobalCounters.mem_used))
    taken = resources.peak_memory() - estimate.process
    device = max(used for _, _, used in after)
    print(json.dumps({"foreseen": estimate.to_dict(), "taken": taken, "device": device,
                      "after": after}))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
