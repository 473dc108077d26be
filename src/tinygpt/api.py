"""What users import: a GPT with the methods they expect, ``train`` and ``load``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from tinygpt import machine
from tinygpt.config import (
    ADAPTERS,
    MAX_CHAT_TOKENS,
    GPTConfig,
    Precision,
    SampleConfig,
    TrainConfig,
)
from tinygpt.errors import TokenizerError, UsageError
from tinygpt.files.atomic import user_path
from tinygpt.generation import decoder, generate
from tinygpt.generation.dialogue import answer_to
from tinygpt.interop.hf import pretrained
from tinygpt.machine import precision
from tinygpt.machine.ranks.join import join
from tinygpt.model import int8 as quantization
from tinygpt.model import lora
from tinygpt.model.half import halve
from tinygpt.model.transformer import Transformer
from tinygpt.runs import checkpoint
from tinygpt.runs.display import follow
from tinygpt.runs.folder import checkpoint_path, choose_checkpoint
from tinygpt.runs.run import TrainingRun, TrainResult
from tinygpt.text.chat.template import template_of
from tinygpt.text.chat.window import ask
from tinygpt.text.tokenizers import Tokenizer, check_readable, ends_of, tokenizer_from_dict
from tinygpt.text.tokens import load_tokens
from tinygpt.untrusted import brief

TokenSource = npt.NDArray[np.integer[Any]] | Sequence[int] | Tensor | str | Path


class GPT(Transformer):
    """A GPT: call it on tokens for logits, or let it generate.

    >>> model = GPT(GPTConfig(vocab_size=65))
    >>> logits = model(Tensor([[1, 2, 3]], dtype="int32"))         # (1, 3, 65)
    >>> longer = model.generate(Tensor([[1, 2, 3]], dtype="int32"), max_tokens=10)  # (1, 13)
    """

    def __init__(self, config: GPTConfig, seed: int | None = 1337) -> None:
        machine.start()
        super().__init__(config, seed)
        self.decoder = decoder.Decoder(self)
        self.limit: int | None = None
        """Ids from here on are never generated; None for as many as the vocabulary has rows."""
        self.ends: tuple[int, ...] = ()
        """Ids that end a text; generation stops there."""

    def speaks(self, tokenizer: Tokenizer | None) -> Self:
        """Generate what this tokenizer can decode, and stop where its texts end.

        ``load``, ``load_pretrained`` and ``train`` do this with the tokenizer that they know.
        """
        self.limit = None if tokenizer is None else tokenizer.vocab_size
        self.ends = ends_of(tokenizer)
        return self

    @property
    def origin(self) -> dict[str, Any] | None:
        """The checkpoint that the weights are from, as ``checkpoint.Meta.init`` has it.

        None if they are from none, or were changed since. Asking reads all weights.
        """
        return checkpoint.origin_of(self)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Self:
        """A GPT-2 from Hugging Face in inference mode; see ``load_pretrained`` for its tokenizer.

        ``source`` is a folder, a .safetensors file in one, or a name: gpt2, gpt2-medium,
        gpt2-large, gpt2-xl, distilgpt2, owner/name. A short name is never a folder, but ``./gpt2``
        is; ``revision`` is a commit, tag or branch of the hub. Raises InteropError.
        """
        found = pretrained.open_pretrained(source, revision=revision)
        model = cls(found.config, seed=None)
        pretrained.load_weights(model, found)
        model.ends = found.ends
        return model.eval()

    def generate(
        self,
        idx: Tensor,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Tensor:
        """Continue the prompts idx (B, T) by up to ``max_tokens``; -> int32 (B, T + new).

        Prompts and texts may be longer than block_size: the model then sees the last block_size
        tokens. ``stop`` is a token id, several, or sequences of ids; one ``seed`` gives one text.
        Where the model's tokenizer is known (see ``speaks``), a text also stops behind the token
        that ends it, unless ``ignore_eos``; shorter texts of a batch are filled up with it.
        Dropout is off. Raises UsageError if the prompt is empty or an id is out of range.
        """
        config = SampleConfig(temperature, top_k, top_p, min_p, repetition_penalty)
        ends = () if ignore_eos else self.ends
        return generate.generate(
            self.decoder, idx, max_tokens, config, seed, stop, limit=self.limit, ends=ends
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer | None,
        max_tokens: int = MAX_CHAT_TOKENS,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer to a conversation, piece by piece as it is written.

        ``messages`` have a role (system, user or assistant) and a content, as OpenAI's do. They are
        given to the model by the template that is kept with ``tokenizer``; where they fill the
        window the oldest turns leave. The answer ends with its turn, before a text in ``stop``, or
        after ``max_tokens`` tokens. One ``seed`` gives one answer.

        >>> model, tokenizer = load("runs/talker")
        >>> for piece in model.chat([{"role": "user", "content": "17 + 25?"}], tokenizer):
        ...     print(piece, end="", flush=True)

        Raises UsageError where there is no template, DataError for what is no message, and
        TokenizerError for a character that the vocabulary lacks.
        """
        if template_of(tokenizer) is None or tokenizer is None:
            raise UsageError(
                "This model has no chat template: it was not made for conversations. Train it on "
                "some (tinygpt train CHATS.jsonl, or with --init), or continue plain text with "
                "generate. To ask it all the same, give tokenizer.with_template(PLAIN.to_dict()), "
                "PLAIN being in tinygpt.text.chat.template."
            )
        config = SampleConfig(temperature, top_k, top_p, min_p, repetition_penalty)
        asked = ask(tokenizer, messages, self.config.block_size, max_tokens)
        stops = [stop] if isinstance(stop, str) else stop
        return answer_to(asked, self.decoder, tokenizer, max_tokens, config, seed, stops)

    def quantize(self, kind: Literal["int8", "int4"] = "int8") -> Self:
        """Round the weights, in place: for generation only, see ``quantize.quantize``."""
        self.decoder = decoder.Decoder(self)  # the one before holds on to the weights before
        return quantization.quantize(self, kind=kind)

    def cast(self, dtype: Precision) -> Self:
        """Round the weights to bfloat16 or float16, in place: for generation only, see ``half``."""
        self.decoder = decoder.Decoder(self)
        return halve(self, dtype)

    def save_checkpoint(
        self,
        iter_num: int,
        optimizer: Optimizer | None = None,
        folder: str | Path = "checkpoints",
        *,
        tokenizer: Tokenizer | None = None,
    ) -> Path:
        """Write ``folder/ckpt_{iter_num}.safetensors`` atomically and return its path.

        It holds the weights, the optimizer's state if one is given, and all that ``load`` needs.
        """
        if type(iter_num) is not int or not 0 <= iter_num < 2**63:
            raise UsageError(f"iter_num={brief(iter_num)} is not a step number, 0 or above.")
        if any(name.endswith(ADAPTERS) for name in self.parameters()):
            raise UsageError("This model has adapters: lora.merge(model) makes it a plain one.")
        if tokenizer is not None:
            check_readable(tokenizer)
        described = None if tokenizer is None else tokenizer.to_dict()
        meta = checkpoint.Meta(iter_num, self.config, tokenizer=described)
        path = checkpoint_path(folder, iter_num)
        return checkpoint.save(path, self, optimizer, meta)

    def load_checkpoint(self, path: str | Path, optimizer: Optimizer | None = None) -> int:
        """Read weights, and the optimizer's state if one is given, into place; -> the step number.

        Raises CheckpointError if the file is damaged, or of a model with another config.
        """
        meta = checkpoint.load(path, self, optimizer)
        if meta.tokenizer is not None:
            with suppress(TokenizerError):  # a vocabulary that would have to be fetched
                self.speaks(tokenizer_from_dict(meta.tokenizer))
        return meta.iter_num


def train(
    model: Transformer,
    train_config: TrainConfig,
    train_data: TokenSource,
    val_data: TokenSource | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    optimizer: Optimizer | None = None,
    out_dir: str | Path | None = None,
    resume: bool | str | Path | None = None,
    allow_change: Sequence[str] = (),
    show: bool = True,
) -> TrainResult:
    """Train a model on token ids: an array, a list, a Tensor or the path of a token file.

    With ``out_dir`` the run keeps its metrics, samples and checkpoints there, and ``resume=True``
    goes on from its newest checkpoint. A resumed run must have its own data and settings, but for
    those named in ``allow_change``, such as ``("max_iters",)``. ``show`` prints progress on stderr.
    What adapters learn, with ``lora_rank``, is in the model's own weights when this returns.

    Ctrl-C ends it after the step in progress, with a checkpoint, and is a KeyboardInterrupt then;
    a second one is at once. SIGTERM and SIGHUP wait as long: see ``interrupts.held_back``.

    In a program that mpiexec has started several times the processes train one model, see
    docs/machines.md.

    >>> result = train(model, TrainConfig(max_iters=1000), tokens)
    >>> result.iter_num, result.best_val_loss
    """
    vocab = model.config.vocab_size
    if isinstance(model, GPT) and tokenizer is not None:
        model.speaks(tokenizer)
    tokens = load_tokens(train_data, vocab)
    held_out = None if val_data is None else load_tokens(val_data, vocab)
    with join().together() as ranks:
        run = TrainingRun(
            model,
            train_config,
            tokens,
            held_out,
            tokenizer=tokenizer,
            optimizer=optimizer,
            folder=out_dir,
            resume=resume,
            allow_change=allow_change,
            init=checkpoint.origin_of(model),
            ranks=ranks,
        )
        try:
            follow(run, show=show and ranks.first)
        finally:
            lora.merge(model)
    return run.result


def load(
    path: str | Path,
    quantize: Literal["int8", "int4", False] | None = None,
    dtype: Precision = "float32",
    kv: Literal["int8"] | None = None,
) -> tuple[GPT, Tokenizer | None]:
    """A model in inference mode and its tokenizer, from a checkpoint or a run folder alone.

    Of a run folder the best checkpoint is taken, or else the newest. With ``quantize`` its weights
    are rounded as they are read: the model can write, in a quarter of the memory (int8) or an
    eighth (int4), but not learn. None and False leave them as they are; anything else is a
    UsageError. The same holds for a
    ``dtype`` of bfloat16 or float16, which takes half of the memory; only one of the two is taken.
    With ``kv`` the keys and values that its decoder keeps are rounded: a quarter of that memory.
    """
    precision.type_of(dtype)
    if not (quantize is None or quantize is False or quantize in ("int8", "int4")):
        raise UsageError(
            f"quantize={quantize!r} is not known. Wanted: 'int8', 'int4', or None for "
            f"weights as they are."
        )
    if quantize and dtype != "float32":
        raise UsageError(
            f'Weights are rounded once: give quantize="{quantize}" or dtype="{dtype}", not both.'
        )
    if kv not in (None, "int8"):
        raise UsageError(
            f"kv={kv!r} is not known. Wanted: 'int8', or None for the model's own type."
        )
    chosen = choose_checkpoint(user_path(path))
    meta = checkpoint.read_meta(chosen)
    model = GPT(meta.model, seed=None)
    model.cache_type = None if kv is None else dtypes.int8
    if not quantize and dtype == "float32":
        checkpoint.load(chosen, model, by_stamp=True)
    else:
        with checkpoint.weights(chosen, model) as fetch:
            if quantize:
                quantization.quantize(model, fetch, quantize)
            else:
                halve(model, dtype, fetch)
    tokenizer = None if meta.tokenizer is None else tokenizer_from_dict(meta.tokenizer)
    return model.speaks(tokenizer).eval(), tokenizer


def load_pretrained(
    source: str | Path, revision: str | None = None
) -> tuple[GPT, Tokenizer | None]:
    """``GPT.from_pretrained``, and the tokenizer that lies beside the weights, if any."""
    tokenizer = pretrained.open_pretrained(source, revision=revision).tokenizer
    model = GPT.from_pretrained(source, revision)
    return (model if tokenizer is None else model.speaks(tokenizer)), tokenizer
