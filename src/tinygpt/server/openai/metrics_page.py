"""GET /metrics: what the server has done, in the text format that Prometheus reads."""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.config import __version__
from tinygpt.server.engine.scheduler import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper bounds, in seconds, that answers are counted under."""
ROUTES = frozenset(
    {"/", "/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}
    | {"/metrics", "/healthz"}
)
"""Paths with a count of their own; clients may ask for others without end, and those share one."""

LONGEST_PATH = 200
"""Characters of a path that the access log tells."""

Labels = dict[str, str]
Sample = tuple[str, Labels, float]


@dataclass
class Histogram:
    """How often durations were at most so long."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def samples(self, labels: Labels) -> Iterator[Sample]:
        sums = list(itertools.accumulate(self.counts))
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], sums, strict=True):
            yield "_bucket", {**labels, "le": bound}, count
        yield "_sum", labels, self.total
        yield "_count", labels, sums[-1]


@dataclass
class Counts:
    """What is counted of requests; only the event loop touches it."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route and status."""
    durations: dict[str, Histogram] = field(default_factory=dict)
    first_bytes: dict[str, Histogram] = field(default_factory=dict)

    def add(self, path: str, status: int, first: float, whole: float) -> None:
        route = path if path in ROUTES else "other"
        self.requests[route, status] += 1
        self.first_bytes.setdefault(route, Histogram()).add(first)
        self.durations.setdefault(route, Histogram()).add(whole)


class Counting:
    """ASGI middleware around everything: each answer is counted with its status and its time.

    ``log`` gets a line for each of them.
    """

    def __init__(
        self, app: ASGIApp, counts: Counts, log: Callable[[str], None] | None = None
    ) -> None:
        self.app, self.counts, self.log = app, counts, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, first, status = time.monotonic(), None, 499  # nginx's: the client went first

        async def send_counted(message: Message) -> None:
            nonlocal first, status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif first is None:
                first = time.monotonic()
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        finally:
            end = time.monotonic()
            self.counts.add(scope["path"], status, (first or end) - start, end - start)
            if self.log is not None:
                self.log(access_line(scope, status, end - start))


def access_line(scope: Scope, status: int, seconds: float) -> str:
    """A line on one answer. Of the address only the path, in which nothing acts on a terminal."""
    client = (scope.get("client") or ("-",))[0]
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    path = scope["path"][:LONGEST_PATH].encode("unicode_escape").decode("ascii").replace(" ", "%20")
    return f"{now} {client} {scope['method']} {path} {status} {seconds:.3f} s"


def metrics_text(counts: Counts, stats: EngineStats, model: str) -> str:
    """The page."""
    requests = [
        ("_total", {"route": route, "status": str(status)}, float(count))
        for (route, status), count in sorted(counts.requests.items())
    ]
    lines = [
        *_family("info", "gauge", "What is served.", [("", _about(model), 1)]),
        *_family("http_requests", "counter", "Answers by route and status.", requests),
        *_histograms("first_byte_seconds", "Time to the first byte.", counts.first_bytes),
        *_histograms("request_seconds", "Time to the end of the answer.", counts.durations),
        *_engine(stats),
    ]
    return "\n".join(lines) + "\n"


def _about(model: str) -> Labels:
    return {"model": model, "version": __version__}


def _engine(stats: EngineStats) -> Iterator[str]:
    gauges = {
        "active": ("Texts that are being written.", stats.active),
        "waiting": ("Texts that wait for a place.", stats.waiting),
        "places": ("Texts that can be written at once.", stats.slots),
        "queue": ("Texts that may wait.", stats.queue),
        "uptime_seconds": ("Since the engine started.", stats.seconds),
    }
    counters = {
        "texts": ("Texts that were asked for.", stats.requests),
        "refused": ("Texts for which the queue was full.", stats.refused),
        "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
        "generated_tokens": ("Tokens written.", stats.tokens),
        "steps": ("Steps of all texts together.", stats.steps),
    }
    for name, (text, value) in gauges.items():
        yield from _family(name, "gauge", text, [("", {}, value)])
    for name, (text, value) in counters.items():
        yield from _family(name, "counter", text, [("_total", {}, value)])
    ended = [("_total", {"reason": str(why)}, float(n)) for why, n in sorted(stats.ended.items())]
    yield from _family("ended", "counter", "Texts that ended, and why.", ended)


def _histograms(name: str, text: str, by_route: dict[str, Histogram]) -> Iterator[str]:
    samples = [
        sample
        for route, histogram in sorted(by_route.items())
        for sample in histogram.samples({"route": route})
    ]
    yield from _family(name, "histogram", text, samples)


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    full = f"tinygpt_{name}" + ("_total" if kind == "counter" else "")
    yield f"# HELP {full} {text}"
    yield f"# TYPE {full} {kind}"
    for ending, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"tinygpt_{name}{ending}{f'{{{inside}}}' if inside else ''} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
