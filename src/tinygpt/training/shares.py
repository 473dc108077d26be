"""The optimizer's state divided among devices: stage 1 of ZeRO (Rajbhandari et al., 2020).

Every parameter has one device that keeps its moments. That device alone adds up the parameter's
gradients, takes the optimizer's step, and hands the new values out: as much traffic as where each
device adds up everything, and a fraction of the moments' memory and of the update's work.
Parameters are not cut, since Muon needs whole matrices: the shares are as equal as that allows.

The first device decides for all whether the step is taken, by the norm of all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tinygrad import Tensor
from tinygrad.nn.optim import Optimizer

from tinygpt import kernels
from tinygpt.errors import UsageError
from tinygpt.training.optim import AdamW
from tinygpt.training.replicas import Replicas, total


class Share(NamedTuple):
    """What one device updates."""

    device: str
    number: int
    """Of the device, from 0."""
    chosen: list[int]
    """The indices of the parameters among the optimizer's."""
    optimizer: AdamW


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Which of ``count`` devices has each parameter: the largest first, to the emptiest.

    >>> owners([5, 3, 3, 1], 2)
    [0, 1, 1, 0]
    """
    found, loads = [0] * len(sizes), [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = loads.index(min(loads))
        loads[found[i]] += sizes[i]
    return found


def place(optimizer: Optimizer, replicas: Replicas, sharded: bool) -> list[Share]:
    """Put the moments where they belong, of one device or several; -> the shares if ``sharded``.

    Raises UsageError for an optimizer whose moments cannot be divided.
    """
    if not isinstance(optimizer, AdamW):
        if sharded:
            raise UsageError(
                f"shard_optimizer divides the moments of AdamW and Muon, and this optimizer is "
                f"{type(optimizer).__name__}. Leave shard_optimizer out, or the optimizer."
            )
        return []
    n, count = len(optimizer.params), len(replicas) if sharded else 1
    sizes = [sum(int(t.numel()) for t in optimizer.moments(i)) for i in range(n)]
    owner = owners(sizes, count)
    for i in range(n):
        for moment in optimizer.moments(i):
            if moment.device != (device := replicas.devices[owner[i]]):
                moment.replace(moment.to(device).contiguous().realize())
    if not sharded:
        return []
    names = {id(p): name for name, p in replicas.models[0].parameters().items()}
    shares = list[Share]()
    for d, (device, replica) in enumerate(zip(replicas.devices, replicas.models, strict=True)):
        own, chosen = replica.parameters(), [i for i in range(n) if owner[i] == d]
        params = [own[names[id(optimizer.params[i])]] for i in chosen]
        if chosen:
            shares.append(Share(device, d, chosen, optimizer.share(chosen, params)))
    return shares


def owners_in(shares: Sequence[Share], count: int) -> list[int]:
    """The number of the device that updates each of ``count`` parameters: 0 without shares."""
    found = dict.fromkeys(range(count), 0)
    found |= {i: share.number for share in shares for i in share.chosen}
    return list(found.values())


def update_shares(
    optimizer: AdamW,
    shares: Sequence[Share],
    grads: Sequence[Sequence[Tensor]],
    clip: float,
    scale: float,
    loss: Tensor,
    limits: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Take a step; -> a report, and what to realize with it.

    The report is that of ``AdamW.update``, with the gradients in the order of the shares. ``grads``
    are for each parameter those of each device; ``loss`` () and ``limits`` (2,) lie on the first.
    """
    sums = [[total(grads[i], share.device) for i in share.chosen] for share in shares]
    squared = [x.to(str(loss.device)) for own in sums for x in kernels.squared_sums(own)]
    numbers, report = kernels.adamw_numbers(
        squared, optimizer.lr, optimizer.b1_t, optimizer.b2_t,
        beta1=optimizer.beta1, beta2=optimizer.beta2, clip=clip, scale=scale,
        loss=loss, limits=limits,
    )  # fmt: skip
    changed = [optimizer.b1_t, optimizer.b2_t]
    for share, own in zip(shares, sums, strict=True):
        decided, told = (x.to(share.device).contiguous() for x in (numbers, report))
        changed += share.optimizer.follow(own, decided, told, clip, scale)
    return report, changed
