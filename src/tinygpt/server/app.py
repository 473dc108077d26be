"""The application that serves a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from starlette.applications import Starlette

from tinygpt.server.dashboard.board import Board
from tinygpt.server.dashboard.board import routes as board_routes
from tinygpt.server.engine.scheduler import EngineClosed, QueueFull
from tinygpt.server.http.assembly import assemble
from tinygpt.server.http.refusal import closing, queue_full
from tinygpt.server.http.security import AccessOptions
from tinygpt.server.openai import endpoints
from tinygpt.server.openai.metrics_page import Counting
from tinygpt.server.openai.service import Service
from tinygpt.server.playground import page_api


def make_app(
    service: Service,
    *,
    board: Board | None = None,
    log: Callable[[str], None] | None = None,
    **access: Unpack[AccessOptions],
) -> Starlette:
    """The API and the playground of one model, and the dashboard of its run, if it has a board.

    With an ``api_key`` everything but the pages themselves and /healthz needs it; the dashboard
    needs its board's. ``log`` gets a line for each answer. `AccessControl` has the other options.
    """
    routes = [*endpoints.routes(service), *page_api.routes(service, board is not None)]
    if board is not None:
        routes += board_routes(board, "/dashboard")
        access = {"board_key": board.key, "board_is_open": board.is_open, **access}
    app = assemble(routes, **access)
    app.add_exception_handler(EngineClosed, lambda *_: closing().response())
    app.add_exception_handler(QueueFull, lambda *_: queue_full().response())
    app.add_middleware(Counting, counts=service.counts, log=log)
    return app
