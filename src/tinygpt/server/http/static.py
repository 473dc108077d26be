"""The files of the pages, read once at the start: no request ever reaches the file system."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinygpt import pages

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}
"""What a page may be made of; other files in the folder are not served."""


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """The file, or 304 to a browser that has it already."""
        headers = {"etag": self.etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def read_page_files() -> dict[str, PageFile]:
    """The files that a page may ask for, by their names: ``shared/dom.js``."""
    found = {}
    for name, content in pages.served().items():
        ending = "." + name.rpartition(".")[2]
        if ending in MEDIA_TYPES:
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[name] = PageFile(content, MEDIA_TYPES[ending], etag)
    return found


def routes() -> list[Route]:
    """``/page/NAME`` for every file."""
    files = read_page_files()

    async def page_file(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404)
        return file.response(request)

    return [Route("/page/{name:path}", page_file, methods=["GET"])]
