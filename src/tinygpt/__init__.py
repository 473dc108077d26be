"""TinyGPT: a lightweight GPT on tinygrad.

>>> from tinygpt import GPT, GPTConfig, TrainConfig, train
>>> model = GPT(GPTConfig(vocab_size=65))
>>> train(model, TrainConfig(max_iters=100), tokens)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygpt.api import GPT as GPT
    from tinygpt.api import load as load
    from tinygpt.api import load_pretrained as load_pretrained
    from tinygpt.api import train as train
    from tinygpt.config import PRESETS as PRESETS
    from tinygpt.config import GPTConfig as GPTConfig
    from tinygpt.config import SampleConfig as SampleConfig
    from tinygpt.config import TrainConfig as TrainConfig
    from tinygpt.config import __version__ as __version__
    from tinygpt.errors import TinyGPTError as TinyGPTError
    from tinygpt.runs.run import TrainResult as TrainResult
    from tinygpt.text.tokenizers import BPETokenizer as BPETokenizer
    from tinygpt.text.tokenizers import ByteTokenizer as ByteTokenizer
    from tinygpt.text.tokenizers import CharTokenizer as CharTokenizer
    from tinygpt.text.tokenizers import Tokenizer as Tokenizer
    from tinygpt.training.gradcheck import gradcheck as gradcheck
    from tinygpt.training.loop import Step as Step
    from tinygpt.training.loop import train_steps as train_steps
    from tinygpt.training.optim import AdamW as AdamW
    from tinygpt.training.optim import Muon as Muon

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
    "TrainResult": "runs.run",
    "BPETokenizer": "text.tokenizers",
    "ByteTokenizer": "text.tokenizers",
    "CharTokenizer": "text.tokenizers",
    "Tokenizer": "text.tokenizers",
    "gradcheck": "training.gradcheck",
    "Step": "training.loop",
    "train_steps": "training.loop",
    "AdamW": "training.optim",
    "Muon": "training.optim",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command line answers before tinygrad loads.

    The first one also starts the machine, best before tinygrad is imported.
    """
    if name == "__version__":
        return import_module("tinygpt.config").__version__
    if name not in _HOMES:
        raise AttributeError(f"module 'tinygpt' has no attribute {name!r}")
    import_module("tinygpt.machine").start()
    return getattr(import_module(f"tinygpt.{_HOMES[name]}"), name)
