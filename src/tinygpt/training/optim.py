"""How weights change: the learning rate's schedule, clipping, Adam and decoupled weight decay."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from tinygrad import Context, Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from tinygpt import kernels
from tinygpt.config import TrainConfig
from tinygpt.config.weights import matrices_in
from tinygpt.kernels.adamw import plain_scaling, verdict
from tinygpt.machine.transfer import Array, zeros_like


def learning_rate(config: TrainConfig, step: int) -> float:
    """AdamW's rate of a step, from 0: linear warm-up, a plateau, a decay to min_lr at max_iters."""
    peak, low = config.learning_rate, config.min_lr
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, config.max_iters - config.warmup_steps)
    progress = min(max(0.0, progress - config.decay_start) / (1 - config.decay_start), 1.0)
    if config.decay == "linear":
        return peak + (low - peak) * progress
    if config.decay == "sqrt":  # Hägele et al., 2024
        return peak + (low - peak) * math.sqrt(progress)
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * progress))


class AdamW(Optimizer):
    """Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019).

    ``parameters`` maps names to Tensors, of which frozen ones are left alone. Weight decay applies
    to matrices and embeddings, not to biases and layer norms. With ``weight_decay=0`` this is Adam.
    It keeps to tinygrad's optimizer protocol: set each ``.grad``, then ``schedule_step()`` or
    ``step()``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = [p for p in parameters.values() if p.is_param]
        self.buffers: list[Tensor] = []
        self.device, self.fused = self.params[0].device, False
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.lr = _scalar(lr, self.device)
        self.b1_t, self.b2_t = _scalar(1.0, self.device), _scalar(1.0, self.device)
        self.m = [zeros_like(p, dtypes.float32) for p in self.params]
        self.v = [zeros_like(p, dtypes.float32) for p in self.params]
        self.elsewhere: dict[int, Callable[[Array], None]] = {}
        """By the ``id`` of a moment that another process keeps: what fetches it into an array."""

    def update(
        self,
        gradients: Sequence[Tensor],
        clip: float = 0.0,
        scale: float = 1.0,
        loss: Tensor | None = None,
        limits: Tensor | None = None,
    ) -> Tensor:
        """Take one step; -> loss, norm, whether it was taken (1 or 0), each gradient's norm (3+n,).

        Loss and gradients are multiplied by ``scale``, the gradients then clipped to ``clip``, if
        it is not 0. Unless ``loss`` () and norm lie below the ``limits`` (2,), infinity where not
        given, nothing changes. Realize ``changed()`` together with the result.
        """
        own = self.params[: len(self.m)]
        decay = self._decay(own)
        return kernels.adamw_update(
            own, gradients, self.m, self.v, self.lr, self.b1_t, self.b2_t,
            beta1=self.beta1, beta2=self.beta2, eps=self.eps, decay=decay, clip=clip, scale=scale,
            loss=loss, limits=limits,
        )  # fmt: skip

    def changed(self) -> list[Tensor]:
        """The Tensors that a step changes."""
        return [self.b1_t, self.b2_t, *self.m, *self.v, *self.params]

    def moments(self, index: int) -> list[Tensor]:
        """What is remembered of one of ``params``."""
        return [self.m[index], self.v[index]] if index < len(self.m) else []

    def share(self, chosen: Sequence[int], params: Sequence[Tensor]) -> Self:
        """This optimizer for some of its ``params``, in order, of which ``params`` are copies."""
        part, own = copy.copy(self), [i for i in chosen if i < len(self.m)]
        part.params = list(params)
        part.m, part.v = [self.m[i] for i in own], [self.v[i] for i in own]
        return part

    def follow(
        self,
        gradients: Sequence[Tensor],
        numbers: Tensor,
        report: Tensor,
        clip: float,
        scale: float,
    ) -> list[Tensor]:
        """Take the step that ``kernels.adamw_numbers`` decided on; -> the Tensors to realize."""
        own = self.params[: len(self.m)]
        if own:
            kernels.adamw_follow(
                own, gradients[: len(own)], self.m, self.v, numbers,
                beta1=self.beta1, beta2=self.beta2, eps=self.eps, decay=self._decay(own),
            )  # fmt: skip
        return [*self.m, *self.v, *self.params]

    def _decay(self, params: Sequence[Tensor]) -> list[float]:
        return [self.weight_decay if len(p.shape) >= 2 else 0.0 for p in params]

    def schedule_step(self) -> list[Tensor]:
        """One update from the ``.grad`` of each parameter; returns the Tensors to realize."""
        gradients = [p.grad for p in self.params if p.grad is not None]
        missing = len(self.params) - len(gradients)
        if missing:
            raise RuntimeError(f"{missing} of {len(self.params)} parameters have no gradient.")
        self.update(gradients)
        return self.changed()


class Muon(AdamW):
    """Muon for the matrices of the blocks, AdamW without weight decay for all other parameters.

    The direction of a matrix is its momentum with every singular value brought near 1, see
    `kernels.muon`. Its rate is ``ratio`` times ``lr``; ``weight_decay`` applies to the matrices.
    Parameters are named as the model names them. Jordan et al., "Muon" (2024); weight decay: Liu
    et al., "Muon is Scalable for LLM Training" (2025).
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ratio: float = 20.0,
        momentum: float = 0.95,
    ) -> None:
        rest = {name: p for name, p in parameters.items() if not matrices_in(name)}
        super().__init__(rest, lr, beta1, beta2, eps)
        matrices = {n: p for n, p in parameters.items() if matrices_in(n) and p.is_param}
        self.ratio, self.momentum, self.matrix_decay = ratio, momentum, weight_decay
        self.counts = [matrices_in(name) for name in matrices]
        self.b = [zeros_like(p, dtypes.float32) for p in matrices.values()]
        self.params += matrices.values()

    def update(
        self,
        gradients: Sequence[Tensor],
        clip: float = 0.0,
        scale: float = 1.0,
        loss: Tensor | None = None,
        limits: Tensor | None = None,
    ) -> Tensor:
        """As ``AdamW.update``. The norm is that of all gradients, before Muon takes its own."""
        report = super().update(gradients, clip, scale, loss, limits)
        self._change_matrices(gradients, self.lr, report, clip, scale)
        return report

    def changed(self) -> list[Tensor]:
        """The Tensors that a step changes."""
        return [*super().changed(), *self.b]

    def moments(self, index: int) -> list[Tensor]:
        """What is remembered of one of ``params``."""
        rest = len(self.m)
        return super().moments(index) if index < rest else [self.b[index - rest]]

    def share(self, chosen: Sequence[int], params: Sequence[Tensor]) -> Self:
        """This optimizer for some of its ``params``, in order, of which ``params`` are copies."""
        part, rest = super().share(chosen, params), len(self.m)
        part.b = [self.b[i - rest] for i in chosen if i >= rest]
        part.counts = [self.counts[i - rest] for i in chosen if i >= rest]
        return part

    def follow(
        self,
        gradients: Sequence[Tensor],
        numbers: Tensor,
        report: Tensor,
        clip: float,
        scale: float,
    ) -> list[Tensor]:
        """Take the step that ``kernels.adamw_numbers`` decided on; -> the Tensors to realize."""
        changed = super().follow(gradients, numbers, report, clip, scale)
        if self.b:
            self._change_matrices(gradients, numbers[1:2].contiguous(), report, clip, scale)
        return [*changed, *self.b]

    def _change_matrices(
        self, gradients: Sequence[Tensor], lr: Tensor, report: Tensor, clip: float, scale: float
    ) -> None:
        rest = len(self.m)
        kernels.muon_update(
            self.params[rest:], gradients[rest:], self.b, self.counts, lr, report,
            ratio=self.ratio, momentum=self.momentum, decay=self.matrix_decay,
            clip=clip, scale=scale,
        )  # fmt: skip


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to.

    >>> layer_of("wte.weight"), layer_of("h.0.ln_1.bias")
    ('wte', 'h.0')
    """
    return ".".join(name.split(".")[: 2 if name.startswith("h.") else 1])


def realize_state(optimizer: Optimizer) -> None:
    """Give an optimizer's state memory of its own.

    tinygrad's own optimizers leave that to their first step; one that is captured would then begin
    every step with the state of the first.
    """
    for tensor in optimizer_state(optimizer, {}).values():
        if not tensor.uop.has_buffer_identity():
            tensor.replace(tensor.contiguous().realize())


def stock_update(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    clip: float,
    scale: float,
    loss: Tensor,
    limits: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """What AdamW.update does, for tinygrad's own optimizers; -> its result, and what changes."""
    report = verdict(loss.reshape(()), gradients, scale, limits)
    factor = plain_scaling(report[1], clip, scale)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g * factor
    with assigning_only_if(report[2] > 0), Context(TRAINING=1):  # they insist on TRAINING
        changed = optimizer.schedule_step()
    for p in params:
        p.grad = None  # freed as soon as it is used
    return report, changed


@contextmanager
def assigning_only_if(taken: Tensor) -> Iterator[None]:
    """In this block every ``Tensor.assign`` keeps the old value unless ``taken`` () is true.

    tinygrad's optimizers know no condition, and all their changes are assignments. One thread at a
    time is in such a block, which changes settings of the process; other threads assign as ever.
    """
    me = threading.get_ident()

    def conditional(tensor: Tensor, value: Any) -> Tensor:
        if threading.get_ident() == me:
            value = taken.where(value, tensor.detach())
        return assign(tensor, value)

    with _one_at_a_time:
        assign = Tensor.assign
        setattr(Tensor, "assign", conditional)  # noqa: B010 - for the type checker, a constant
        try:
            yield
        finally:
            setattr(Tensor, "assign", assign)  # noqa: B010


_one_at_a_time = threading.RLock()


def make_optimizer(parameters: Mapping[str, Tensor], config: TrainConfig) -> AdamW:
    """The optimizer a TrainConfig describes."""
    settings = {
        "lr": learning_rate(config, 0),
        "beta1": config.beta1,
        "beta2": config.beta2,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    matrices = any(matrices_in(name) and p.is_param for name, p in parameters.items())
    if config.optimizer == "adam" or not matrices:  # Adapters are AdamW's.
        return AdamW(parameters, **settings)
    ratio = config.muon_learning_rate / config.learning_rate
    return Muon(parameters, **settings, ratio=ratio, momentum=config.muon_momentum)


OUTER = "outer"
"""The attribute of an optimizer that has the momentum of ranks that train apart: `meeting`."""


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an optimizer must remember, by name: its moments, step products and learning rate.

    Works for AdamW and Muon above and for tinygrad's own Adam, AdamW and SGD.
    """
    names = {id(p): name for name, p in parameters.items()}
    state = {"lr": optimizer.lr}
    for product in ("b1_t", "b2_t"):
        if isinstance(value := getattr(optimizer, product, None), Tensor):
            state[product] = value
    for moments in ("m", "v", "b", OUTER):
        tensors = getattr(optimizer, moments, [])
        params = optimizer.params
        if isinstance(optimizer, Muon) and moments != OUTER:
            rest = len(optimizer.m)
            params = params[rest:] if moments == "b" else params[:rest]
        for i, tensor in enumerate(tensors):
            owner = names.get(id(params[i])) if len(tensors) == len(params) else None
            state[f"{moments}.{owner or i}"] = tensor
    return state


def _scalar(value: float, device: str | tuple[str, ...]) -> Tensor:
    return Tensor([value], dtype=dtypes.float32, device=device).contiguous().realize()
