"""GPT-2 once more, in numpy and float64: the oracle that the model is held against.

It shares no code with the package. Every function returns its result and a function ``back`` that
takes the gradient of the result, adds the gradients of the parameters to ``grads`` and returns the
gradient of the input. Parameters go by GPT-2's names, weights are (out, in).
"""

import numpy as np


class GPT2:
    """Forward, loss, gradients. ``sizes`` are n_layer and n_head."""

    def __init__(self, params, n_layer, n_head):
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.n_layer, self.n_head = n_layer, n_head
        self.grads = {}

    def logits(self, tokens):
        return self._forward(np.asarray(tokens))[0]

    def loss(self, tokens, targets):
        return cross_entropy(self.logits(tokens), np.asarray(targets))[0]

    def loss_and_gradients(self, tokens, targets):
        self.grads = {name: np.zeros_like(value) for name, value in self.params.items()}
        logits, back = self._forward(np.asarray(tokens))
        loss, back_loss = cross_entropy(logits, np.asarray(targets))
        back(back_loss())
        return loss, self.grads

    def _forward(self, tokens):
        T = tokens.shape[1]
        wte, wpe = self.params["wte.weight"], self.params["wpe.weight"]
        head = "lm_head.weight" if "lm_head.weight" in self.params else "wte.weight"
        x = wte[tokens] + wpe[:T]
        backs = []
        for i in range(self.n_layer):
            x, back = self._block(x, f"h.{i}")
            backs.append(back)
        x, back_norm = self._layer_norm(x, "ln_f")
        logits = x @ self.params[head].T

        def back(dy):
            self.grads[head] += np.einsum("btv,btc->vc", dy, x)
            dx = back_norm(dy @ self.params[head])
            for back_block in reversed(backs):
                dx = back_block(dx)
            np.add.at(self.grads["wte.weight"], tokens, dx)
            self.grads["wpe.weight"][:T] += dx.sum(0)

        return logits, back

    def _block(self, x, name):
        a, back_1 = self._layer_norm(x, f"{name}.ln_1")
        a, back_attention = self._attention(a, f"{name}.attn")
        x = x + a
        m, back_2 = self._layer_norm(x, f"{name}.ln_2")
        m, back_fc = self._linear(m, f"{name}.mlp.c_fc")
        m, back_gelu = gelu(m)
        m, back_proj = self._linear(m, f"{name}.mlp.c_proj")

        def back(dy):
            dy = dy + back_2(back_fc(back_gelu(back_proj(dy))))
            return dy + back_1(back_attention(dy))

        return x + m, back

    def _attention(self, x, name):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        qkv, back_in = self._linear(x, f"{name}.c_attn")
        q, k, v = qkv.reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(D)
        scores[:, :, np.triu(np.ones((T, T), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bhkd->bqhd", p, v).reshape(B, T, C)
        out, back_out = self._linear(y, f"{name}.c_proj")

        def back(dy):
            dy = back_out(dy).reshape(B, T, H, D)
            dv = np.einsum("bhqk,bqhd->bhkd", p, dy)
            dp = np.einsum("bqhd,bhkd->bhqk", dy, v)
            ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(D)
            dq, dk = np.einsum("bhqk,bhkd->bhqd", ds, k), np.einsum("bhqk,bhqd->bhkd", ds, q)
            dqkv = np.stack([dq, dk, dv])  # (3, B, H, T, D)
            return back_in(dqkv.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * C))

        return out, back

    def _linear(self, x, name):
        weight, bias = self.params[f"{name}.weight"], self.params.get(f"{name}.bias", 0.0)

        def back(dy):
            self.grads[f"{name}.weight"] += np.einsum("bto,bti->oi", dy, x)
            self._add_bias(name, dy)
            return dy @ weight

        return x @ weight.T + bias, back

    def _layer_norm(self, x, name, eps=1e-5):
        weight, bias = self.params[f"{name}.weight"], self.params.get(f"{name}.bias", 0.0)
        std = np.sqrt(x.var(-1, keepdims=True) + eps)
        z = (x - x.mean(-1, keepdims=True)) / std

        def back(dy):
            self.grads[f"{name}.weight"] += (dy * z).sum((0, 1))
            self._add_bias(name, dy)
            dz = dy * weight
            return (dz - dz.mean(-1, keepdims=True) - z * (dz * z).mean(-1, keepdims=True)) / std

        return z * weight + bias, back

    def _add_bias(self, name, dy):
        if f"{name}.bias" in self.params:
            self.grads[f"{name}.bias"] += dy.sum((0, 1))


def gelu(x):
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + t), lambda dy: dy * slope


def cross_entropy(logits, targets):
    """Mean over the targets that are not negative."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    counted = targets >= 0
    one_hot = np.eye(logits.shape[-1])[np.where(counted, targets, 0)] * counted[..., None]

    def back():
        return (np.exp(log_p) * counted[..., None] - one_hot) / counted.sum()

    return -(log_p * one_hot).sum() / counted.sum(), back


class AdamW:
    """Loshchilov and Hutter (2019), with the gradient clipped to a global norm (0: not clipped)."""

    def __init__(self, params, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, grad_clip=1.0):
        self.params, self.t = params, 0
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.weight_decay, self.grad_clip = weight_decay, grad_clip
        self.m = {name: np.zeros_like(p) for name, p in params.items()}
        self.v = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self, grads, lr):
        """Change the parameters in place; return the gradient's norm before clipping."""
        self.t += 1
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = min(1.0, self.grad_clip / (norm + 1e-6)) if self.grad_clip else 1.0
        for name, p in self.params.items():
            g = grads[name] * factor
            self.m[name] = self.beta1 * self.m[name] + (1 - self.beta1) * g
            self.v[name] = self.beta2 * self.v[name] + (1 - self.beta2) * g**2
            m = self.m[name] / (1 - self.beta1**self.t)
            v = self.v[name] / (1 - self.beta2**self.t)
            decay = self.weight_decay if p.ndim >= 2 else 0.0
            p -= lr * (decay * p + m / (np.sqrt(v) + self.eps))
        return norm
