"""Training as it happens: a live view in a terminal, plain lines anywhere else.

Both consume the steps of a run and change nothing about it. Whatever a model writes is shown as
plain text: it cannot move the cursor, colour the screen or hide behind direction marks.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, Self

from tinygpt import runtime
from tinygpt.config import TrainConfig
from tinygpt.metrics import perplexity, smooth

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from tinygpt.train import Step

BARS = "▁▂▃▄▅▆▇█"
SAMPLE_LINES = 8
"""Lines of sample text that the live view shows."""
PLAIN_LINES = 20
"""Progress lines that a run without a terminal prints at least, besides its evaluations."""
DIRECTION_MARKS = frozenset(
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


class Display(Protocol):
    """Shows the steps of a run; a context manager, so that the terminal is always put back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, step: Step) -> None:
        """Take notice of one optimizer step."""


def make_display(
    config: TrainConfig, *, start: int = 0, title: str = "", stream: IO[str] | None = None
) -> Display:
    """The display that suits ``stream``, by default stderr: live in a terminal, else lines.

    ``start`` is the number of steps done before, in a run that is resumed.
    """
    from rich.console import Console

    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(config, start=start, title=title, console=console)
    return PlainDisplay(config, stream=stream)


def printable(text: str) -> str:
    """``text`` with everything made visible that a terminal would obey instead of print.

    Line ends and tabs stay; other control characters become their pictures, and marks that change
    the direction of text, lone surrogates and odd line separators become U+FFFD.

    >>> printable("red: \\x1b[31m")
    'red: ␛[31m'
    """
    return "".join(map(_printable_character, text))


def _printable_character(c: str) -> str:
    if c in "\n\t":
        return c
    if c < " ":
        return chr(0x2400 + ord(c))  # Unicode's control pictures
    if c == "\x7f":
        return "\u2421"
    odd = c in DIRECTION_MARKS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
    return "\ufffd" if odd else c


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A one-line curve of ``values``, each column the mean of its share of them.

    >>> sparkline([4.0, 3.0, 2.0, 1.0], width=4)
    '█▆▃▁'
    """
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    if not numbers or width < 1:
        return ""
    columns = min(width, len(numbers))
    edges = [i * len(numbers) // columns for i in range(columns + 1)]
    means = [sum(numbers[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


class Curve:
    """The training loss of a run of any length in at most ``2 * size`` numbers.

    When it is full, neighbours are averaged and from then on each number stands for twice as many
    steps.
    """

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self.points: list[float] = []
        self._stride = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Take in the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) == self._stride:
            self.points.append(sum(self._pending) / self._stride)
            self._pending.clear()
        if len(self.points) == 2 * self.size:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2


class PlainDisplay:
    """One line for the first step, each evaluation, and some steps between; no control codes."""

    def __init__(self, config: TrainConfig, *, stream: IO[str]) -> None:
        self.config, self.stream = config, stream
        self._every = max(1, config.max_iters // PLAIN_LINES)
        self._first = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def update(self, step: Step) -> None:
        """Print the step's line if it is due, and the sample text if there is one."""
        last = step.iter == self.config.max_iters
        if self._first or last or step.val_loss is not None or step.iter % self._every == 0:
            print(plain_line(step, self.config.max_iters), file=self.stream, flush=True)
        self._first = False
        if step.sample is not None:
            for line in printable(step.sample).split("\n"):
                print(f"  | {line}".rstrip(), file=self.stream)
            self.stream.flush()


def plain_line(step: Step, max_iters: int) -> str:
    """``step 250/2000  train loss 2.1034  …``: the same words in the same order each time."""
    parts = [f"step {step.iter}/{max_iters}", f"train loss {step.train_loss:.4f}"]
    if step.val_loss is not None:
        parts += [f"val loss {step.val_loss:.4f}", f"perplexity {perplexity(step.val_loss):.2f}"]
    parts += [
        f"lr {step.lr:.2e}",
        f"grad norm {step.grad_norm:.3f}",
        f"{step.tokens_per_second:.0f} tokens/s",
        f"{step.elapsed:.1f} s",
    ]
    return "  ".join(parts + ["best"] * step.best)


class LiveDisplay:
    """A progress bar, the numbers, the loss so far and the newest sample text, drawn in place."""

    def __init__(
        self, config: TrainConfig, *, console: Console, start: int = 0, title: str = ""
    ) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        self.config, self.title, self.start = config, title, start
        self._step: Step | None = None
        self._val_loss: float | None = None
        self._best = "-"
        self._sample: tuple[str, int] | None = None
        self._curve = Curve()
        self._began = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[time]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=config.max_iters, completed=start, time="")
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self.render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, step: Step) -> None:
        """Remember the step; the view is drawn again four times a second, whatever the pace."""
        self._step = step
        self._curve.add(step.train_loss)
        if step.val_loss is not None:
            self._val_loss = step.val_loss
            if step.best:
                self._best = f"{step.val_loss:.4f} at {step.iter:,}"
        if step.sample is not None:
            self._sample = step.sample, step.iter

    def render(self) -> RenderableType:
        """The whole view as it stands now."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [Text(printable(self.title), style="bold")]
        parts += [self._bar()]
        if self._step is None:
            parts += [Text("compiling the first step…", style="dim")]
            return Group(*parts)
        parts += [self._numbers(self._step), self._losses()]
        if self._sample is not None:
            parts += [self._sample_panel(*self._sample)]
        return Group(*parts)

    def _bar(self) -> RenderableType:
        done = self._step.iter if self._step else self.start
        spent = time.monotonic() - self._began
        text = f"{duration(spent)} elapsed"
        if done > self.start:
            left = spent / (done - self.start) * (self.config.max_iters - done)
            text += f", {duration(left)} left"
        self._progress.update(self._task, completed=done, time=text)
        return self._progress.get_renderable()

    def _numbers(self, step: Step) -> RenderableType:
        from rich.table import Table

        table = Table.grid(padding=(0, 3))
        loss = step.train_loss if self._val_loss is None else self._val_loss
        table.add_row(
            _pair("train loss", f"{step.train_loss:.4f}"),
            _pair("val loss", "-" if self._val_loss is None else f"{self._val_loss:.4f}"),
            _pair("best", self._best),
            _pair("perplexity", f"{perplexity(loss):,.2f}"),
        )
        table.add_row(
            _pair("lr", f"{step.lr:.2e}"),
            _pair("grad norm", f"{step.grad_norm:.3f}"),
            _pair("tokens/s", f"{step.tokens_per_second:,.0f}"),
            _pair("memory", f"{runtime.memory() / 2**20:,.0f} MB"),
        )
        return table

    def _losses(self) -> RenderableType:
        from rich.text import Text

        points = smooth(self._curve.points, 0.5)
        if len(points) < 2:
            return Text("")
        room = max(self._live.console.width - 24, 8)
        line = Text(f"{points[0]:7.3f} ", style="dim")
        line.append(sparkline(points, min(room, 100)), style="cyan")
        line.append(f" {points[-1]:.3f}", style="dim")
        return line

    def _sample_panel(self, sample: str, iter_num: int) -> RenderableType:
        from rich.panel import Panel
        from rich.text import Text

        text = Text(printable(sample).strip("\n"), tab_size=4)  # a Text knows no markup
        console = self._live.console
        lines = text.wrap(console, max(console.width - 4, 1))[:SAMPLE_LINES]
        shown = Text("\n").join(lines)
        return Panel(shown, title=f"sample at {iter_num:,}", title_align="left", border_style="dim")


def _pair(name: str, value: str) -> RenderableType:
    from rich.text import Text

    return Text.assemble((name + " ", "dim"), (value, "bold"))


def duration(seconds: float) -> str:
    """``59s``, ``3m 20s``, ``2h 05m``, ``3d 4h``.

    >>> duration(200), duration(7500)
    ('3m 20s', '2h 05m')
    """
    total = max(int(seconds), 0)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {total % 60:02d}s" if minutes else f"{total}s"
