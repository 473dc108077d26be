"""Data parallel training: every device has the weights, and takes its part of each micro-batch.

The model's own weights lie on the first device. ``Replicas`` has copies of them on the others. A
micro-batch is cut by sequences with ``Tensor.shard``, each device runs the model's kernels on its
part, forward and backward, and what has to be added up is sent to where it is needed. All of that
is inside of the jitted step, so that tinygrad's scheduler sees every device's work at once.

With equal parts, the mean over the batch is the mean of the means over the parts. So losses and
gradients are added up here, and divided by ``len(devices)`` where the optimizer scales them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tinygrad import Device, Tensor, dtypes

from tinygpt.config import TrainConfig
from tinygpt.machine.several import open_devices
from tinygpt.machine.transfer import read, write
from tinygpt.model.transformer import LAYERS, Transformer


class Replicas:
    """A model on the first of some devices, and its copies on the others."""

    def __init__(self, model: Transformer, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self.models = [model, *(copied(model, device) for device in self.devices[1:])]

    def __len__(self) -> int:
        return len(self.devices)

    def cut(self, x: Tensor) -> list[Tensor]:
        """The parts of x (B, ...), equally many rows for each device, where they belong."""
        if len(self) == 1:
            return [x]
        rows = x.shard(self.devices, axis=0).uop.src[0]
        return [Tensor(rows.mselect(i)).contiguous() for i in range(len(self))]

    def everywhere(self, x: Tensor) -> list[Tensor]:
        """x, and a copy of it for each further device."""
        return [x, *(x.to(device).contiguous() for device in self.devices[1:])]

    def keys(self, key: Tensor, rows: int) -> list[Tensor]:
        """Dropout's key (2,) for each device's part of ``rows`` sequences.

        The masks of the parts are together that of the whole, on however many devices.
        """
        if len(self) == 1:
            return [key]
        begins = (i * (rows // len(self)) for i in range(len(self)))
        return [
            own.cat(Tensor([begin], dtype=dtypes.uint32, device=own.device)).contiguous()
            for own, begin in zip(self.everywhere(key), begins, strict=True)
        ]

    def spread(self, names: Sequence[str], owners: Sequence[int]) -> list[Tensor]:
        """Give each parameter's new values to all devices but its owner; -> what to realize."""
        models = [replica.parameters() for replica in self.models]
        return [
            there[name].assign(models[owner][name].detach().to(device))
            for i, (there, device) in enumerate(zip(models, self.devices, strict=True))
            for name, owner in zip(names, owners, strict=True)
            if i != owner
        ]

    def refresh(self) -> None:
        """The same for all weights, at once: they may have been changed by others."""
        own = self.models[0].parameters()
        for replica in self.models[1:]:
            for name, p in replica.parameters().items():
                write(p, read(own[name]))

    def wait(self) -> None:
        """Wait for the devices behind the first: they may still read what was handed in."""
        for device in self.devices[1:]:
            Device[device].synchronize()


def replicas_for(model: Transformer, config: TrainConfig) -> Replicas:
    """A model on the devices of a config, which are opened. Raises DeviceError."""
    return Replicas(model, open_devices(config.devices))


def total(parts: Sequence[Tensor], device: str) -> Tensor:
    """The sum of Tensors of one shape that lie on several devices, on ``device``, in order."""
    here = [x if x.device == device else x.to(device) for x in parts]
    return sum(here[1:], start=here[0])


def copied(model: Transformer, device: str) -> Transformer:
    """A model with the same weights on another device: Tensors of its own, the rest shared."""
    replica = object.__new__(type(model))
    for name, value in vars(model).items():
        setattr(replica, name, _copied(value, device))
    return replica


def _copied(value: Any, device: str) -> Any:
    """A layer, a list of layers or a Tensor, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(device).contiguous().realize().is_param_(value.is_param)
    if isinstance(value, list):
        return [_copied(item, device) for item in value]
    if isinstance(value, LAYERS):
        layer = copy.copy(value)
        for name, part in vars(value).items():
            setattr(layer, name, _copied(part, device))
        return layer
    return value
