"""Settings: plain, frozen, complete, and checked once, when they are made.

The text under each field is its documentation everywhere: in ``--help``, in the resolved
``config.toml`` of a run and in the reference.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

from tinygpt.config.devices import device_names
from tinygpt.config.weights import weights
from tinygpt.errors import ConfigError, nearest
from tinygpt.files.strict_json import to_json
from tinygpt.untrusted import LARGEST, brief, clip, parse_toml, read_bounded

__version__ = "0.1.0"

AttentionMethod = Literal["auto", "flash", "plain"]
"""How attention is computed, see ``GPTConfig.attention``."""
Precision = Literal["float32", "bfloat16", "float16"]
"""The types that products and attention can be computed in, see ``TrainConfig.dtype``."""
PRECISIONS: tuple[str, ...] = get_args(Precision)
AdaptedLayers = Literal["all", "attn", "mlp"]
"""The linear layers that LoRA adapts, see ``TrainConfig.lora_layers``."""
ADAPTERS = (".lora_a", ".lora_b")
"""How the names of LoRA's matrices end; they begin with the layer's."""

MAX_PARAMETERS = 20_000_000_000
"""Beyond this a configuration is taken for a slip and refused before anything is allocated."""
MAX_LAYERS = 1024
"""Blocks cost time to build, however few parameters they have."""
MAX_CONFIG_BYTES = 1 << 16
"""A larger file is no config: it is not read, and settings that need it are not written."""


class Config:
    """What the configs share: checks at birth, and conversion to and from plain dictionaries."""

    def __post_init__(self) -> None:
        _check_types(self)
        self.check()

    def check(self) -> None:
        """Raise ConfigError if a value cannot work."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, in order."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    @functools.cache
    def hints(cls) -> Mapping[str, Any]:
        """The type of each field."""
        return get_type_hints(cls)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; an unknown key is an error that names the nearest field."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise ConfigError(
                    f"{cls.__name__} has no field {brief(key)}.{nearest(str(key)[:99], names)} "
                    f"Known fields: {', '.join(names)}."
                )
        return cls(**values)


def _check_types(config: Config) -> None:
    """Types are checked by hand: a config often comes from a file or a command line."""
    hints = config.hints()
    for field in fields(config):  # type: ignore[arg-type]
        value, hint = getattr(config, field.name), hints[field.name]
        options = get_args(hint) or (hint,)
        if value is None and type(None) in options:
            continue
        options = get_args(options[0]) or options
        if isinstance(options[0], str):  # Literal["cosine", ...], alone or with None
            if value not in options:
                listed = ", ".join(map(repr, options))
                raise ConfigError(f"{field.name}={brief(value)} is not one of {listed}.")
            continue
        if type(value) is int and abs(value) > LARGEST:
            raise ConfigError(f"{field.name} is {brief(value)}, which is too large.")
        if float in options and type(value) is int:
            object.__setattr__(config, field.name, float(value))
            value = float(value)
        if type(value) not in options:
            wanted = " or ".join("None" if o is type(None) else o.__name__ for o in options)
            raise ConfigError(
                f"{field.name}={brief(value)} is of type {type(value).__name__}; wanted {wanted}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name}={value!r} is not a finite number.")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _at_least(config: Config, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value >= low, f"{name}={value!r} is too small: it must be at least {low}.")


def _between(config: Config, low: float, high: float, *names: str) -> None:
    """low <= value < high"""
    for name in names:
        value = getattr(config, name)
        _require(
            low <= value < high,
            f"{name}={value!r} is out of range: it must be at least {low} and less than {high}.",
        )


@dataclass(frozen=True)
class GPTConfig(Config):
    """The shape of a GPT-2 style transformer.

    >>> GPTConfig(n_embd=130, n_head=4)
    Traceback (most recent call last):
    ...
    tinygpt.errors.ConfigError: n_embd=130 is not divisible by n_head=4. Try n_embd=128 or n_head=5.
    """

    block_size: int = 64
    """Longest context, in tokens."""
    vocab_size: int = 50257
    """Number of different tokens; it must match the tokenizer."""
    n_layer: int = 4
    """Number of transformer blocks."""
    n_head: int = 4
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 128
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping an activation while training, from 0 up to (not including) 1."""
    bias: bool = True
    """Biases in the linear layers and layer norms, as in GPT-2."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection too, as in GPT-2."""
    attention: AttentionMethod = "auto"
    """The way it is computed: by flash kernels, the plain formula, or auto, flash if it can run."""

    def check(self) -> None:
        _at_least(self, 1, "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        _between(self, 0.0, 1.0, "dropout")
        _require(
            self.n_layer <= MAX_LAYERS,
            f"n_layer={self.n_layer} is too large: the limit is {MAX_LAYERS}.",
        )
        count = self.num_params()
        _require(
            count <= MAX_PARAMETERS,
            f"This configuration has {count:,} parameters, more than the {MAX_PARAMETERS:,} that "
            f"are allowed. Lower n_layer, n_embd, vocab_size or block_size.",
        )
        if self.n_embd % self.n_head:
            width = max(self.n_embd // self.n_head, 1) * self.n_head
            heads = (
                next(h for h in range(self.n_head, self.n_embd + 1) if self.n_embd % h == 0)
                if self.n_head <= self.n_embd
                else self.n_embd
            )
            raise ConfigError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}. "
                f"Try n_embd={width} or n_head={heads}."
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head, D = C / H."""
        return self.n_embd // self.n_head

    @property
    def n_inner(self) -> int:
        """Width inside of an MLP."""
        return 4 * self.n_embd

    def num_params(self) -> int:
        """Number of parameters a model of this shape has; tied embeddings count once."""
        return sum(weight.size for weight in weights(self))


@dataclass(frozen=True)
class TrainConfig(Config):
    """How a model is trained. The defaults are Adam with warm-up and cosine decay."""

    batch_size: int = 8
    """Sequences in one micro-batch."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""
    max_iters: int = 1000
    """Number of optimizer steps."""
    eval_interval: int = 100
    """Steps between evaluations on the validation data."""
    eval_iters: int = 20
    """Batches in one evaluation."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    decay: Literal["cosine", "linear", "sqrt", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; sqrt is one minus the root of the progress."""
    decay_start: float = 0.0
    """Share of the steps after the warm-up at the full rate, before the decay begins."""
    optimizer: Literal["adam", "muon"] = "adam"
    """How weights change: by Adam, or the blocks' matrices by Muon and the rest by Adam."""
    muon_learning_rate: float = 0.02
    """Muon's peak learning rate; it rises and decays as learning_rate does."""
    muon_momentum: float = 0.95
    """Muon's decay rate of the mean of the gradients."""
    beta1: float = 0.9
    """Adam's decay rate of the first moment."""
    beta2: float = 0.999
    """Adam's decay rate of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon, added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) of matrices and embeddings, with Muon of what it changes."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    grad_accum_steps: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    wire: Literal["float32", "bfloat16"] = "float32"
    """How ranks send gradients; with bfloat16 half as much, and other bits for other numbers."""
    sync_every: int | None = None
    """Steps that ranks take apart before they meet (DiLoCo); if not set, they share each step."""
    recompute: bool = False
    """Compute each block's activations again for the backward pass: less memory, longer steps."""
    dtype: Precision = "float32"
    """Type of products and attention; weights, moments, norms, softmax and loss stay float32."""
    skip_spikes: float | None = None
    """Skip a step whose loss or norm is so many deviations above 128 others; if not set, none."""
    max_skipped: int = 10
    """Stop when so many steps in a row had to be skipped."""
    seed: int = 1337
    """Seed of initial weights, batches and dropout."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints; if not set, one at every evaluation."""
    keep_last: int = 3
    """Newest checkpoints to keep, besides the best one; 0 keeps all."""
    early_stop_patience: int | None = None
    """Stop after this many evaluations without a better validation loss; if not set, never."""
    sample_interval: int | None = None
    """Steps between sample texts; if not set, one at every evaluation."""
    sample_prompt: str = "\n"
    """Prompt of the sample texts."""
    freeze: int | None = None
    """Freeze the embeddings and so many of the first blocks; if not set, nothing."""
    lora_rank: int | None = None
    """Train adapters of this rank (LoRA) and freeze the rest; if not set, none. 8 is usual."""
    lora_alpha: float = 16.0
    """What adapters compute is multiplied by lora_alpha / lora_rank."""
    lora_layers: AdaptedLayers = "all"
    """The linear layers that get adapters: of attention (attn), of the MLP (mlp), or all."""
    devices: int | str | None = None
    """Devices that share each micro-batch: a number, or a list like CL:0,CL:1; if not set, one."""
    shard_optimizer: bool = False
    """Divide the optimizer's moments among the devices or ranks (ZeRO-1)."""

    @property
    def n_devices(self) -> int:
        """The number of devices that share a micro-batch."""
        return len(device_names(self.devices))

    def check(self) -> None:
        _at_least(
            self,
            1,
            "batch_size",
            "max_iters",
            "eval_interval",
            "eval_iters",
            "grad_accum_steps",
            "sync_every",
            "max_skipped",
            "checkpoint_interval",
            "early_stop_patience",
            "sample_interval",
            "lora_rank",
        )
        _at_least(
            self,
            0,
            "warmup_steps",
            "min_lr",
            "weight_decay",
            "grad_clip",
            "seed",
            "keep_last",
            "freeze",
        )
        _between(self, 0.0, 1.0, "beta1", "beta2", "weight_decay", "muon_momentum", "decay_start")
        for name, common in (
            ("learning_rate", "between 1e-4 and 3e-3"),
            ("muon_learning_rate", "around 0.02"),
        ):
            value = getattr(self, name)
            _require(
                0 < value <= 10,
                f"{name}={value!r} is out of range: it must be above 0 and at most 10. "
                f"Common values lie {common}.",
            )
        _require(
            self.skip_spikes is None or self.skip_spikes > 0,
            f"skip_spikes={self.skip_spikes!r} must be above 0; 6 is a good value.",
        )
        _require(
            self.lora_alpha > 0,
            f"lora_alpha={self.lora_alpha!r} must be above 0; 16 is usual, whatever the rank.",
        )
        count, rows = self.n_devices, self.batch_size
        _require(
            rows % count == 0,
            f"batch_size={rows} does not divide by the {count} devices that share it. Try "
            f"batch_size={f'{rows - rows % count} or ' * (rows > count)}{rows - rows % -count}.",
        )
        _require(self.eps > 0, f"eps={self.eps!r} must be above 0; Adam's usual value is 1e-8.")
        _require(
            self.min_lr <= self.learning_rate,
            f"min_lr={self.min_lr!r} is above learning_rate={self.learning_rate!r}: "
            f"the learning rate decays from learning_rate down to min_lr.",
        )
        for name, high in (
            ("max_iters", 10**9),
            ("warmup_steps", 10**9),
            ("batch_size", 10**6),
            ("grad_accum_steps", 10**6),
            ("seed", 2**63 - 1),
            ("eval_interval", 10**9),
            ("eval_iters", 10**9),
            ("checkpoint_interval", 10**9),
            ("keep_last", 10**9),
            ("early_stop_patience", 10**9),
            ("sample_interval", 10**9),
        ):
            value = getattr(self, name)
            _require(
                value is None or value <= high,
                f"{name}={value!r} is too large: the limit is {high}.",
            )


def check_together(model: GPTConfig, train: TrainConfig) -> None:
    """ConfigError if a model of this shape cannot be trained so."""
    rank, freeze, most = train.lora_rank, train.freeze, model.n_layer
    _require(
        rank is None or rank <= model.n_embd,
        f"lora_rank={rank} is larger than n_embd={model.n_embd}: no weight of this model has a "
        f"higher rank, and adapters would only be larger than it. Try lora_rank=8.",
    )
    _require(
        freeze is None or freeze <= most,
        f"freeze={freeze} is more than the n_layer={most} blocks that the model has.",
    )
    _require(
        rank is None or freeze is None or freeze < most,
        f"With freeze={freeze} of n_layer={most} blocks frozen there is no layer left that "
        f"lora_rank={rank} could adapt. Freeze fewer.",
    )


MAX_TOKENS = 200
"""Tokens of a text, where neither the command line nor the page is given a number."""
MAX_CHAT_TOKENS = 256
"""Tokens of an answer in a chat, where nothing else is asked for: a base model seldom ends."""


@dataclass(frozen=True)
class SampleConfig(Config):
    """How the next token is chosen from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Choose among this many likeliest tokens; more than the vocabulary means all."""
    top_p: float | None = None
    """Nucleus sampling: choose among the fewest tokens whose probabilities reach this sum."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the likeliest one."""
    repetition_penalty: float | None = None
    """Above 1, makes tokens that already occurred less likely (CTRL's formula)."""

    def check(self) -> None:
        _at_least(self, 0, "temperature")
        _at_least(self, 1, "top_k")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None:
                _require(
                    0 < value <= 1,
                    f"{name}={value!r} is out of range: it must be above 0 and at most 1.",
                )
        if self.repetition_penalty is not None:
            _require(
                self.repetition_penalty > 0,
                f"repetition_penalty={self.repetition_penalty!r} must be above 0; 1 is none.",
            )


@dataclass(frozen=True)
class Preset:
    """A named starting point: a model shape, a training recipe and a tokenizer."""

    model: Mapping[str, Any]
    train: Mapping[str, Any]
    tokenizer: str
    help: str


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        model={"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128},
        train={
            "batch_size": 12,
            "learning_rate": 3e-3,
            "min_lr": 3e-4,
            "max_iters": 1000,
            "warmup_steps": 50,
            "eval_interval": 100,
            "eval_iters": 10,
            "beta2": 0.99,
            "weight_decay": 0.1,
        },
        tokenizer="bpe:512",
        help="a model that learns the manner of a text in minutes on a laptop",
    ),
    "baby": Preset(
        model={"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128},
        train={
            "batch_size": 12,
            "learning_rate": 1e-3,
            "min_lr": 1e-4,
            "max_iters": 2000,
            "warmup_steps": 100,
            "eval_interval": 250,
            "eval_iters": 20,
            "beta2": 0.99,
            "weight_decay": 0.1,
        },
        tokenizer="char",
        help="nanoGPT's configuration for a CPU: characters, 4 layers, 128 wide",
    ),
    "gpt2": Preset(
        model={"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
        train={
            "batch_size": 1,
            "learning_rate": 6e-4,
            "min_lr": 6e-5,
            "max_iters": 600_000,
            "warmup_steps": 2000,
            "eval_interval": 1000,
            "eval_iters": 200,
            "beta2": 0.95,
            "weight_decay": 0.1,
            "grad_accum_steps": 480,
        },
        tokenizer="gpt2",
        help="GPT-2 124M, for a GPU and a large text",
    ),
}


def fine_tuning(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of TrainConfig for weights that were trained before, by what was ``given`` of it.

    Weights that know much are to change little: a rate of a twentieth of that from scratch, for a
    few hundred steps. Adapters begin at zero and bear ten times as much (Hu et al., 2021, table
    11). Decay pulls adapters back to what the model was, which is well, and weights towards zero.
    """
    lora = given.get("lora_rank") is not None
    peak, steps = given.get("learning_rate"), given.get("max_iters")
    peak = peak if isinstance(peak, int | float) else 5e-4 if lora else 5e-5
    steps = steps if isinstance(steps, int) else 500
    return {
        "learning_rate": peak,
        "min_lr": peak / 10,
        "max_iters": steps,
        "warmup_steps": steps // 20,
        "eval_interval": 50,
        "weight_decay": 0.01 if lora else 0.0,
    }


def to_toml(tables: Mapping[str, Config | Mapping[str, Any]], comments: bool = False) -> str:
    """Configs and plain settings as TOML tables; None, which TOML lacks, is left as a comment.

    Raises ConfigError for settings that would not be read back as they are.
    """

    blocks = []
    for title, table in tables.items():
        notes = field_docs(type(table)) if comments and isinstance(table, Config) else {}
        values = table.to_dict() if isinstance(table, Config) else table
        lines = [f"[{title}]"]
        for name, value in values.items():
            lines += [f"# {line}" for line in notes.get(name, "").splitlines()]
            # JSON's literals are TOML's too, but for a raw DEL and surrogate pairs
            literal = to_json(value, unicode=True).replace("\x7f", "\\u007f")
            lines.append(f"# {name} is not set" if value is None else f"{name} = {literal}")
        _check_encodable(values)
        blocks.append("\n".join(lines))
    text = "\n\n".join(blocks) + "\n"
    check_toml(text)
    return text


def _check_encodable(values: Mapping[str, Any]) -> None:
    """A file holds UTF-8, and a name of a file or an argument of the command line need not be."""
    for name, value in values.items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{name}={brief(value)} cannot be written to config.toml, since it is not UTF-8. "
                f"Rename that file, or give another text."
            ) from error


def check_toml(text: str) -> None:
    """ConfigError if the readers of config.toml would refuse it."""
    size = len(text.encode())
    _require(
        size <= MAX_CONFIG_BYTES,
        f"These settings take {size:,} bytes as config.toml, and {MAX_CONFIG_BYTES:,} are the most "
        f"that are read. Shorten the longest of them, such as sample_prompt.",
    )
    try:
        parse_toml(text.encode())
    except ValueError as error:
        raise ConfigError(f"These settings cannot be read back: {clip(error)}.") from error


def read_config(path: Path) -> dict[str, Any]:
    """The tables of a config.toml; OSError or ValueError if it is none."""
    return parse_toml(read_bounded(path, MAX_CONFIG_BYTES))


def field_docs(config: type[Config]) -> Mapping[str, str]:
    """The text under each field of a config class, by name."""
    import ast
    import inspect
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, after in itertools.pairwise(tree.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[statement.target.id] = inspect.cleandoc(text)
    return docs
