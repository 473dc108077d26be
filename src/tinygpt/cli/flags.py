"""How flags are spelt. Nothing slow is imported here, so that --help answers at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

Switch = Annotated[bool, Parameter(negative=(), show_default=False)]
"""A flag that is given or not."""


def _positive(_: object, value: int | None) -> None:
    """For cyclopts, which says of which flag this is."""
    if value is not None and value < 1:
        raise ValueError("It must be at least 1.")


Count = Annotated[int, Parameter(validator=_positive)]
"""A number of things, 1 or more."""
Flat = Parameter(name="*")
"""Makes flags of the fields of an argument, without the argument's name before them."""

PROOFS = ("--kernels", "--gradients", "--resume")
"""Flags of ``doctor`` that are commands with flags of their own."""
DOTTED = re.compile(r"^--(?:model|train)\.(?=[a-z])")


def undotted(words: Sequence[str]) -> list[str]:
    """Flags with the name of their table, such as --train.max-iters, without it: an older spelling.

    Words behind -- are no flags.
    """
    end = words.index("--") if "--" in words else len(words)
    return [DOTTED.sub("--", word) for word in words[:end]] + list(words[end:])


def proof_first(words: Sequence[str]) -> list[str]:
    """``doctor --json --kernels`` as ``doctor --kernels --json``: a command comes first."""
    proofs = [word for word in words if words[0] == "doctor" and word in PROOFS]
    return [*words[:1], *proofs, *(word for word in words[1:] if word not in proofs)]


def dash_as_prompt(words: Sequence[str]) -> list[str]:
    """``generate RUN -`` as ``generate RUN --prompt -``: - alone would be taken for a flag."""
    values = ("--prompt", "--stop", "--")  # what comes behind these is right as it is
    at = [i for i, w in enumerate(words) if w == "-" and words[i - 1] not in values]
    if words[:1] != ("generate",) or not at:
        return list(words)
    return [*words[: at[0]], "--prompt", *words[at[0] :]]
