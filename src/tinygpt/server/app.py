"""The application: routes, the gate before them, and errors in one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from tinygpt.server import api, dashboard, playground, static
from tinygpt.server.engine import EngineClosed, QueueFull
from tinygpt.server.metrics_page import Counting
from tinygpt.server.refusal import (
    Refusal,
    answer_closing,
    answer_full,
    answer_http_error,
    answer_refusal,
)
from tinygpt.server.security import Gate, GateOptions
from tinygpt.server.service import Service


def make_app(
    service: Service, *, board: dashboard.Board | None = None, **gate: Unpack[GateOptions]
) -> Starlette:
    """The API and the playground of one model, and the dashboard of its run, if it has a board.

    With an ``api_key`` everything but the pages themselves and /healthz needs it; the dashboard
    needs its board's. For the other options see `Gate`.
    """
    routes = [*api.routes(service), *playground.routes(service)]
    if board is not None:
        routes += dashboard.routes(board)
        gate = {"board_key": board.key, "board_is_open": board.is_open, **gate}
    app = assemble(routes, **gate)
    app.add_middleware(Counting, counts=service.counts)
    return app


def assemble(routes: Sequence[BaseRoute], **gate: Unpack[GateOptions]) -> Starlette:
    """Any routes, with the files of the pages, behind the gate."""
    app = Starlette(
        routes=[*routes, *static.routes()],
        middleware=[Middleware(Gate, **gate)],
        exception_handlers={
            Refusal: answer_refusal,
            EngineClosed: answer_closing,
            QueueFull: answer_full,
            HTTPException: answer_http_error,
        },
    )
    app.router.redirect_slashes = False  # it would build an address from the Host header
    return app
