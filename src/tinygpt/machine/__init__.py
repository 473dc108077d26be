"""How tinygrad runs here: device, compiler, cores, kernels that last. Knows nothing of models."""
