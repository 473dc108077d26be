"""How weights change: the learning rate's schedule, clipping, Adam and decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from tinygpt.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, from 0: linear warm-up, then a decay down to min_lr at max_iters."""
    peak, low = config.learning_rate, config.min_lr
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, config.max_iters - config.warmup_steps)
    progress = min(progress, 1.0)
    if config.decay == "linear":
        return peak + (low - peak) * progress
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * progress))


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm () of all gradients taken as one vector."""
    total = gradients[0].float().square().sum()
    for gradient in gradients[1:]:
        total = total + gradient.float().square().sum()
    return total.sqrt()


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What to multiply gradients of this norm by so that it is at most ``limit``."""
    return (limit / (norm + 1e-6)).minimum(1.0)


class AdamW(Optimizer):
    """Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019).

    ``parameters`` maps names to Tensors. Weight decay applies to matrices and embeddings, not to
    biases and layer norms. With ``weight_decay=0`` this is Adam. It keeps to tinygrad's optimizer
    protocol: set each ``.grad``, then ``schedule_step()`` or ``step()``.
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
        self.params = list(parameters.values())
        self.buffers: list[Tensor] = []
        self.device, self.fused = self.params[0].device, False
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.lr = _scalar(lr, self.device)
        self.b1_t, self.b2_t = _scalar(1.0, self.device), _scalar(1.0, self.device)
        self.m = [_zeros_like(p) for p in self.params]
        self.v = [_zeros_like(p) for p in self.params]

    def schedule_step(self) -> list[Tensor]:
        """One update from the ``.grad`` of each parameter; returns the Tensors to realize."""
        gradients = [p.grad for p in self.params]
        missing = sum(g is None for g in gradients)
        if missing:
            raise RuntimeError(f"{missing} of {len(gradients)} parameters have no gradient.")
        self.b1_t.assign(self.b1_t * self.beta1)
        self.b2_t.assign(self.b2_t * self.beta2)
        for p, g, m, v in zip(self.params, gradients, self.m, self.v, strict=True):
            assert g is not None
            m.assign(self.beta1 * m + (1 - self.beta1) * g)
            v.assign(self.beta2 * v + (1 - self.beta2) * g * g)
            direction = (m / (1 - self.b1_t)) / ((v / (1 - self.b2_t)).sqrt() + self.eps)
            decay = self.weight_decay if len(p.shape) >= 2 else 0.0
            p.assign((p.detach() * (1 - self.lr * decay) - self.lr * direction).cast(p.dtype))
        return [self.b1_t, self.b2_t, *self.m, *self.v, *self.params]


def make_optimizer(parameters: Mapping[str, Tensor], config: TrainConfig) -> AdamW:
    """The optimizer a TrainConfig describes."""
    return AdamW(
        parameters,
        lr=learning_rate(config, 0),
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an optimizer must remember, by name: its moments, step products and learning rate.

    Works for AdamW above and for tinygrad's own Adam, AdamW and SGD.
    """
    names = {id(p): name for name, p in parameters.items()}
    state = {"lr": optimizer.lr}
    for product in ("b1_t", "b2_t"):
        if isinstance(value := getattr(optimizer, product, None), Tensor):
            state[product] = value
    for moments in ("m", "v", "b"):
        tensors = getattr(optimizer, moments, [])
        for i, tensor in enumerate(tensors):
            per_parameter = len(tensors) == len(optimizer.params)
            owner = names.get(id(optimizer.params[i])) if per_parameter else None
            state[f"{moments}.{owner or i}"] = tensor
    return state


def _scalar(value: float, device: str | tuple[str, ...]) -> Tensor:
    return Tensor([value], dtype=dtypes.float32, device=device).contiguous().realize()


def _zeros_like(p: Tensor) -> Tensor:
    return Tensor.zeros(*p.shape, dtype=dtypes.float32, device=p.device).contiguous().realize()
