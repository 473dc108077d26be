"""The files of the pages, read once at the start: no request ever reaches the file system."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinygpt import pages

MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
"""Media types by file extension; files with other extensions are not served."""

Endpoint = Callable[[Request], Awaitable[Response]]


def page_files() -> dict[str, Endpoint]:
    """An endpoint for each file that a page may ask for, by its name: ``shared/dom.js``."""
    return {
        name: _file(content, MEDIA_TYPES[extension])
        for name, content in pages.served().items()
        if (extension := name.rpartition(".")[2]) in MEDIA_TYPES
    }


def _file(content: bytes, media_type: str) -> Endpoint:
    """Answers with the file, or with 304 where the browser has it already."""
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"etag": etag, "cache-control": "no-cache"}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return endpoint


def routes() -> list[Route]:
    """``/page/NAME`` for every file."""
    files = page_files()

    async def page_file(request: Request) -> Response:
        if endpoint := files.get(request.path_params["name"]):
            return await endpoint(request)
        raise HTTPException(404)

    return [Route("/page/{name:path}", page_file, methods=["GET"])]
