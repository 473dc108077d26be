"""Text out: a decoder that feeds the model one token at a time, and the loops around it.

``generate_tokens`` and ``generate_text`` are generators: streaming, saving and stopping early are
up to whoever iterates.
"""

from tinygpt.generate.decoder import Decoder
from tinygpt.generate.text import StopStrings, first_prompt, generate_text
from tinygpt.generate.tokens import FINISHED, generate, generate_tokens

__all__ = [
    "FINISHED",
    "Decoder",
    "StopStrings",
    "first_prompt",
    "generate",
    "generate_text",
    "generate_tokens",
]
