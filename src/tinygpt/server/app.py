"""The application that serves a model."""

from __future__ import annotations

from collections.abc import Collection

from starlette.applications import Starlette

from tinygpt.server import api, dashboard, playground
from tinygpt.server.assembly import assemble
from tinygpt.server.metrics_page import Counting
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
