"""The dashboard over HTTP: curves, samples and events of the runs in some folders.

Everything is read from the files of the runs when a page asks: without a page nothing happens, and
a training never waits. Samples may quote private texts, so reading needs the board's key, as asking
a training to save or to stop does; `AccessControl` checks it.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinygpt.errors import UsageError
from tinygpt.files.strict_json import to_json
from tinygpt.server.dashboard.curves import POINTS
from tinygpt.server.dashboard.steering import ByLock, Steering
from tinygpt.server.dashboard.watch import Cursor, Watch, parse_cursor, write_cursor
from tinygpt.server.dashboard.watched import Run
from tinygpt.server.http.answers import EventStream, JSONResponse
from tinygpt.server.http.assembly import assemble
from tinygpt.server.http.refusal import Refusal
from tinygpt.server.http.security import AccessOptions
from tinygpt.server.http.static import page_files

TICK = 0.5
"""Seconds between two events: changes within this time come together."""
HEARTBEAT = 10.0
"""Seconds after which a stream without news sends a comment, to show that it is alive."""
STREAMS = 32
"""Streams of events at once."""
SAMPLES_BYTES = 1 << 20
"""Characters of sample texts in one answer, about the most."""


class Board:
    """What the routes need: the runs, how to steer them, and the key."""

    def __init__(
        self,
        watch: Watch,
        key: str | None = None,
        steering: Mapping[Path, Steering] | None = None,
        playground: bool = False,
        is_open: bool = False,
    ) -> None:
        """With ``is_open`` the key is only for saving and stopping."""
        self.watch, self.playground, self.is_open = watch, playground, is_open
        self.key = key or secrets.token_urlsafe(16)
        self.streams = 0
        self._steering = {folder.absolute(): s for folder, s in (steering or {}).items()}

    def steering(self, run: Run) -> Steering:
        """How to ask the run; one object for each, which remembers what was asked."""
        return self._steering.setdefault(run.folder.absolute(), ByLock(run.folder))

    def find(self, request: Request) -> Run:
        """The run that an address names; 404 for any other name."""
        run = self.watch.runs.get(request.path_params["run"])
        if run is None:
            raise HTTPException(404)
        return run


def make_app(board: Board, **access: Unpack[AccessOptions]) -> Starlette:
    """The dashboard alone, behind `AccessControl` with the board's key."""
    access = {"board_key": board.key, "board_is_open": board.is_open, **access}
    return assemble(routes(board, "/", "/dashboard"), **access)


def routes(board: Board, *pages: str) -> list[Route]:
    """The page, at these paths, and what it asks for, below /dashboard."""
    page = page_files()["dashboard/dashboard.html"]

    def get(path: str, read: Callable[[Board, Request], Any]) -> Route:
        async def endpoint(request: Request) -> Response:
            await run_in_threadpool(board.watch.refresh)
            return await run_in_threadpool(lambda: JSONResponse(read(board, request)))

        return Route(f"/dashboard/{path}", endpoint, methods=["GET"])

    def post(what: str) -> Route:
        path = f"/dashboard/runs/{{run}}/{what}"
        return Route(path, partial(_ask, board, what), methods=["POST"])

    return [
        *(Route(path, page, methods=["GET"]) for path in pages),
        get("runs", _runs),
        get("runs/{run}/curves", _curves),
        get("runs/{run}/samples", _samples),
        Route("/dashboard/events", partial(_stream, board), methods=["GET"]),
        post("save"),
        post("stop"),
    ]


def _runs(board: Board, request: Request) -> dict[str, Any]:
    with board.watch.lock:
        settings = {run.id: {"settings": run.settings} for run in board.watch.listed()}
        cards = [card | settings[card["id"]] for card in board.watch.cards()]
    return {"runs": cards, "playground": board.playground}


def _curves(board: Board, request: Request) -> dict[str, Any]:
    low, high = _number(request, "from", -math.inf), _number(request, "to", math.inf)
    points = int(_number(request, "points", POINTS))
    with board.watch.lock:
        found = board.find(request).curves.frozen()
    return found.overview(points, low, high)


def _samples(board: Board, request: Request) -> dict[str, Any]:
    with board.watch.lock:
        found = board.find(request).samples[:]
    return {"samples": within(found, SAMPLES_BYTES)}


async def _stream(board: Board, request: Request) -> Response:
    if board.streams >= STREAMS:
        raise Refusal(503, "Too many pages listen already.", code="too_many_streams")
    given = request.headers.get("last-event-id") or request.query_params.get("since", "")
    return EventStream(_events(board, parse_cursor(given)))


async def _ask(board: Board, what: str, request: Request) -> Response:
    """Ask a training to save or to stop."""
    run = board.find(request)
    try:
        await run_in_threadpool(getattr(board.steering(run), what))
    except UsageError as error:
        raise Refusal(409, str(error), code="cannot_be_asked") from error
    return JSONResponse({"asked": what}, 202)


async def _events(board: Board, cursor: dict[str, tuple[int, str]]) -> AsyncIterator[str]:
    """Changed cards and new rows, at most one event a tick.

    An event's id is the cursor of a page that has read it; a page that reconnects with it gets what
    it has missed.
    """
    board.streams += 1
    sent: dict[str, str] = {}
    spoke = 0.0
    try:
        while True:
            entries = await run_in_threadpool(_look, board.watch, cursor)
            changed = [entry for entry in entries if sent.get(entry["id"]) != _dump(entry)]
            known = {entry["id"] for entry in entries}
            if changed or sent.keys() != known:
                sent = {entry["id"]: _dump(_card(entry)) for entry in entries}
                cursor = _advanced(cursor, entries)
                order = [entry["id"] for entry in entries]
                data = _dump({"runs": changed, "order": order})
                yield f"id: {write_cursor(cursor)}\ndata: {data}\n\n"
                spoke = time.monotonic()
            elif time.monotonic() - spoke > HEARTBEAT:
                yield ": alive\n\n"
                spoke = time.monotonic()
            await asyncio.sleep(TICK)
    finally:
        board.streams -= 1


def _look(watch: Watch, cursor: Cursor) -> list[dict[str, Any]]:
    watch.refresh()
    return watch.changes(cursor)


def _card(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry without its rows, which are sent once."""
    once = ("from", "new", "reload", "rows", "mark")
    return {key: value for key, value in entry.items() if key not in once}


def _advanced(cursor: Cursor, entries: list[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """The cursor of a page that has read the entries."""
    now = {e["id"]: (e["rows"], e["mark"]) for e in entries if "rows" in e}
    return {run: now.get(run, before) for run, before in cursor.items()}


def _dump(value: Any) -> str:
    return to_json(value, compact=True)


def within(samples: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """As many of the samples as an answer may hold, spread over the run, the newest among them."""
    while sum(len(sample["text"]) + 32 for sample in samples) > limit and len(samples) > 1:
        samples = samples[-1::-2][::-1]
    return samples


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    try:
        value = default if text is None else float(text[:40])
    except ValueError:
        value = math.nan
    if math.isnan(value) or (text is not None and math.isinf(value)):
        raise Refusal(400, f"{name} must be a number.", param=name)
    return value
