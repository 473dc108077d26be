"""Progress as lines of text, for logs and pipes."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Self

from tinygpt.config import TrainConfig
from tinygpt.runs.display.forgiving import Forgiving
from tinygpt.runs.display.text import printable, shares
from tinygpt.training.metrics import perplexity

if TYPE_CHECKING:
    from tinygpt.training.loop import Step

PLAIN_LINES = 20
"""Progress lines that a run prints at least, besides its evaluations."""


class PlainDisplay:
    """One line for the first step, each evaluation, and some steps between; no control codes."""

    def __init__(self, config: TrainConfig, *, stream: IO[str]) -> None:
        self.config, self.stream = config, Forgiving.of(stream)
        self._every = max(1, config.max_iters // PLAIN_LINES)
        self._first, self._skipped = True, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, step: Step) -> None:
        """Print its notices, its line if it is due, and the sample text if there is one."""
        for message in step.notices:
            self.notice(printable(message))
        self._skipped += bool(step.skipped)
        last = step.iter == self.config.max_iters
        if self._first or last or step.val_loss is not None or step.iter % self._every == 0:
            line = plain_line(step, self.config.max_iters, self._skipped)
            print(line, file=self.stream, flush=True)
        self._first = False
        if step.sample is not None:
            for line in printable(step.sample).split("\n"):
                print(f"  | {line}".rstrip(), file=self.stream)
            self.stream.flush()

    def notice(self, message: str) -> None:
        """Print it at once, whatever kind of stream it is: a notebook's has no file behind it."""
        self.stream.write(f"{message}\n")
        self.stream.flush()


def plain_line(step: Step, max_iters: int, skipped: int = 0) -> str:
    """``step 250/2000  train loss 2.1034  …``: the same words in the same order each time."""
    parts = [f"step {step.iter}/{max_iters}", f"train loss {step.train_loss:.4f}"]
    if step.val_loss is not None:
        parts.append(f"val loss {step.val_loss:.4f}")
        if step.val_bits_per_byte is not None:
            parts.append(f"bits per byte {step.val_bits_per_byte:.4f}")
        parts.append(f"perplexity {perplexity(step.val_loss):.2f}")
    if step.exact is not None:
        parts.append(f"exact answers {shares(step.exact)}")
    parts += [
        f"lr {step.lr:.2e}",
        f"grad norm {step.grad_norm:.3f}",
        f"{step.tokens_per_second:.0f} tokens/s",
        f"{step.elapsed:.1f} s",
    ]
    if skipped:
        parts.append(f"skipped {skipped}")
    return "  ".join(parts + ["best"] * step.best)
