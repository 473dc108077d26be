"""The peer: GPT-2 in PyTorch, written for these benchmarks and as fast as PyTorch makes it easily.

Attention is ``scaled_dot_product_attention``, the optimizer PyTorch's AdamW (fused, which was the
fastest here; foreach and plain can be chosen), generation has a cache that is allocated once.
Parameters have the names of ours, so that both sides can start from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tinygpt.config import GPTConfig, TrainConfig

Cache = tuple[Tensor, Tensor]
"""Keys and values of one layer, both (B, H, block_size, D)."""
OPTIMIZERS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x: Tensor, cache: Cache | None = None, position: int = 0) -> Tensor:
        B, T, C = x.shape
        dropout = self.dropout if self.training else 0.0
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            end = position + T
            cache[0][:, :, position:end], cache[1][:, :, position:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, bias=config.bias)
        self.c_proj = nn.Linear(4 * C, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None, position: int = 0) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, position))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2 with tied embeddings."""

    def __init__(self, config: GPTConfig, seed: int = 1337) -> None:
        super().__init__()
        assert config.tie_embeddings, "the benchmarks have no others"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._initialise(seed)

    def hidden(
        self, tokens: Tensor, caches: list[Cache] | None = None, position: int = 0
    ) -> Tensor:
        """The normalised residual stream (B, T, C) for tokens (B, T)."""
        x = self.drop(self.wte(tokens) + self.wpe.weight[position : position + tokens.shape[1]])
        for i, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[i], position)
        return self.ln_f(x)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (B, T); those below 0 are left out."""
        logits = functional.linear(self.hidden(tokens), self.wte.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def load(self, folder: str) -> GPT:
        """Take over the weights that ``save_weights`` wrote there."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(np.load(Path(folder, f"{name}.npy"))))
        return self

    def _initialise(self, seed: int) -> None:
        """The same weights as ours have for a seed."""
        rng = np.random.default_rng(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                deviation = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                values = rng.standard_normal(parameter.shape, np.float32) * np.float32(deviation)
                parameter.data.copy_(torch.from_numpy(values))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine or a line down to min_lr."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_iters - config.warmup_steps)
    left = 1 - min(done, 1.0)
    if config.decay == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return config.min_lr + (config.learning_rate - config.min_lr) * left


TrainStep = Callable[[np.ndarray, np.ndarray, float], float]
"""(x (B, T), y (B, T), learning rate) -> loss"""


def make_train_step(
    model: GPT, config: TrainConfig, compiled: bool = False, optimizer: str = "fused"
) -> TrainStep:
    """Forward, backward, clipping and update."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas, kind = (config.beta1, config.beta2), OPTIMIZERS[optimizer]
    adamw = torch.optim.AdamW(groups, betas=betas, eps=config.eps, **kind)
    loss_of = torch.compile(model) if compiled else model

    def step(x: np.ndarray, y: np.ndarray, lr: float) -> float:
        for group in adamw.param_groups:
            group["lr"] = lr
        loss = loss_of(torch.from_numpy(x).long(), torch.from_numpy(y).long())
        loss.backward()
        nn.utils.clip_grad_norm_(params, config.grad_clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Decoder:
    """A model with a cache for B sequences: only new tokens are computed."""

    def __init__(self, model: GPT, batch_size: int = 1) -> None:
        config, self.model = model.config, model
        shape = (batch_size, config.n_head, config.block_size, config.head_size)
        self.caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.n_layer)]

    @torch.inference_mode()
    def logits(self, tokens: Tensor, position: int) -> Tensor:
        """Logits (B, V) of what follows tokens (B, T), the first of them at ``position``."""
        x = self.model.hidden(tokens, self.caches, position)[:, -1]
        return functional.linear(x, self.model.wte.weight)

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest token, ``count`` times."""
        tokens, position, ids = torch.tensor([prompt]), 0, []
        for _ in range(count):
            logits = self.logits(tokens, position)
            position += tokens.shape[1]
            tokens = logits.argmax(-1, keepdim=True)
            ids.append(int(tokens.item()))
        return ids
