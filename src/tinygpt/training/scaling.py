"""Loss scaling: gradients that would be too small for float16 are computed many times as large.

float16 has no numbers below 6e-8 in size, and many gradients are smaller. So the loss is multiplied
by a scale before the backward pass, and the gradients are divided by it in float32, before they are
summed, judged, clipped or used. Scales are powers of two, so that nothing is rounded by either.

A scale that is too large makes gradients infinite. The same step is then taken again with half the
scale: no batch is lost, and the schedule is that of float32. After so many steps without that the
scale is doubled. Micikevicius et al., "Mixed Precision Training" (2018).

bfloat16 has the exponents of float32 and needs none of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tinygpt.errors import CheckpointError
from tinygpt.training.step import Outcome
from tinygpt.untrusted import is_number

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
INTERVAL = 2000
"""Steps without an overflow before the scale is doubled."""


class LossScale:
    """The scale of the next step: 1 and constant for every type but float16.

    >>> scale = LossScale("float16")
    >>> scale.value
    65536.0
    """

    def __init__(self, dtype: str) -> None:
        self.dynamic = dtype == "float16"
        self.value = FIRST if self.dynamic else 1.0
        self.steps = 0
        """Steps since the scale changed."""

    def take(self, step: Callable[[float], Outcome]) -> tuple[Outcome, int]:
        """Take a step, which gets the scale; -> what it did, and how often it was taken again."""
        outcome, first, again = step(self.value), self.value, 0
        while self.dynamic and overflowed(outcome) and self.value > LEAST:
            self.value, self.steps, again = self.value / 2, 0, again + 1
            outcome = step(self.value)
        if overflowed(outcome):  # at any scale: something else is wrong
            self.value = first
        elif self.dynamic:
            self._see_success()
        return outcome, again

    def _see_success(self) -> None:
        self.steps += 1
        if self.steps >= INTERVAL:
            self.value, self.steps = min(2 * self.value, MOST), 0

    def state(self) -> dict[str, Any] | None:
        """What a resumed run must know, as JSON values; None where the scale is constant."""
        return {"value": self.value, "steps": self.steps} if self.dynamic else None

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what ``state()`` said; None, of a run in another type, changes nothing.

        Raises CheckpointError if the state is none of ours.
        """
        if state is None or not self.dynamic:
            return
        try:
            value, steps = state["value"], state["steps"]
            known = is_number(value, LEAST, MOST) and is_number(steps, 0, INTERVAL)
            whole = known and math.log2(value).is_integer() and type(steps) is int
        except (KeyError, TypeError) as error:
            raise CheckpointError(_DAMAGED) from error
        if not whole:
            raise CheckpointError(_DAMAGED)
        self.value, self.steps = float(value), steps


_DAMAGED = (
    "What the checkpoint says of the loss scale is damaged. Resume from another one, or with "
    "--dtype bfloat16 or float32, which need none."
)


def overflowed(outcome: Outcome) -> bool:
    """Whether gradients were too large for their type, though the loss was none."""
    return math.isfinite(outcome.loss) and not math.isfinite(outcome.norm)
