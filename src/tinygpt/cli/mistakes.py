"""What an exception means for the user: a message with advice, and an exit code."""

from __future__ import annotations

import re

from cyclopts import (
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from tinygpt.cli.console import FAILURE, WRONG_USE
from tinygpt.errors import TinyGPTError

DEBUG = "TINYGPT_DEBUG"
"""Set to 1, this environment variable does what --debug does: errors come with their traceback."""

MEANT = {
    "--learning-rate": "lr rate max-lr",
    "--max-iters": "epochs steps iters iterations num-steps max-steps num-train-epochs",
    "--n-layer": "layers num-layers n-layers depth num-hidden-layers",
    "--n-head": "heads num-heads n-heads num-attention-heads",
    "--n-embd": "width dim embed-dim embedding-size hidden-size d-model n-embed",
    "--block-size": "context context-length context-size seq-len sequence-length max-length ctx",
    "--dropout": "dropout-rate dropout-prob p-dropout",
    "--batch-size": "batch bs micro-batch-size per-device-train-batch-size",
    "--warmup-steps": "warmup warmup-iters",
    "--grad-clip": "clip max-grad-norm gradient-clipping",
    "--grad-accum-steps": "gradient-accumulation-steps accumulate accum",
    "--weight-decay": "wd decay-rate",
    "--early-stop-patience": "patience early-stopping",
    "--eval-interval": "eval-steps eval-every eval-freq",
    "--checkpoint-interval": "save-steps save-every save-interval",
    "--val-fraction": "val-split validation-split test-size",
    "--lora-rank": "lora rank lora-r",
    "--init": "base base-model model from-pretrained pretrained weights checkpoint",
    "--out": "output output-dir out-dir o save-dir",
    "--max-tokens": "max-new-tokens length n-tokens num-tokens max-length tokens",
    "--temperature": "temp t",
    "--repetition-penalty": "repeat-penalty",
    "--count": "num-samples num-return-sequences samples",
    "--interactive": "chat",
    "--stop": "stop-string stop-sequence",
    "--dtype": "precision half fp16 bf16 float16 bfloat16 torch-dtype mixed-precision",
    "--quantize": "int8 int4 quant quantization load-in-8bit",
    "--threads": "cores num-threads cpus jobs j",
}
"""What other programs call a flag of ours."""
OTHER_VERBS = {
    "generate": "sample write complete predict run",
    "train": "fit learn finetune fine-tune",
    "serve": "server api web",
    "dashboard": "watch monitor ui",
    "info": "show inspect describe",
    "eval": "evaluate test score",
    "compare": "diff",
    "doctor": "check-install status",
}
"""What other programs call a verb of ours."""


def explain(program: str, error: Exception) -> tuple[str, int]:
    """-> the message and the exit code of any exception"""
    if isinstance(error, CycloptsError):
        return _wrong_use(program, error), WRONG_USE
    if isinstance(error, TinyGPTError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return (
            "There is not enough memory. Make the model or its batches smaller: "
            "--batch-size, --block-size, --n-embd, --n-layer."
        ), FAILURE
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}.", FAILURE
    return (
        f"{type(error).__name__}: {error}\n"
        f"This should not happen. Run it again with --debug, or {DEBUG}=1, for the traceback."
    ), FAILURE


def _wrong_use(program: str, error: CycloptsError) -> str:
    """What was wrong with the arguments, and where the right ones are listed."""
    message = str(error)
    if isinstance(error, UnknownOptionError):
        word = (error.token.keyword or error.token.value).partition("=")[0]
        known = {name for argument in error.argument_collection for name in argument.names}
        if flag := _meant(MEANT, re.sub(r"^-+(\w+\.)?", "", word), known):
            message = f"Unknown option: {word}. Did you mean {flag}?"
    elif isinstance(error, UnknownCommandError) and error.unused_tokens:
        word = error.unused_tokens[0]
        if verb := _meant(OTHER_VERBS, word, set(OTHER_VERBS)):
            message = f"Unknown command {word!r}. Did you mean {verb!r}?"
    elif isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        message = f"Unexpected argument {error.unused_tokens[0]!r}."
    elif isinstance(error, MissingArgumentError) and error.argument is not None:
        keyword = error.keyword or next((t.keyword for t in error.argument.tokens if t.keyword), "")
        wanted = f"{keyword} needs a value" if keyword else f"{error.argument.name} is missing"
        _, suggestion, rest = message.partition(" Did you mean ")
        message = f"{wanted}.{suggestion}{rest}"
    command = " ".join([program, *(error.command_chain or ())])
    return f"{message}\nTry: {command} --help"


def _meant(table: dict[str, str], word: str, known: set[str]) -> str | None:
    """The name of ours, if it is ``known`` here, for what others call ``word``."""
    spelled = word.lower().replace("_", "-")
    return next((ours for ours in table if ours in known and spelled in table[ours].split()), None)
