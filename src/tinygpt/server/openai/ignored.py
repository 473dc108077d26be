"""Fields of requests that are accepted and change nothing: each is named once in the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

logger = logging.getLogger(__name__)

HEADER = "x-tinygpt-ignored-fields"
PLAIN = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
"""Names that are repeated: what else was sent has no place in a log or a header."""
MOST = 32
"""Names in one header."""
REMEMBERED = 1000


class Ignored:
    """What has been named so far; only the event loop touches it."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def header(self, paths: Iterable[str]) -> dict[str, str]:
        """The header for an answer; what is new among the names is logged, too."""
        names = sorted({path if PLAIN.fullmatch(path) else "(other)" for path in paths})[:MOST]
        new = [name for name in names if name not in self._named]
        if new and len(self._named) < REMEMBERED:
            self._named.update(new)
            told = ", ".join(new)
            logger.warning(
                "Requests have fields that nobody here knows and that do nothing: %s", told
            )
        return {HEADER: ", ".join(names)} if names else {}
