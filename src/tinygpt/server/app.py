"""The application: routes, the gate before them, and errors in one shape."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from tinygpt.server import api, dashboard, playground, static
from tinygpt.server.metrics_page import Counting
from tinygpt.server.refusal import Refusal, answer_http_error, answer_refusal
from tinygpt.server.security import Gate
from tinygpt.server.service import Service


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    hosts: Collection[str] = (),
    board: dashboard.Board | None = None,
) -> Starlette:
    """The API and the playground of one model, and the dashboard of its run, if it has a board.

    ``hosts`` are names, besides localhost, by which the server is called; with an ``api_key``
    everything but the page and /healthz needs it.
    """
    routes = [*api.routes(service), *playground.routes(service)]
    if board is not None:
        routes += dashboard.routes(board)
    app = assemble(routes, api_key=api_key, hosts=hosts)
    app.add_middleware(Counting, counts=service.counts)
    return app


def assemble(
    routes: Sequence[BaseRoute], *, api_key: str | None = None, hosts: Collection[str] = ()
) -> Starlette:
    """Any routes, with the files of the pages, behind the gate."""
    app = Starlette(
        routes=[*routes, *static.routes()],
        middleware=[Middleware(Gate, api_key=api_key, hosts=hosts)],
        exception_handlers={
            Refusal: answer_refusal,
            HTTPException: answer_http_error,
        },
    )
    app.router.redirect_slashes = False  # it would build an address from the Host header
    return app
