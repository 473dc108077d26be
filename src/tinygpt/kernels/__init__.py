"""What the model computes with.

``reference`` holds the plain formulas. A fast kernel replaces its twin here, where the device and the
shape allow it; the model does not change.
"""

from tinygpt.kernels.reference import (
    attention,
    cross_entropy,
    embedding,
    gelu,
    layer_norm,
    linear,
)

__all__ = ["attention", "cross_entropy", "embedding", "gelu", "layer_norm", "linear"]
