"""Weights of 16 bits for generation: half the memory, and half the time that reading them takes.

Matrices and embeddings are rounded, see ``rounding``. What a linear layer reads and writes has the
type of its weight, and so have the keys and values of the cache; sums, norms, softmax and logits
are float32.

A model that is rounded can write and be measured, but not learn: most updates are smaller than the
distance between two such weights. Training has ``TrainConfig.dtype``, which keeps float32 weights.
"""

from __future__ import annotations

from typing import TypeVar

from tinygrad import Tensor

from tinygpt.config import Precision
from tinygpt.config.weights import weights
from tinygpt.errors import UsageError
from tinygpt.machine import precision
from tinygpt.machine.transfer import read, write
from tinygpt.model import lora
from tinygpt.model.int8 import Fetch, free_unused
from tinygpt.model.rounding import HALVED, check_range, put
from tinygpt.model.transformer import Transformer

Model = TypeVar("Model", bound=Transformer)


def halve(model: Model, dtype: Precision, fetch: Fetch | None = None) -> Model:
    """Round the weights of a model to bfloat16 or float16, in place, one after another; -> it.

    With ``fetch`` they come from there, for a model that was made without any (``seed=None``): it
    never takes more memory than it has in the end, and its largest weight. Adapters are merged
    first. From now on the model is in inference mode. float32 changes nothing but that. Raises
    UsageError for a model whose weights are rounded already, DeviceError where the device lacks the
    type, and DataError for weights that float16 cannot hold; the model is then as it was, unless
    its weights were being fetched.

    >>> model = halve(load("runs/shakespeare")[0], "bfloat16")
    """
    precision.require(dtype)
    if model.rounded_to not in (None, dtype):
        raise UsageError(
            f"The weights of this model were rounded to {model.rounded_to} already. Load it again "
            f"for another type."
        )
    half = precision.half_of(dtype)
    if half is not None and model.rounded_to is None:
        if fetch is None:
            lora.merge(model)
            Tensor.realize(*model.parameters().values())
        parameters = model.parameters()
        if fetch is None and dtype == "float16":  # before any is rounded
            for weight in weights(model.config):
                check_range(weight.name, read(parameters[weight.name]), half)
        for weight in weights(model.config):
            parameter = parameters.pop(weight.name)  # its memory is freed when it is replaced
            values = read(parameter) if fetch is None else fetch(weight.name)
            if weight.kind in HALVED:
                put(model, weight.name, parameter, half, values)
            elif fetch is not None:
                write(parameter, values)
        model.half = half
        free_unused(model)
    return model.eval()
