"""Runs as training writes them, with figures that are made up, for the tests of the dashboard."""

import json
import math
import random
from pathlib import Path

LAYERS = ("wte", "wpe", "h.0", "h.1", "ln_f")
CONFIG = """\
[model]
n_layer = 2
n_embd = 64

[train]
learning_rate = {rate}
max_iters = {planned}
seed = {seed}
sample_prompt = {prompt}
"""


def rows(first, last, seed=0, every=50):
    """The rows of some steps; those of another seed differ in every one."""
    draw = random.Random(seed * 1_000_003 + first)
    for step in range(first, last + 1):
        row = {"iter": step, "train_loss": 1 + 3 * math.exp(-step / 200) + draw.gauss(0, 0.05)}
        if step % every == 0:
            row |= {"val_loss": 1.1 + 3 * math.exp(-step / 200), "best": True}
        norm = 0.5 + abs(draw.gauss(0, 0.1))
        yield row | {
            "lr": 1e-3 * min(1, step / 100),
            "grad_norm": norm,
            "tokens_per_second": 10_000 + draw.gauss(0, 100),
            "elapsed": step * 0.1 + draw.random() * 0.01,
            "memory": 3e8,
            "grad_norms": {name: norm / (i + 2) for i, name in enumerate(LAYERS)},
        }


def lines(found):
    return "".join(json.dumps(row) + "\n" for row in found)


def make_run(folder, steps, planned=None, seed=0, rate=1e-3, prompt="", every=50):
    """-> a run folder with so many steps of those that were planned"""
    folder = Path(folder)
    folder.mkdir(parents=True)
    text = CONFIG.format(rate=rate, planned=planned or steps, seed=seed, prompt=json.dumps(prompt))
    (folder / "config.toml").write_text(text)
    (folder / "metrics.jsonl").write_text(lines(rows(1, steps, seed, every)))
    samples = [
        {"iter": n, "text": f"{prompt}text of step {n}"} for n in range(every, steps + 1, every)
    ]
    (folder / "samples.jsonl").write_text(lines(samples))
    return folder


def add(folder, text):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)
