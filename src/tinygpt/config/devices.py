"""Which devices share a training: what the setting ``devices`` means, before any is opened."""

from __future__ import annotations

import re

from tinygpt.errors import ConfigError
from tinygpt.untrusted import brief

MOST_DEVICES = 64
"""More devices than a host has: a larger number is taken for a slip."""
DEVICE = re.compile(r"[A-Za-z]+(:\d{1,4})?")


def device_names(devices: int | str | None, kind: str = "") -> tuple[str, ...]:
    """The devices of a number or a list, first one first; ``kind`` is that of a number.

    Raises ConfigError for anything that cannot be devices of one kind, each named once.

    >>> device_names(2, "CPU"), device_names("CL:0,CL:1"), device_names(None, "CUDA")
    (('CPU', 'CPU:1'), ('CL', 'CL:1'), ('CUDA',))
    """
    text = str(1 if devices is None else devices).strip()
    if text.lstrip("-").isdecimal():
        if not 1 <= (count := int(text)) <= MOST_DEVICES:
            raise ConfigError(
                f"devices={brief(devices)} is out of range: give a number from 1 to "
                f"{MOST_DEVICES}, or a list such as CUDA:0,CUDA:1."
            )
        return tuple(kind + f":{i}" * (i > 0) for i in range(count))
    names = [name.strip() for name in text.split(",")]
    if not all(map(DEVICE.fullmatch, names)):
        raise ConfigError(
            f"devices={brief(devices)} is neither a number nor a list of devices. Give a number, "
            f"such as 2, or a list, such as CUDA:0,CUDA:1."
        )
    found = [_canonical(name) for name in names]
    if len({name.split(":")[0] for name in found}) > 1:
        raise ConfigError(
            f"devices={brief(devices)} names devices of several kinds. Each takes an equal part of "
            f"the work, so they must be of one kind, such as CUDA:0,CUDA:1."
        )
    if len(set(found)) < len(found):
        raise ConfigError(f"devices={brief(devices)} names a device twice. Name each once.")
    if len(found) > MOST_DEVICES:
        raise ConfigError(f"devices={brief(devices)} are too many: the limit is {MOST_DEVICES}.")
    return tuple(found)


def _canonical(name: str) -> str:
    """A device as tinygrad writes it: ``cpu:0`` is CPU, ``CL:01`` is CL:1."""
    kind, _, number = name.upper().partition(":")
    return f"{kind}:{int(number)}" if number.strip("0") else kind
