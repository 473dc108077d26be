"""Checks that a finished page starts, before the file gets its name.

What a browser parses is parsed again, strictly; where node is at hand the worker of the page is
started with the module and the weights that stand in the file, and has to write a token.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

from tinygpt import pages
from tinygpt.errors import InteropError

LOAD = pages.FOLDER / "local" / "load.mjs"


def check_finished(path: Path, module: bytes, chunks: int, node: bool = True) -> None:
    """Raise InteropError for a page that would not start in a browser."""
    content = path.read_bytes()
    try:
        about = _parsed(_element(content, b'type="application/json" id="about"'))
        _inflated(_element(content, b'type="text/plain" id="worker"'), "worker")
        if _inflated(_element(content, b'type="text/plain" id="module"'), "module") != module:
            raise ValueError("its module is not the one that was put in")
        found = content.count(b'<script type="text/plain" class="weights"')
        if not found == about["chunks"] == chunks:
            raise ValueError(f"it has {found} chunks of weights instead of {chunks}")
    except (ValueError, KeyError, TypeError) as error:
        raise InteropError(f"The page would not start: {error}. Nothing was written.") from error
    if node and shutil.which("node"):
        done = subprocess.run(["node", str(LOAD), str(path)], capture_output=True, check=False)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = next((line for line in lines if "Error" in line), "".join(lines[-1:]))
            raise InteropError(f"The page does not start in node: {reason}. Nothing was written.")


def _element(content: bytes, opening: bytes) -> bytes:
    """The text of the first script that opens so."""
    found = re.search(rb"<script " + re.escape(opening) + rb">(.*?)</script>", content, re.DOTALL)
    if found is None:
        raise ValueError(f"it has no <script {opening.decode()}>")
    return found[1]


def _inflated(text: bytes, name: str) -> bytes:
    try:
        return zlib.decompress(base64.b64decode(text))
    except zlib.error as error:
        raise ValueError(f"its {name} cannot be read ({error})") from error


def _parsed(text: bytes) -> Any:
    """JSON as browsers take it, without Python's NaN and Infinity."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is not JSON")
