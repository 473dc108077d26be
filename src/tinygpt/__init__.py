"""TinyGPT: a lightweight GPT on tinygrad.

>>> from tinygpt import GPT, GPTConfig, TrainConfig, train
>>> model = GPT(GPTConfig(vocab_size=65))
>>> train(model, TrainConfig(max_iters=100), tokens)
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tinygpt import runtime

runtime.prepare()  # before anything imports tinygrad

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tinygpt.api import GPT as GPT
    from tinygpt.api import load as load
    from tinygpt.api import load_pretrained as load_pretrained
    from tinygpt.api import train as train
    from tinygpt.config import PRESETS as PRESETS
    from tinygpt.config import GPTConfig as GPTConfig
    from tinygpt.config import SampleConfig as SampleConfig
    from tinygpt.config import TrainConfig as TrainConfig
    from tinygpt.errors import TinyGPTError as TinyGPTError
    from tinygpt.gradcheck import gradcheck as gradcheck
    from tinygpt.optim import AdamW as AdamW
    from tinygpt.runs import TrainResult as TrainResult
    from tinygpt.tokenizers import BPETokenizer as BPETokenizer
    from tinygpt.tokenizers import ByteTokenizer as ByteTokenizer
    from tinygpt.tokenizers import CharTokenizer as CharTokenizer
    from tinygpt.tokenizers import Tokenizer as Tokenizer
    from tinygpt.train import Step as Step
    from tinygpt.train import train_steps as train_steps

_HOMES = {
    "GPT": "api",
    "load": "api",
    "load_pretrained": "api",
    "train": "api",
    "GPTConfig": "config",
    "SampleConfig": "config",
    "TrainConfig": "config",
    "PRESETS": "config",
    "TinyGPTError": "errors",
    "gradcheck": "gradcheck",
    "AdamW": "optim",
    "TrainResult": "runs",
    "BPETokenizer": "tokenizers",
    "ByteTokenizer": "tokenizers",
    "CharTokenizer": "tokenizers",
    "Tokenizer": "tokenizers",
    "Step": "train",
    "train_steps": "train",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command line answers before tinygrad loads."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tinygpt' has no attribute {name!r}")
    return getattr(import_module(f"tinygpt.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """``train`` and ``gradcheck`` are modules here too, but from outside the functions are meant.

    A property stands before what the import of a submodule would set.
    """

    train = property(lambda _: __getattr__("train"), lambda _, module: None)
    gradcheck = property(lambda _: __getattr__("gradcheck"), lambda _, module: None)


sys.modules[__name__].__class__ = _Package
