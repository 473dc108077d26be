"""The loss: cross-entropy, the mean of -log softmax(logits)[target] over the counted rows.

For a row of logits s with the target t, let m = max s and z = Σ exp(s - m). Then::

    loss      = -log softmax(s)[t] = log z - (s[t] - m)
    ∂loss/∂s  = softmax(s) - onehot(t) = exp(s - m) / z - onehot(t)

m and z are kept apart, not as log z + m: for logits of 10⁴ that sum would round away what matters.
A row counts if its target is >= 0. Over the n counted rows of logits S = X Wᵀ, with the matrix
P = ∂loss/∂S = (softmax(S) - onehot) / n::

    ∂loss/∂X = P W            ∂loss/∂W = Pᵀ X

`cross_entropy` takes logits. `fused` takes X and W and never has all logits in memory: it explains
the algorithm, and `chunk` has its kernels.
"""
