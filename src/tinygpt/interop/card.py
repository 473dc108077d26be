"""The model card: the README.md of an exported folder, with the figures of its run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tinygpt.config import __version__
from tinygpt.runs.checkpoint import Meta
from tinygpt.training.metrics import perplexity
from tinygpt.untrusted import clip

FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, tinygpt]
---
"""
LOAD = """## Use

```python
from transformers import AutoModelForCausalLM{more}

model = AutoModelForCausalLM.from_pretrained({name!r})
"""
WRITE = """tokenizer = AutoTokenizer.from_pretrained({name!r})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50, do_sample=True)[0]))
"""
BACK = """```

Back to a run of TinyGPT, to train it further: `tinygpt import hf FOLDER --out runs/new`
"""


@dataclass(frozen=True)
class Parity:
    """How it was proved that another program computes the same from what was written."""

    difference: float
    """The largest one of two logits."""
    tolerance: float
    reader: str
    """The other program."""
    tokens: int
    """Positions that were compared, in all of the vocabulary."""

    def __str__(self) -> str:
        return f"largest logit difference to {self.reader}: {self.difference:.2g}"


def model_card(
    name: str, meta: Meta, parity: Parity, source: str | None = None, tokenizer: bool = True
) -> str:
    """The text, in Markdown.

    ``source`` is the name of the text that the model learned from; ``tokenizer`` says whether its
    files are in the folder too.
    """
    rows = "\n".join(f"| {title} | {_cell(value)} |" for title, value in _figures(meta, source))
    more, write = (", AutoTokenizer", WRITE) if tokenizer else ("", "")
    train = {} if meta.train is None else meta.train.to_dict()
    settings = "\n".join(f"{name} = {value}" for name, value in train.items())
    blocks = [
        FRONT + f"# {_cell(name)}",
        f"A GPT-2, written by TinyGPT {__version__}.",
        f"## Figures\n\n| | |\n| --- | --- |\n{rows}",
        *([f"## Training settings\n\n```text\n{settings}\n```"] if settings else []),
        f"## Parity\n\nThe folder was read back by {parity.reader} before it was handed out, and "
        f"its logits were compared with TinyGPT's on {parity.tokens} tokens from all over the "
        f"vocabulary. The largest difference is {parity.difference:.3g}, and "
        f"{parity.tolerance:g} is allowed.",
        *([] if meta.model.bias else [NO_BIAS]),
        (LOAD + write).format(name=name, more=more) + BACK,
    ]
    return "\n\n".join(blocks)


NO_BIAS = (
    "The model was trained without biases. GPT-2 in transformers always has them: here they are "
    "all zero, which computes the same."
)


def _figures(meta: Meta, source: str | None) -> Iterator[tuple[str, object]]:
    model, progress, data = meta.model, meta.progress, meta.data or {}
    yield "parameters", f"{model.num_params():,}"
    yield "layers, heads, width", f"{model.n_layer}, {model.n_head}, {model.n_embd}"
    yield "context", f"{model.block_size:,} tokens"
    yield "vocabulary", f"{model.vocab_size:,} tokens"
    yield "embeddings", "tied" if model.tie_embeddings else "untied"
    yield "steps", f"{meta.iter_num:,}"
    best = progress.get("best_val_loss")
    if best is not None:
        yield "best validation loss", f"{best:.4f} (perplexity {perplexity(best):.2f})"
        yield "reached at step", f"{progress.get('best_iter', 0):,}"
    if source is not None:
        yield "text", source
    for part, title in (("train", "training tokens"), ("val", "validation tokens")):
        if part in data:
            yield f"{title}, SHA-256", data[part]
    imported = progress.get("imported")
    if isinstance(imported, dict):
        yield "imported from", imported.get("source", "")
        if "commit" in imported:
            yield "commit", f"{imported.get('repository')} {imported['commit']}"


def _cell(value: object) -> str:
    """A value that stays within its cell, whatever somebody called his file."""
    return re.sub(r"([\\`*_|<>\[\]#!])", r"\\\1", clip(value))
