"""What a run trains with, jitted before the run begins, so that its pace can be measured.

The steps of a run are fixed when it begins. ``tinygpt train --minutes`` therefore takes a few real
ones first, puts weights and moments back, and hands the jitted functions on to the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tinygrad.nn.optim import Optimizer

from tinygpt.config import SampleConfig, TrainConfig
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import generate_tokens
from tinygpt.machine.transfer import read, write
from tinygpt.model import lora
from tinygpt.model.transformer import Transformer
from tinygpt.text import batches
from tinygpt.text.tokens import Tokens
from tinygpt.training.budget import Pace
from tinygpt.training.loop import make_jitted
from tinygpt.training.optim import learning_rate, make_optimizer, optimizer_state
from tinygpt.training.step import evaluate

SAMPLE_TOKENS = 120
"""Length of the sample texts."""
FEWEST, MOST = 3, 100
"""Steps that are timed."""


class Trial:
    """A model's optimizer, its jitted step and evaluation, and its decoder.

    The optimizer may be given; if not, the config says which, and which weights learn, see
    ``lora.prepare``.
    """

    def __init__(
        self, model: Transformer, config: TrainConfig, optimizer: Optimizer | None = None
    ) -> None:
        self.model, self.config = model, config
        if optimizer is None:
            lora.prepare(model, config)
        self.optimizer = optimizer or make_optimizer(model.trainable(), config)
        self.jitted = make_jitted(model, self.optimizer, config)
        self.decoder = Decoder(model)

    def pace(self, tokens: Tokens, seconds: float) -> Pace:
        """Time steps for about so many ``seconds``, and two of everything else.

        What has to be compiled is compiled before. Weights and moments are those of before.
        """
        changed = [*self.optimizer.params, *optimizer_state(self.optimizer, {}).values()]
        before = [read(tensor) for tensor in changed]
        rows = self.config.batch_size
        try:
            return Pace(
                _seconds(lambda: self._step(tokens), seconds),
                _seconds(lambda: self._evaluate(tokens, rows)),
                _seconds(lambda: self._sample(tokens)),
            )
        finally:
            for tensor, values in zip(changed, before, strict=True):
                write(tensor, values)

    def _step(self, tokens: Tokens) -> None:
        A, B, T = self.config.grad_accum_steps, self.config.batch_size, self.model.config.block_size
        x, y = (a.reshape(A, B, T) for a in batches.batch(tokens, 0, 0, A * B, T))
        self.jitted.take_step(x, y, learning_rate(self.config, 0), (self.config.seed, 0))

    def _evaluate(self, tokens: Tokens, rows: int) -> None:
        evaluate(self.jitted.evaluate_batch, tokens, 1, rows, self.model.config.block_size)

    def _sample(self, tokens: Tokens) -> None:
        config = SampleConfig(temperature=0.8, top_k=min(200, self.model.config.vocab_size))
        for _ in generate_tokens(self.decoder, [[int(tokens[0])]], SAMPLE_TOKENS, config, seed=0):
            pass


def _seconds(action: Callable[[], None], most: float = 0.0) -> float:
    """The mean time of an action after two in which it is compiled, for ``most`` seconds or so."""
    action()
    action()
    began, times = time.perf_counter(), 0
    while times < (FEWEST if most else 1) or (times < MOST and time.perf_counter() - began < most):
        action()
        times += 1
    return (time.perf_counter() - began) / times
