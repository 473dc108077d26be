"""The one function that writes JSON here: RFC 8259, so that every reader can read it.

Python's ``json`` writes NaN and Infinity by default, which browsers, jq and other languages refuse,
and fails on lone surrogates when the text is encoded. Reading is in ``untrusted.parse_json``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinygpt.files.atomic import replacing


def to_json(
    value: Any,
    *,
    indent: int | None = None,
    compact: bool = False,
    sort: bool = False,
    unicode: bool = False,
    other: Callable[[Any], Any] | None = None,
) -> str:
    """``value`` as JSON that can always be encoded as UTF-8.

    Numbers that are not finite become null, numpy's numbers and arrays plain ones, paths texts.
    ``compact`` leaves out spaces, ``sort`` orders names, ``unicode`` writes characters beyond ASCII
    as they are, ``other`` makes something plain of values of any other type. Without it they raise
    TypeError.

    >>> to_json({"loss": [1.5, float("nan"), float("-inf")]}, compact=True)
    '{"loss":[1.5,null,null]}'
    >>> to_json("é \\ud800", unicode=True)
    '"é \\\\ud800"'
    """

    def write(what: Any) -> str:
        return json.dumps(
            what,
            allow_nan=False,
            default=lambda found: _plain(found, other),
            ensure_ascii=not unicode,
            indent=indent,
            separators=(",", ":") if compact else None,
            sort_keys=sort,
        )

    try:
        text = write(value)
    except ValueError:  # rare: only then is the whole value gone through
        text = write(finite(value))
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def write_json(path: Path, value: Any, **how: Any) -> None:
    """A JSON file and a line break, whole or not at all. ``how`` is for ``to_json``.

    Raises OSError.
    """
    text = to_json(value, **how) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def finite(value: Any) -> Any:
    """A copy of plain values in which None stands for every number that is not finite.

    >>> finite({"a": (1, float("inf"))})
    {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return finite(value.tolist()) if _is_numpy(value) else value


def _plain(value: Any, other: Callable[[Any], Any] | None) -> Any:
    """What ``json`` can write, of a value that it cannot."""
    if _is_numpy(value):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if other is None:
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return other(value)


def _is_numpy(value: Any) -> bool:
    """Whether it is a number or an array of numpy's, which is not imported for that."""
    return type(value).__module__ == "numpy"
