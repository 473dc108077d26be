"""Weights of a model in 16 bits: which of them are rounded, and the Tensors that take their place.

bfloat16 has the range of float32 and 8 bits of precision; float16 has 11 bits and ends at 65504.
Norms and biases stay float32: they are few.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinygpt.errors import DataError
from tinygpt.machine.tinygrad_internals import DType
from tinygpt.machine.transfer import read, write
from tinygpt.model.transformer import Transformer

HALVED = ("tokens", "positions", "linear", "output")
"""The kinds of weights that are rounded."""
MOST = 65504.0
"""The largest float16."""


def check_range(name: str, values: npt.NDArray[Any], dtype: DType) -> None:
    """Raise DataError for weights that a type cannot hold, which only float16 has."""
    if dtype == dtypes.float16 and np.abs(values).max(initial=0.0) > MOST:
        raise DataError(
            f"{name} holds values beyond {MOST:.0f}, which float16 does not have. Take bfloat16."
        )


def put(
    model: Transformer, name: str, old: Tensor, dtype: DType, values: npt.NDArray[Any] | None = None
) -> None:
    """Replace the parameter of this name by one of another type: ``values``, or those of ``old``.

    Each is rounded to the nearest number of the type. The parameter does not learn.
    """
    values = read(old) if values is None else values
    check_range(name, values, dtype)
    tensor = write(Tensor.empty(*old.shape, dtype=dtype, device=old.device), values)
    layer, _, attribute = name.rpartition(".")
    setattr(model.layer(layer), attribute, tensor.is_param_(False))
