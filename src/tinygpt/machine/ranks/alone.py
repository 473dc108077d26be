"""A process that trains by itself: the simplest case of `world.Ranks`, with the same methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tinygrad import Tensor

    from tinygpt.config import TrainConfig
    from tinygpt.machine.flat_buffer import FlatBuffer


class LostRankError(Exception):
    """Ranks were lost, those left have closed ranks, and the exchange has to be made again."""


class Alone:
    """A process that trains by itself: the methods are described for several."""

    rank, size, first = 0, 1, True
    """Number of this process, how many there are, and whether it is the one that writes."""

    def __init__(self) -> None:
        self.stop_asked = False
        """Set, by a signal for example, where this rank wants to stop."""
        self.save_asked = False
        """Set where this rank wants a checkpoint."""
        self.news: list[str] = []
        """What has become of the ranks, for the user."""
        self.lost: list[int] = []
        """Ranks that were lost since that was last written down."""
        self.over = False
        """Set when all ranks have taken their last step: no rank waits for another one's share."""

    @property
    def stopping(self) -> bool:
        """Whether all ranks stop after this step."""
        return self.stop_asked

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is written after this step because a rank has asked for one."""
        return self.save_asked

    def saved(self) -> None:
        """Note that it was."""
        self.save_asked = False

    @contextlib.contextmanager
    def together(self) -> Iterator[Self]:
        """A block in which an error of one rank ends all of them."""
        yield self

    def leave(self, code: int = 0) -> int:
        """Wait until every rank has come here, the first one last; -> the exit code of this one.

        Launchers end a job, and lose what it shows, as soon as one process ends with another code
        than 0. So only the first rank does: with its own, or else with another one's ``code``.
        """
        return code

    @property
    def active(self) -> int:
        """How many ranks have a share."""
        return 1

    def check(self, config: TrainConfig) -> None:
        """UsageError unless the ranks can share the micro-batches of a step."""

    def same(self, facts: Mapping[str, str]) -> None:
        """UsageError, on every rank, unless these facts are the same on all of them."""

    def copy_first(
        self, state: Callable[[], Mapping[str, Any]], tensors: Sequence[Tensor]
    ) -> Mapping[str, Any] | None:
        """Give all ranks the values that ``tensors`` have on the first; -> its ``state``.

        None on the first rank. Where the first has failed instead, the others end here.
        """
        return None

    def share(self, count: int) -> range:
        """Which of ``count`` micro-batches this rank computes."""
        return range(count)

    def sum(self, part: FlatBuffer, out: FlatBuffer, whole: bool = False) -> None:
        """Put the sum of all ranks' ``part`` into ``out``; ranks without a share give none.

        The last number of each array is used. If ``whole`` numbers are not rounded on the way.
        Both may be the same buffer, which then holds anything after LostRankError.
        """
        out.array[:] = part.array

    def sum_pieces(self, part: FlatBuffer, counts: list[int]) -> None:
        """Put the sum of all ranks' pieces into this rank's piece of ``part``, in place.

        ``counts`` are the sizes of the ranks' pieces, one after another.
        """

    def gather(self, values: npt.NDArray[np.float32], counts: list[int]) -> None:
        """Put every rank's piece of ``values`` into all ranks' ``values``."""

    def rows(
        self, own: npt.NDArray[np.float32], counts: list[int]
    ) -> list[npt.NDArray[np.float32]]:
        """What each rank has; ``counts`` are the lengths."""
        return [own]

    def give(self, values: npt.NDArray[Any]) -> None:
        """Send an array to the first rank, which must ``fetch`` it."""

    def fetch(self, rank: int, out: npt.NDArray[Any]) -> None:
        """Receive the next array that another rank gives."""

    def each(self, compute: Callable[[int], float], count: int) -> list[float]:
        """``[compute(0), compute(1), …]``, each number computed by one of the ranks."""
        return [compute(i) for i in range(count)]
