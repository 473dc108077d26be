"""Makes an application of routes, with access control before them and errors in one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from tinygpt.server.http import static
from tinygpt.server.http.refusal import Refusal, answer_http_error, answer_refusal
from tinygpt.server.http.security import AccessControl, AccessOptions


def assemble(routes: Sequence[BaseRoute], **access: Unpack[AccessOptions]) -> Starlette:
    """An application with these routes and the pages' files, behind access control."""
    app = Starlette(
        routes=[*routes, *static.routes()],
        middleware=[Middleware(AccessControl, **access)],
        exception_handlers={Refusal: answer_refusal, HTTPException: answer_http_error},
    )
    app.router.redirect_slashes = False  # it would build an address from the Host header
    return app
