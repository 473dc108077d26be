"""TinyGPT under the name ``gpt``: ``from gpt import GPT, GPTConfig, train``."""

from tinygpt import *  # noqa: F403
from tinygpt import __all__ as __all__
