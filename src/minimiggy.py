"""TinyGPT under the name ``minimiggy``: ``from minimiggy import GPT, GPTConfig, train``."""

from tinygpt import *  # noqa: F403
from tinygpt import __all__ as __all__
