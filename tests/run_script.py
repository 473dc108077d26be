"""A run in a process of its own, for the tests of resuming: FOLDER STEPS [resume]."""

import sys

import numpy as np

from tinygpt import GPT
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.runs.run import TrainingRun
from tinygpt.text.tokenizers import ByteTokenizer

TEXT = b"In the beginning was the word, and the word was tokenized. " * 20
TOKENS = np.frombuffer(TEXT, np.uint8)
MODEL = GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16, dropout=0.2)
TRAIN = TrainConfig(max_iters=12, warmup_steps=2, batch_size=4, eval_interval=3, eval_iters=2,
                    checkpoint_interval=4, keep_last=0, early_stop_patience=9, seed=11)  # fmt: skip


def make_run(folder, resume=None, config=TRAIN, tokens=TOKENS, model=MODEL, **options):
    return TrainingRun(
        GPT(model, seed=5), config, tokens[:-200], tokens[-200:],
        tokenizer=ByteTokenizer(), folder=folder, resume=resume, **options,
    )  # fmt: skip


def main(folder, steps, resume=False):
    run = make_run(folder, resume)
    for step in run:
        if step.iter == int(steps):
            run.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "resume" in sys.argv)
