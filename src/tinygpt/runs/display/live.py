"""Progress in place, for a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tinygpt.config import TrainConfig
from tinygpt.machine import resources
from tinygpt.runs.display.text import Curve, duration, printable, shares, sparkline
from tinygpt.training.metrics import perplexity, smooth

if TYPE_CHECKING:
    from tinygpt.training.loop import Step

SAMPLE_LINES = 8
"""Lines of sample text that the live view shows."""


class LiveDisplay:
    """A progress bar, the numbers, the loss so far and the newest sample text, drawn in place."""

    def __init__(
        self, config: TrainConfig, *, console: Console, start: int = 0, title: str = ""
    ) -> None:
        self.config, self.title, self.start = config, title, start
        self._step: Step | None = None
        self._numbers_of: Step | None = None
        self._skipped = 0
        self._first: tuple[float, int] | None = None
        self._val_loss: float | None = None
        self._bits: float | None = None
        self._best = "-"
        self._exact = ""
        self._sample: tuple[str, int] | None = None
        self._notice = ""
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

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, step: Step) -> None:
        """Remember the step; the view is drawn again four times a second, whatever the pace."""
        self._step = step
        self._first = self._first or (time.monotonic(), step.iter)
        if step.skipped:
            self._skipped += 1
        else:
            self._curve.add(step.train_loss)
        if not step.skipped or self._numbers_of is None:
            self._numbers_of = step
        if step.val_loss is not None:
            self._val_loss, self._bits = step.val_loss, step.val_bits_per_byte
            if step.best:
                self._best = f"{step.val_loss:.4f} at {step.iter:,}"
        if step.exact is not None:
            self._exact = f"{shares(step.exact)} at {step.iter:,}"
        if step.sample is not None:
            self._sample = step.sample, step.iter
        for message in step.notices:  # above the view, where they stay
            self._live.console.print(Text(printable(message), style="yellow"))

    def notice(self, message: str) -> None:
        """Show it below the rest when the view is drawn next."""
        self._notice = message

    def render(self) -> RenderableType:
        """The whole view as it stands now."""
        parts: list[RenderableType] = []
        if self.title:
            parts.append(Text(printable(self.title), style="bold"))
        parts.append(self._bar())
        if self._numbers_of is None:
            parts.append(Text("compiling the first step…", style="dim"))
        else:
            parts += [self._numbers(self._numbers_of), self._losses()]
        if self._exact:
            parts.append(_pair("exact answers", printable(self._exact)))
        if self._sample is not None:
            parts.append(self._sample_panel(*self._sample))
        if self._notice:
            parts.append(Text(self._notice, style="yellow"))
        return Group(*parts)

    def _bar(self) -> RenderableType:
        now, done = time.monotonic(), self._step.iter if self._step else self.start
        text = f"{duration(now - self._began)} elapsed"
        if self._first is not None and done > self._first[1]:  # compilation is not counted
            since, before = self._first
            left = (now - since) / (done - before) * (self.config.max_iters - done)
            text += f", {duration(left)} left"
        self._progress.update(self._task, completed=done, time=text)
        return self._progress.get_renderable()

    def _numbers(self, step: Step) -> RenderableType:
        table = Table.grid(padding=(0, 3))
        loss, bits = self._val_loss, self._bits
        if loss is None:
            loss, bits = step.train_loss, step.train_bits_per_byte
        table.add_row(
            _pair("train loss", f"{step.train_loss:.4f}"),
            _pair("val loss", "-" if self._val_loss is None else f"{self._val_loss:.4f}"),
            _pair("best", self._best),
            _pair("bits/byte", "-" if bits is None else f"{bits:.4f}"),
            _pair("perplexity", f"{perplexity(loss):,.2f}"),
        )
        table.add_row(
            _pair("lr", f"{step.lr:.2e}"),
            _pair("grad norm", f"{step.grad_norm:.3f}"),
            _pair("tokens/s", f"{step.tokens_per_second:,.0f}"),
            _pair("memory", f"{resources.memory() / 2**20:,.0f} MB"),
        )
        more = [_pair("skipped", f"{self._skipped:,}")] if self._skipped else []
        if (devices := self.config.n_devices) > 1:
            more.append(_pair("devices", str(devices)))
        if more:
            table.add_row(*more)
        return table

    def _losses(self) -> RenderableType:
        points = smooth(self._curve.points, 0.5)
        if len(points) < 2:
            return Text("")
        room = max(self._live.console.width - 24, 8)
        line = Text(f"{points[0]:7.3f} ", style="dim")
        line.append(sparkline(points, min(room, 100)), style="cyan")
        line.append(f" {points[-1]:.3f}", style="dim")
        return line

    def _sample_panel(self, sample: str, iter_num: int) -> RenderableType:
        text = Text(printable(sample).strip("\n"), tab_size=4)  # a Text knows no markup
        console = self._live.console
        lines = text.wrap(console, max(console.width - 4, 1))[:SAMPLE_LINES]
        shown = Text("\n").join(lines)
        return Panel(shown, title=f"sample at {iter_num:,}", title_align="left", border_style="dim")


def _pair(name: str, value: str) -> RenderableType:
    return Text.assemble((name + " ", "dim"), (value, "bold"))
