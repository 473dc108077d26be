"""The curves of training runs: as a PNG or SVG, and in the terminal."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.errors import DataError, UsageError, extras
from tinygpt.files.atomic import check_overwritable, replacing, user_path
from tinygpt.runs.display.text import duration
from tinygpt.runs.folder import METRICS
from tinygpt.runs.record import UNITS, Axis, Points, Record, Unit
from tinygpt.training.metrics import smooth
from tinygpt.untrusted import utf8_name
from tinygpt.untrusted.foreign import HEAD, no_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FORMATS = ("png", "svg")
PROGRAM = {"png": {"Software": "TinyGPT"}, "svg": {"Creator": "TinyGPT"}}
MARKS = {"png": b"Software\0TinyGPT", "svg": b"<dc:title>TinyGPT</dc:title>"}
"""What is written into a plot to know it again, and how that looks in the file."""
COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
TERMINAL_COLORS = ("blue+", "orange+", "green+", "magenta+", "cyan+", "red+")
INK, FAINT = "#1f2937", "#d1d5db"
DRAWS_BOXES = "Last Resort High-Efficiency"
"""A font of matplotlib's own that has a box for every character there is."""
MAX_POINTS = 2000
"""Points drawn per curve; longer runs are averaged down to so many."""
TITLES: dict[Axis, str] = {"step": "step", "tokens": "tokens", "time": "time of training"}
NUMBERS: dict[Axis, Callable[[float], str]] = {
    "step": "{:,.0f}".format,
    "tokens": lambda n: f"{n / 1e6:,g}M" if n >= 1e6 else f"{n:,.0f}",
    "time": duration,
}
"""How an axis is named, and its numbers written."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run: (place, value) pairs, the place in steps, tokens or seconds."""

    name: str
    train: Points
    val: Points
    lr: Points
    best: tuple[float, float] | None
    """Place and value of the lowest validation loss."""
    best_step: int | None

    @property
    def smooth_train(self) -> Points:
        """The training loss with most of the noise of single batches taken out."""
        weight = min(1 - 1 / max(len(self.train) / 60, 1), 0.97)
        values = [y for _, y in self.train]
        # A moving average lags behind; its mean with the one from the other end does not.
        pairs = zip(smooth(values, weight), reversed(smooth(reversed(values), weight)), strict=True)
        return [(x, (a + b) / 2) for (x, _), (a, b) in zip(self.train, pairs, strict=True)]


def read_curves(run: str | Path, x: Axis = "step", y: Unit = "loss") -> Curves:
    """The curves of a run folder, or of a file of rows, over an axis and with losses in a unit.

    Raises DataError if it holds no losses or is damaged, and UsageError if there is no such run, or
    if it does not say what the axis or the unit takes.
    """
    path = user_path(run)
    if not path.exists():
        raise UsageError(f"There is no run at {path}. Give the folder that training wrote.")
    file = path / METRICS if path.is_dir() else path
    record = Record.read(file)
    if not record.points("train_loss") and not record.points("val_loss"):
        with file.open("rb") if file.is_file() else nullcontext(BytesIO()) as start:
            known = no_text(file, start.read(HEAD))
        raise DataError(known or f"{file} holds no losses yet, so there is nothing to draw.")
    if y == "bits" and record.bytes_per_token is None:
        raise UsageError(f"{path} does not say how many bytes its tokens stand for. Draw --y loss.")
    if record.places(x) is None:
        lacking = "seconds its steps took" if x == "time" else "tokens its steps have"
        raise UsageError(f"{path} does not say how many {lacking}. Draw it over --x step.")
    train, val, lr = (record.points(key, x, y) for key in ("train_loss", "val_loss", "lr"))
    best, name = record.columns.best(), utf8_name(str(path))
    place = min(val, key=lambda point: point[1], default=None)
    return Curves(name, _thin(train), val, _thin(lr), place, best and best[0])


def _thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def save_plot(
    runs: Sequence[str | Path], out: str | Path, x: Axis = "step", y: Unit = "loss"
) -> Path:
    """Draw the runs over each other into ``out``, a PNG or SVG by its name; returns its path.

    Raises MissingExtraError without matplotlib, UsageError for another format and if ``out`` is a
    file that is no such plot.
    """
    out = user_path(out)
    suffix = out.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise UsageError(f"{out} does not end in .png or .svg; these are the formats there are.")
    check_overwritable(out, MARKS[suffix], "a plot")
    figure = draw([read_curves(run, x, y) for run in runs], x, y)
    with replacing(out) as file:
        figure.savefig(file, format=suffix, dpi=150, metadata=PROGRAM[suffix])
    return out


def draw(runs: Sequence[Curves], x: Axis = "step", y: Unit = "loss") -> Figure:
    """A figure: losses above, learning rate below, one colour per run."""
    figure_class = _matplotlib_figure()
    figure: Figure = figure_class(figsize=(9, 6), layout="constrained", facecolor="white")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    named: list[Line2D] = []
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        named += _draw_loss(loss, run, color, label=run.name if len(runs) > 1 else "")
        rate.plot(*_columns(run.lr), color=color, linewidth=1.4)
    for axes in (loss, rate):
        _style(axes)
    loss.set_ylabel(f"loss ({UNITS[y]})", color=INK)
    rate.set_ylabel("learning rate", color=INK)
    rate.set_xlabel(TITLES[x], color=INK)
    rate.xaxis.set_major_formatter(lambda place, _: NUMBERS[x](place))
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _write_names(loss, _title(runs), named)
    return figure


def _draw_loss(axes: Axes, run: Curves, color: str, label: str) -> list[Line2D]:
    """Draw the curves of a run; -> those that the legend names."""
    prefix = f"{label}: " if label else ""
    named = []
    if run.train:
        axes.plot(*_columns(run.train), color=color, alpha=0.2, linewidth=0.8)
        style: dict[str, Any] = {"color": color, "linewidth": 1.6}
        named += axes.plot(*_columns(run.smooth_train), label=f"{prefix}train", **style)
    if run.best:
        place, value = run.best
        color = color if label else COLORS[1]
        style = {"color": color, "linestyle": "--", "marker": "o", "markersize": 4}
        named += axes.plot(*_columns(run.val), label=f"{prefix}validation", **style)
        best = f"{prefix}best {value:.4f} at step {run.best_step:,}"
        named += axes.plot([place], [value], "*", ms=14, color=color, mec="white", label=best)
    return named


def _write_names(axes: Axes, title: str, named: list[Line2D]) -> None:
    """Title and legend, in which names of runs are text: no formulas, and none is left out.

    matplotlib leaves out a name that begins with ``_`` unless lines and names are given.
    """
    labels = [str(line.get_label()) for line in named]
    fonts = _fonts("".join([title, *labels]))
    legend = axes.legend(named, [_drawable(label, fonts) for label in labels], frameon=False)
    head = axes.set_title(_drawable(title, fonts), loc="left", fontsize=12)
    for text in (*legend.get_texts(), head):
        text.set(color=INK, fontfamily=list(fonts), parse_math=False)


Fonts = dict[str, Set[int]]
"""Names of fonts, and the characters that each of them has."""


def _fonts(text: str) -> Fonts:
    """matplotlib's font, and installed ones for the characters of ``text`` that it lacks."""
    from matplotlib import font_manager

    usual = font_manager.findfont(font_manager.FontProperties())
    fonts: Fonts = {}
    lacking = {ord(c) for c in text if c.isprintable()}
    for path in [usual, *(entry.fname for entry in font_manager.fontManager.ttflist)]:
        font = font_manager.get_font(path)
        has = font.get_charmap().keys()
        if not fonts or (lacking & has and font.family_name != DRAWS_BOXES):
            fonts.setdefault(font.family_name, has)
            lacking -= has
        if not lacking:
            break
    return fonts


def _drawable(text: str, fonts: Fonts) -> str:
    """The text, with the numbers of the characters that would be drawn as boxes."""
    known = set[int]().union(*fonts.values())
    return "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in text)


def _style(axes: Axes) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _title(runs: Sequence[Curves]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def terminal_plot(
    runs: Sequence[str | Path],
    width: int,
    height: int,
    color: bool = True,
    x: Axis = "step",
    y: Unit = "loss",
) -> str:
    """The loss curves as text of ``width`` by ``height`` characters.

    Raises MissingExtraError without plotext.
    """
    plotext = extras.need("plots", "Drawing in the terminal", "plotext")
    curves = [read_curves(run, x, y) for run in runs]
    figure = plotext.figure.clear().theme("colorless")
    figure.plot_size(width, height - len(curves))
    figure.label(TITLES[x], axis="x").label("loss" if y == "loss" else UNITS[y], axis="y")
    last = max(place for run in curves for place, _ in run.train or run.val)
    ticks = [round(last * i / 4) for i in range(5)]
    figure.ruler("x").ticks(ticks, [NUMBERS[x](tick) for tick in ticks])
    legend = []
    for run, pixel in zip(curves, itertools.cycle(TERMINAL_COLORS)):
        line, dots = (plotext.marker(symbol, pixel=pixel) for symbol in ("braille", "●"))
        if run.train:
            figure.draw(figure.signal(*_columns(run.smooth_train), marker=line).lines())
        if run.val:
            figure.draw(figure.signal(*_columns(run.val), marker=dots))
        legend.append(plotext.colorize(_describe(run), pixel).string(colorless=not color))
    return "\n".join([str(figure.build().string(colorless=not color)).rstrip("\n"), *legend])


def _describe(run: Curves) -> str:
    parts = [run.name]
    if run.train:
        parts.append(f"⠤ train {run.smooth_train[-1][1]:.4f}")
    if run.best:
        parts.append(f"● validation, best {run.best[1]:.4f} at step {run.best_step:,}")
    return "  ".join(parts)


def _matplotlib_figure() -> type[Figure]:
    """matplotlib reads MPLBACKEND as it is imported; a notebook sets one that only it has."""
    backend, task = os.environ.pop("MPLBACKEND", None), "Drawing PNG and SVG"
    try:
        figure: type[Figure] = extras.need("plots", task, "matplotlib.figure").Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return figure
