"""Which steps may change the weights: judged by the steps before, and counted.

A step whose loss or gradient norm is no finite number is skipped: the optimizer leaves everything
as it is (see ``optim.py``). With ``skip_spikes`` one that leaps above its predecessors is skipped
too, as OLMo does it (OLMo et al., "2 OLMo 2 Furious", 2024). The limits come from earlier steps
alone and go to the device along with the batch, so the device can decide for itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from tinygpt.config import TrainConfig
from tinygpt.errors import CheckpointError

WINDOW = 128
"""Steps that a spike is judged by; half as many must have been before any is."""
LEAST_DEVIATION = 0.01
"""Share of the mean that the deviation is taken to be at least, where steps hardly differ."""

Limits = tuple[float, float]
"""A step is taken if its loss and its gradient norm lie below these."""
NO_LIMITS: Limits = (math.inf, math.inf)


class Guard:
    """Makes the limits of the next step, and remembers what became of those before.

    >>> guard = Guard(TrainConfig(max_skipped=2))
    >>> guard.limits()
    (inf, inf)
    >>> guard.see(math.nan, 1.0, taken=False)
    >>> guard.skipped, guard.exhausted
    (1, False)
    """

    def __init__(self, config: TrainConfig) -> None:
        self.spikes, self.most = config.skip_spikes, config.max_skipped
        self.skipped = 0
        """Steps of the whole run that were skipped."""
        self.in_a_row = 0
        self._seen: deque[Limits] = deque(maxlen=WINDOW)

    def limits(self) -> Limits:
        """Infinity, or what makes a spike of the next step's loss and gradient norm."""
        if self.spikes is None or len(self._seen) < WINDOW // 2:
            return NO_LIMITS
        losses, norms = zip(*self._seen, strict=True)
        return self._limit(losses), self._limit(norms)

    def _limit(self, values: Sequence[float]) -> float:
        assert self.spikes is not None
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        return mean + self.spikes * max(math.sqrt(variance), LEAST_DEVIATION * abs(mean))

    def see(self, loss: float, norm: float, taken: bool) -> None:
        """Take note of a step.

        A spike counts no more than its limit among the steps that later ones are judged by: it
        does not open the door to others, yet a level that changes slowly is followed. What is no
        number does not count at all.
        """
        self.skipped += not taken
        self.in_a_row = 0 if taken else self.in_a_row + 1
        if self.spikes is not None and math.isfinite(loss) and math.isfinite(norm):
            most_loss, most_norm = self.limits()
            self._seen.append((min(loss, most_loss), min(norm, most_norm)))

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped to go on."""
        return self.in_a_row >= self.most

    def state(self) -> dict[str, Any]:
        """What a resumed run must know to judge as this one would have, as JSON values."""
        seen = [list(pair) for pair in self._seen]
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "seen": seen}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what ``state()`` said; None is a run of which nothing is known.

        A run that had given up gets its whole patience again. Raises CheckpointError if the state
        is none of ours.
        """
        if state is None:
            return
        try:
            skipped, in_a_row = int(state["skipped"]), int(state["in_a_row"])
            seen = [(float(loss), float(norm)) for loss, norm in state["seen"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                "What the checkpoint says of skipped steps is damaged. Resume from another one."
            ) from error
        self.skipped, self.in_a_row = skipped, in_a_row if in_a_row < self.most else 0
        self._seen.clear()
        self._seen.extend(seen)


def why_skipped(loss: float, norm: float, limits: Limits) -> str:
    """``loss nan`` or ``gradient norm 93.1, above 12.4``: what kept a step from being taken."""
    reasons = []
    for name, value, limit in zip(("loss", "gradient norm"), (loss, norm), limits, strict=True):
        if not -math.inf < value < limit:
            finite = math.isfinite(value)
            reasons.append(f"{name} {value:.4g}" + (f", above {limit:.4g}" if finite else ""))
    return " and ".join(reasons)
