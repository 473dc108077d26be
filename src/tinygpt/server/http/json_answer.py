"""Answers in JSON, written as everywhere: a number that is not finite is null, not a 500."""

from __future__ import annotations

from typing import Any

from starlette import responses

from tinygpt.files.strict_json import to_json


class JSONResponse(responses.JSONResponse):
    """Starlette's, which fails on NaN and on half characters."""

    def render(self, content: Any) -> bytes:
        return to_json(content, unicode=True, compact=True).encode()
