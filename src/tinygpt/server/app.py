"""The application that serves a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from starlette.applications import Starlette

from tinygpt.server import api, dashboard, playground
from tinygpt.server.assembly import assemble
from tinygpt.server.engine import EngineClosed, QueueFull
from tinygpt.server.metrics_page import Counting
from tinygpt.server.refusal import answer_closing, answer_full
from tinygpt.server.security import GateOptions
from tinygpt.server.service import Service


def make_app(
    service: Service,
    *,
    board: dashboard.Board | None = None,
    log: Callable[[str], None] | None = None,
    **gate: Unpack[GateOptions],
) -> Starlette:
    """The API and the playground of one model, and the dashboard of its run, if it has a board.

    With an ``api_key`` everything but the pages themselves and /healthz needs it; the dashboard
    needs its board's. ``log`` gets a line for each answer. For the other options see `Gate`.
    """
    routes = [*api.routes(service), *playground.routes(service)]
    if board is not None:
        routes += dashboard.routes(board)
        gate = {"board_key": board.key, "board_is_open": board.is_open, **gate}
    app = assemble(routes, **gate)
    app.add_exception_handler(EngineClosed, answer_closing)
    app.add_exception_handler(QueueFull, answer_full)
    app.add_middleware(Counting, counts=service.counts, log=log)
    return app
