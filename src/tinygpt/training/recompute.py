"""Gradients with the activations of one block in memory at a time, not those of all blocks.

A backward pass needs what the forward pass computed. Here the forward pass keeps the input of each
block and nothing else; the backward pass computes a block's activations again, from that input, and
then the block's gradients. For L blocks L inputs and one block's activations are in memory instead
of L blocks' activations, at the price of a second forward pass through the blocks, but for the last
product of each, which no gradient needs. Chen et al., "Training Deep Nets with Sublinear Memory
Cost" (2016).

tinygrad computes equal expressions once, and each kernel as soon as its inputs are there. Either
would undo all this: the activations of the forward pass would be kept, or those of all blocks
computed again at once. So a block begins again from a copy of its input that depends on the
gradient of its output, see ``restart``.
"""

from __future__ import annotations

from collections.abc import Mapping

from tinygrad import Tensor

from tinygpt.machine.tinygrad_internals import DType
from tinygpt.model.transformer import Dropout, Transformer

TABLES = "wte.weight", "wpe.weight", "wte.lora_rows"
"""The parameters before the first block; the first may be the output projection too."""


def recomputed_gradients(
    model: Transformer,
    tokens: Tensor,
    targets: Tensor,
    drop: Dropout,
    half: DType | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () of tokens and targets (B, T), and by name the gradients of what learns.

    They are those of ``model.loss`` with the same arguments, times ``scale`` () if that is given:
    the masks of dropout are made again from the same keys.
    """
    learns, half = model.trainable(), half or model.half
    embedded = drop(model.embed(tokens))  # (B, T, C), as x is
    x, inputs = embedded.contiguous(), list[tuple[Tensor, Dropout]]()
    for block in model.h:
        inputs.append((x, Dropout(drop.p, drop.key)))
        x = block(x, drop, None, half).contiguous()
    x = x.detach().contiguous()
    loss = model.loss_of(model.ln_f(x, half), targets, gradient=True)
    behind = [name for name in learns if not name.startswith("h.") and name != "wpe.weight"]
    if not model.config.tie_embeddings:
        behind = [name for name in behind if name not in TABLES]
    dx, found = gradients_of(scaled(loss, scale), x, {name: learns[name] for name in behind})
    for i in reversed(range(first_that_learns(learns), len(inputs))):
        before, masks = inputs[i]
        x = restart(before, dx)
        own = {name: p for name, p in learns.items() if name.startswith(f"h.{i}.")}
        dx, new = gradients_of(model.h[i](x, masks, None, half), x, own, dx)
        found |= new
    if tables := {name: learns[name] for name in TABLES if name in learns}:
        _, new = gradients_of(embedded, embedded, tables, dx)
        found |= {name: found[name] + g if name in found else g for name, g in new.items()}
    return loss, found


def gradients_of(
    y: Tensor, x: Tensor, parameters: Mapping[str, Tensor], dy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of x and, by name, of parameters, given that of y, which is 1 if not given."""
    dx, *found = y.gradient(x, *parameters.values(), gradient=dy)
    return dx, dict(zip(parameters, found, strict=True))


def scaled(loss: Tensor, scale: Tensor | None) -> Tensor:
    """The loss () that the backward pass begins with."""
    return loss if scale is None else loss * scale


def first_that_learns(learns: Mapping[str, Tensor]) -> int:
    """The first block that a backward pass goes through; past the last one if there is none."""
    if any(name in learns for name in TABLES):
        return 0
    return min((int(n.split(".")[1]) for n in learns if n.startswith("h.")), default=2**31)


def restart(x: Tensor, after: Tensor) -> Tensor:
    """A copy of x, made once ``after``, of its shape, is there; no gradient passes through it.

    Where ``after`` is NaN so is the copy: a step with such a gradient changes nothing in any case.
    """
    after = after.contiguous().detach()
    return after.isnan().where(after, x.detach()).contiguous()
