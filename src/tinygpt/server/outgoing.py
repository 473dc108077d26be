"""JSON as it leaves the server: every reader can parse it, whatever it is made of."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any) -> str:
    """Strict JSON of plain values, on one line.

    NaN and infinity become null, for which JSON has no words, and half a character (a lone
    surrogate), which UTF-8 cannot hold, becomes U+FFFD: one odd value never costs the others.

    >>> to_json({"loss": float("nan"), "text": "\\ud800!"})
    '{"loss":null,"text":"\ufffd!"}'
    """
    try:
        text = _dump(value)
        text.encode()
    except ValueError:
        text = _dump(_sendable(value))
    return text


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _sendable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_sendable(key): _sendable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sendable(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value
