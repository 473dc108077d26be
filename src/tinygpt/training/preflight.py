"""Before a run starts: what it will need, and whether this machine has it.

Everything is computed from the settings; nothing is allocated. What a step keeps in memory was
measured for many shapes, and follows from the model: in each block 16 numbers per position and
channel wait for the backward pass (the block's input, the normalised, three for q, k and v, the
attention's result, eight in the MLP, and their gradients while they are used), and 8 outside. Of
these two and four are float32 in half precision too. ``benchmarks/foreseen.py`` compares.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from statistics import fmean
from typing import Any

from tinygrad import Device, dtypes

from tinygpt.config import Config, GPTConfig, TrainConfig
from tinygpt.config.weights import Weight, matrices_in, weights
from tinygpt.errors import UsageError
from tinygpt.files.disk import size
from tinygpt.kernels import linear
from tinygpt.kernels.loss.chunked import cut_of
from tinygpt.kernels.muon import together
from tinygpt.kernels.newton_schulz import Sizes
from tinygpt.machine import resources
from tinygpt.machine.jit import jit
from tinygpt.machine.transfer import zeros
from tinygpt.model.lora import count_trainable, learned_in_rows, learning
from tinygpt.training.accumulation import levels

FLOAT = 4
"""Bytes of a number."""
PER_BLOCK, OUTSIDE = (16, 9), (8, 6)
"""Floats that are kept for every position and channel, and in half precision: see above."""
IN_BLOCK, AT_LOSS = (12, 7), (9, 5)
"""The same while an evaluation is in a block, and while it is in the loss."""
ADAPTING = 8
"""More of them in a block with adapters: a layer's output, and that of its adapter."""
COMPILING = 40_000_000
"""Bytes that tinygrad takes to compile, and keeps for what it has compiled."""
ROOM = 0.9
"""Share of the free memory that what is recommended may take."""
MATRIX_SHARE = 0.9
"""Share of a product's pace that a whole step reaches: 0.9 to 1 on one core, less on several."""

LAUNCHING = 2e-4
"""Seconds that a layer takes however small it is, to launch its kernels."""


@dataclass(frozen=True)
class Estimate:
    """What training will need: bytes, and floating-point operations of a step."""

    parameters: int
    """Their number."""
    process: int
    """What the process has already."""
    weights: int
    optimizer: int
    """Adam's two moments; Muon has one of the matrices."""
    gradients: int
    """Of all parameters, and what Muon makes of them; or of a block where they are accumulated."""
    sums: int
    """Of gradients that are accumulated, see ``accumulation``, and what Muon makes of them."""
    kept: int
    """What is kept when the forward pass is done; with recomputation the blocks' inputs."""
    activations: int
    """The same when the backward pass is in a block; with recomputation those of one block."""
    loss: int
    """The largest part of the logits that is in memory at once, and the gradients it makes."""
    evaluation: int
    saving: int
    """The copy of weights and moments that is written while training goes on."""
    layers: int
    tokens: int
    """In a step, all micro-batches together."""
    flops: int
    devices: int = 1
    """Among which the micro-batches are divided; bytes are those of all together."""
    on_first: int = 0
    """Bytes on the first of several devices, which has most: weights, moments and its part."""

    @property
    def needed(self) -> int:
        """Bytes at the peak that the process does not have yet."""
        state = self.weights + self.optimizer + self.saving
        return state + self.step + self.sums + self.evaluation + COMPILING

    @property
    def step(self) -> int:
        """Bytes that a micro-batch takes: when the other gradients come, the logits have gone."""
        return max(self.kept + self.loss, self.activations + self.gradients)

    @property
    def peak(self) -> int:
        """The process's memory at the peak, in bytes."""
        return self.process + self.needed

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return {**asdict(self), "needed": self.needed, "peak": self.peak}

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradients": self.gradients + self.sums,
            "activations": self.step - min(self.step, self.gradients),
            "evaluation and saving": self.evaluation + self.saving,
            "process": self.process + COMPILING,
        }
        listed = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
        each = f"; {size(self.on_first)} on the first of {self.devices} devices" * bool(
            self.on_first
        )
        return f"about {size(self.peak)} at the peak ({listed}{each})"


def preflight(model: GPTConfig, train: TrainConfig, *, saves: bool = True) -> Estimate:
    """What training a model of this shape will need; ``saves``: checkpoints are written.

    >>> estimate = preflight(GPTConfig(vocab_size=65), TrainConfig(batch_size=12))
    >>> estimate.parameters, estimate.optimizer
    (809856, 6478848)
    """
    if (devices := train.n_devices) > 1:
        part = replace(train, batch_size=train.batch_size // devices, devices=None)
        one = preflight(model, part, saves=saves)
        trained = count_trainable(model, train)[0] if train.grad_accum_steps > 1 else 0
        return divided(one, devices, train.shard_optimizer, FLOAT * trained)
    C, V, L, T = model.n_embd, model.vocab_size, model.n_layer, model.block_size
    N = train.batch_size * T  # positions of a micro-batch
    learned, (trained, adapters) = learning(model, train), count_trainable(model, train)
    matrices = muon_matrices(model, train)
    moments = 2 * trained - sum(weight.size for weight in matrices)
    stacks = muon_stacks(matrices)
    at_once = max((s.needed for s in stacks), default=0)
    count = model.num_params() + adapters
    rows = len(learned_in_rows(model, train))  # tables of which some rows learn
    L_back = L if rows else L - (train.freeze or 0)  # blocks that the backward pass sees
    half = train.dtype != "float32"
    rounded = count - adapters if half and adapters else 0  # frozen beside adapters: 16 bits
    outside, per_block = OUTSIDE[half], N * C * PER_BLOCK[half]
    if model.attention == "plain":
        per_block += train.batch_size * model.n_head * T * T // (1 + half)
    kept = activations = per_block * L_back + N * C * outside
    if train.recompute:
        kept, activations = N * C * (L_back + outside), per_block + N * C * (1 + outside)
    adapting = ADAPTING // (1 + half) if adapters else 0
    activations += N * C * adapting
    activations += 2 * rows * V * C  # each with its rows in place, and the embedding's gradient
    chunk = cut_of(N, C, V)
    powers, dx_parts = prod(chunk.powers), prod(chunk.dx_parts)
    evaluating = max(N * C * (IN_BLOCK[half] + adapting), N * C * AT_LOSS[half] + powers)
    evaluating += rows * V * C
    tied = V * C if model.tie_embeddings and trained == count else 0  # a gradient from either end
    projection = 0 if _output_frozen(model, train) else V * C
    gradients, sums = trained + tied + at_once, 0
    if train.grad_accum_steps > 1:  # each is added to a sum as soon as it is there
        last = sum(size for name, size in learned.items() if name.startswith(f"h.{L - 1}."))
        gradients = tied + max(last, tied)
        sums = trained * levels(train.grad_accum_steps) + at_once
    return Estimate(
        parameters=count,
        process=resources.memory(),
        weights=FLOAT * count - FLOAT // 2 * rounded,
        optimizer=FLOAT * moments,
        gradients=FLOAT * gradients,
        sums=FLOAT * sums,
        kept=FLOAT * kept,
        activations=FLOAT * activations,
        loss=FLOAT * (powers + dx_parts + projection),
        evaluation=FLOAT * evaluating,
        saving=FLOAT * (count + moments) if saves else 0,
        layers=L,
        tokens=N * train.grad_accum_steps,
        flops=N * train.grad_accum_steps * flops_per_token(model, train)
        + sum(sizes.operations for sizes in stacks),
    )


def divided(one: Estimate, devices: int, sharded: bool, summed: int = 0) -> Estimate:
    """The estimate of several devices, from that of ``one`` which has its part of the batch.

    Each has the weights, its activations and its gradients; a gradient is added up where the
    moments are, which takes a copy of each other device's: on the first, or on all by shares. Of
    gradients that were accumulated, ``summed`` bytes on a device, the update has copies and sum.
    """
    copies = devices * summed or (devices - 1) * one.gradients
    in_step = 0 if summed else copies
    shared = one.optimizer + copies
    own = one.weights + one.step + one.sums + one.evaluation
    every = ("weights", "sums", "kept", "activations", "loss", "evaluation", "tokens", "flops")
    of_all = {name: devices * getattr(one, name) for name in every}
    of_all["sums"] += copies - in_step
    return replace(
        one,
        **of_all,
        gradients=devices * one.gradients + in_step,
        devices=devices,
        on_first=own + (shared // devices if sharded else shared),
    )


def muon_matrices(model: GPTConfig, train: TrainConfig) -> list[Weight]:
    """The weights that Muon changes: none with Adam, and no adapters."""
    if train.optimizer != "muon":
        return []
    learns = learning(model, train)
    return [w for w in weights(model) if w.name in learns and matrices_in(w.name)]


def muon_stacks(matrices: Sequence[Weight]) -> list[Sizes]:
    """The matrices that Muon works on at once, stack by stack."""
    parts = [(w.shape, matrices_in(w.name)) for w in matrices]
    shapes = [(n, rows // n, columns) for (rows, columns), n in parts]
    stacks = ([shapes[i] for i in chosen] for chosen in together(shapes))
    return [Sizes.of(sum(n for n, _, _ in some), *some[0][1:]) for some in stacks]


def _output_frozen(model: GPTConfig, train: TrainConfig) -> bool:
    """Whether the weight of the last product, onto the vocabulary, is frozen."""
    if train.lora_rows is not None:
        return False
    return train.lora_rank is not None or (train.freeze is not None and model.tie_embeddings)


def flops_per_token(model: GPTConfig, train: TrainConfig | None = None) -> int:
    """Floating-point operations of a training step per token, the backward pass included.

    Two for each weight forward, two for the gradient of its input and two for its own, which frozen
    weights have not, nor the blocks below the first that learns either; attention sees half of the
    positions on average. Kaplan et al. (2020); Chowdhery et al. (2022), appendix B.
    """
    C, L, T = model.n_embd, model.n_layer, model.block_size
    train = train or TrainConfig()
    _, adapters = count_trainable(model, train)
    rows = sum(w.size for w in learned_in_rows(model, train)[-1:])  # the output projection's
    first = 0 if rows else train.freeze or 0  # the first block that the backward pass sees
    looked_up = {"positions"} if model.tie_embeddings else {"positions", "tokens"}
    multiplied = {w.name: w for w in weights(model) if w.kind not in looked_up}
    forward = adapters + sum(w.size for w in multiplied.values())
    backward = forward - sum(w.size for w in multiplied.values() if 0 <= w.block < first)
    learned = learning(model, train).items()
    own = adapters + rows or sum(count for name, count in learned if name in multiplied)
    attention = 2 * L * C * T + 4 * (L - first) * C * T
    return 2 * (forward + backward + own) + attention


def check(
    model: GPTConfig, train: TrainConfig, *, allow: bool = False, given: bool = False
) -> Estimate:
    """The estimate; raises UsageError, with what would fit, if memory will not suffice.

    With ``allow`` it does not. Where nobody tells what is free nothing is refused: that is so for
    accelerators, which tinygrad does not ask. The weights may be ``given``: then the model cannot
    be made smaller, but less of it can be trained.
    """
    estimate, free = preflight(model, train), resources.available_memory() if on_cpu() else 0
    if allow or not free or estimate.needed <= free:
        return estimate
    raise UsageError(
        f"This run needs {estimate}, and only {size(free)} are free. "
        f"{advice(model, train, free, given)} To try nevertheless: --allow-memory."
    )


def advice(model: GPTConfig, train: TrainConfig, free: int, given: bool = False) -> str:
    """The nearest settings that fit into ``free`` bytes, as flags."""
    for what, smaller_model, smaller in smaller_runs(model, train, given):
        estimate = preflight(smaller_model, smaller)
        if estimate.needed <= ROOM * free:
            flags = _flags(model, smaller_model, "model") + _flags(train, smaller, "train")
            return f"{what} would take about {size(estimate.peak)}: {' '.join(flags)}."
    return "Nothing like it fits; take a much smaller model, or a machine with more memory."


def smaller_runs(
    model: GPTConfig, train: TrainConfig, given: bool = False
) -> Iterator[tuple[str, GPTConfig, TrainConfig]]:
    """Ways to need less, the least change first; of a model whose weights are ``given``, or not."""
    rows = train.batch_size * train.grad_accum_steps
    parts = range(train.batch_size - 1, 0, -1)
    for batch in (b for b in parts if train.batch_size % b == 0 == b % train.n_devices):
        train = replace(train, batch_size=batch, grad_accum_steps=rows // batch)
        yield "The same steps in smaller micro-batches", model, train
    if given and train.lora_rank is None:
        train = replace(train, lora_rank=min(8, model.n_embd), freeze=None)
        yield "Adapters alone", model, train
    while model.block_size > 32:
        model = replace(model, block_size=model.block_size // 2)
        yield "A shorter block", model, train
    if given:
        return
    while model.n_layer > 1 or model.n_embd // model.n_head > 16:
        if model.n_layer > 1:
            model = replace(model, n_layer=model.n_layer // 2)
            yield "A smaller model", model, train
        if model.n_embd // model.n_head > 16:
            width = model.n_embd // 2 // model.n_head * model.n_head
            model = replace(model, n_embd=width)
            yield "A smaller model", model, train


def _flags(before: Config, after: Config, table: str) -> list[str]:
    old = before.to_dict()
    changed = {name: value for name, value in after.to_dict().items() if value != old[name]}
    return [f"--{table}.{name.replace('_', '-')} {value}" for name, value in changed.items()]


def on_cpu() -> bool:
    """Whether this process's memory is the device's, which these figures were measured for."""
    return Device.DEFAULT.split(":")[0] == "CPU"


def measured_rate(seconds: float = 0.0) -> float:
    """Floating-point operations per second of a matrix product on this device, as busy as it is.

    It takes a tenth of a second, more where the kernel has to be compiled first. The pace is that
    of the fastest of three products, or the mean of all during ``seconds``.
    """
    n, width = 512, 512
    x, w = zeros((n, width), dtypes.float32), zeros((width, width), dtypes.float32)
    product = jit(lambda: linear(x, w))
    product()
    began, times = time.perf_counter(), list[float]()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        product()
        times.append(time.perf_counter() - before)
    return 2 * n * width * width / (fmean(times) if seconds else min(times))


def seconds_per_step(estimate: Estimate, rate: float) -> float:
    """What a step should take where a matrix product runs at ``rate``."""
    return estimate.flops / (MATRIX_SHARE * rate) + LAUNCHING * (1 + estimate.layers)
