"""``tinygpt doctor --gradients``: the model's gradients against numeric ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from tinygpt.cli.console import show_json
from tinygpt.cli.flags import Flat, Switch
from tinygpt.cli.options import Values, flags
from tinygpt.config import GPTConfig
from tinygpt.errors import UsageError
from tinygpt.machine import device

SMALL_MODEL: Values = {
    "block_size": 8,
    "vocab_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
}
"""What ``gradcheck`` checks unless told otherwise: it takes many forward passes."""

if TYPE_CHECKING:
    SmallModelFlags = dict[str, Any]
else:
    SmallModelFlags = flags(GPTConfig, "Model", SMALL_MODEL)


def gradcheck(
    *,
    model: Annotated[SmallModelFlags | None, Flat] = None,
    batch_size: int = 2,
    samples: int = 3,
    seed: int = 1337,
    json: Switch = False,
) -> int:
    """Check the model's gradients against numeric ones in float64; exit code 1 if one is wrong.

    Without flags it checks a small model; with --model flags one of that shape.

    Parameters
    ----------
    batch_size
        Sequences of random tokens in the batch.
    samples
        Single elements tried per parameter, besides a random direction.
    seed
        Seed of weights, tokens and directions.
    json
        Print the report as JSON.
    """
    config = GPTConfig.from_dict({**SMALL_MODEL, **(model or {})})
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is too small: it must be at least 1.")
    device.require_device()
    import numpy as np
    from tinygrad import Tensor

    from tinygpt.model.transformer import Transformer
    from tinygpt.training.gradcheck import gradcheck as check

    shape = (batch_size, config.block_size + 1)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)
    idx, targets = Tensor(tokens[:, :-1].copy()), Tensor(tokens[:, 1:].copy())
    report = check(Transformer(config, seed), idx, targets, samples=samples, seed=seed)
    if json:
        show_json(report.to_dict())
    else:
        print(report.table())
    return 0 if report.ok else 1
