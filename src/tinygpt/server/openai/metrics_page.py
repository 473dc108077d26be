"""GET /metrics: counts and durations in Prometheus's text format."""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinygpt.config import __version__
from tinygpt.server.engine.scheduler import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper bounds of the histograms' buckets, in seconds."""
ROUTES = frozenset(
    {"/", "/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}
    | {"/metrics", "/healthz"}
)
"""Paths with a count of their own; all others share one, as their number has no bound."""

LONGEST_PATH = 200
"""Characters of a path in the access log."""

Labels = dict[str, str]
Sample = tuple[str, Labels, float]


@dataclass
class Histogram:
    """Counts of durations by bucket."""

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
    """Counts of requests; used by the event loop's thread only."""

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
    """ASGI middleware: counts each answer with its status and times, and logs a line for it."""

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
    """A log line on one answer, with the path alone of the address; terminal controls escaped."""
    client = (scope.get("client") or ("-",))[0]
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    path = scope["path"][:LONGEST_PATH].encode("unicode_escape").decode("ascii").replace(" ", "%20")
    return f"{now} {client} {scope['method']} {path} {status} {seconds:.3f} s"


def metrics_text(counts: Counts, stats: EngineStats, model: str) -> str:
    """The page."""
    requests = [
        ("", {"route": route, "status": str(status)}, float(count))
        for (route, status), count in sorted(counts.requests.items())
    ]
    ended = [("", {"reason": str(why)}, float(n)) for why, n in sorted(stats.ended.items())]
    about = {"model": model, "version": __version__}
    families = [
        _family("info", "gauge", "What is served.", ("", about, 1)),
        _family("http_requests_total", "counter", "Answers by route and status.", *requests),
        _histograms("first_byte_seconds", "Time to the first byte.", counts.first_bytes),
        _histograms("request_seconds", "Time to the end of the answer.", counts.durations),
        _gauge("active", "Texts that are being written.", stats.active),
        _gauge("waiting", "Texts that wait for a place.", stats.waiting),
        _gauge("places", "Texts that can be written at once.", stats.slots),
        _gauge("queue", "Texts that may wait.", stats.queue),
        _gauge("uptime_seconds", "Since the engine started.", stats.seconds),
        _counter("texts", "Texts that were asked for.", stats.requests),
        _counter("refused", "Texts for which the queue was full.", stats.refused),
        _counter("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
        _counter("generated_tokens", "Tokens written.", stats.tokens),
        _counter("steps", "Steps of all texts together.", stats.steps),
        _family("ended_total", "counter", "Texts that ended, and why.", *ended),
    ]
    return "".join(f"{line}\n" for family in families for line in family)


def _gauge(name: str, text: str, value: float) -> Iterator[str]:
    return _family(name, "gauge", text, ("", {}, value))


def _counter(name: str, text: str, value: float) -> Iterator[str]:
    return _family(f"{name}_total", "counter", text, ("", {}, value))


def _histograms(name: str, text: str, by_route: dict[str, Histogram]) -> Iterator[str]:
    samples = [
        sample
        for route, histogram in sorted(by_route.items())
        for sample in histogram.samples({"route": route})
    ]
    return _family(name, "histogram", text, *samples)


def _family(name: str, kind: str, text: str, *samples: Sample) -> Iterator[str]:
    yield f"# HELP tinygpt_{name} {text}"
    yield f"# TYPE tinygpt_{name} {kind}"
    for ending, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"tinygpt_{name}{ending}{f'{{{inside}}}' if inside else ''} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
