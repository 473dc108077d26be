"""Unknown fields of requests, which are accepted and ignored: the log names each of them once."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

logger = logging.getLogger(__name__)

HEADER = "x-tinygpt-ignored-fields"
PLAIN = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
"""Names that a log or a header may show; others could hold anything."""
MOST = 32
"""Names in one header."""
REMEMBERED = 1000


class Ignored:
    """The names that were logged so far; used by the event loop's thread only."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def header(self, paths: Iterable[str]) -> dict[str, str]:
        """The header for an answer; new names are logged, too."""
        names = sorted({path if PLAIN.fullmatch(path) else "(other)" for path in paths})[:MOST]
        new = [name for name in names if name not in self._named]
        if new and len(self._named) < REMEMBERED:
            self._named.update(new)
            listed = ", ".join(new)
            logger.warning("Requests have unknown fields, which are ignored: %s", listed)
        return {HEADER: ", ".join(names)} if names else {}
