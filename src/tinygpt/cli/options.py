"""From flags, a TOML file and a preset to checked configs; flags are made from config fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

from cyclopts import Group, Parameter

from tinygpt.config import (
    PRESETS,
    Config,
    GPTConfig,
    TrainConfig,
    check_together,
    field_docs,
    read_config,
    to_toml,
)
from tinygpt.config.devices import device_names
from tinygpt.errors import ConfigError, nearest
from tinygpt.runs.folder import CONFIG
from tinygpt.untrusted import clip

Values = Mapping[str, Any]
Tables = dict[str, dict[str, Any]]
"""Values that were given, by table and field: ``{"model": {"n_layer": 6}}``."""


AUTO = "auto"
"""The value of a flag that is to be found out."""
FOUND_LATER = {"vocab_size": "from the tokenizer"}
"""Defaults that the data decides, in words."""


Separator = Literal["end", "blank"]
"""What stands between documents."""


@dataclass(frozen=True)
class DataConfig(Config):
    """Where the text comes from and how it becomes tokens, and where the weights come from."""

    source: str | None = None
    """Text, folder, JSONL, Parquet or token file, a mix, or shakespeare, pydocs, auto."""
    tokenizer: str | None = None
    """gpt2, bpe:N, char, byte, or a saved tokenizer; not set means a BPE of 1024 from the text."""
    val_fraction: float = 0.1
    """Share of the text, at its end, that is kept for validation."""
    field: str = "text"
    """Field of a JSONL file, or column of a table, that holds the text."""
    glob: str = "**/*.txt"
    """Files of a folder that are read."""
    separator: Separator = "end"
    """What parts documents: end, the token <|endoftext|> where the vocabulary has it; or blank, a
    blank line."""
    markers: bool = False
    """Whether the vocabulary gets the tokens that mark the turns of a conversation; weights of
    --init get rows of the embedding for them."""
    eval_chats: str | None = None
    """JSONL file of conversations, of whose answers a sample is asked for at evaluations."""
    init: str | None = None
    """Run or checkpoint that the weights are taken from; if not set, they are random."""
    init_sha256: str | None = None
    """Hash of those weights; written down when the run begins."""
    plan: str | None = None
    """How --minutes came to these settings; written down when the run begins."""

    def check(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"val_fraction={self.val_fraction!r} is out of range: it must be at least 0 and "
                f"less than 1. 0.1 keeps a tenth for validation."
            )


CONFIGS: dict[str, type[Config]] = {"model": GPTConfig, "train": TrainConfig, "data": DataConfig}


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a training run."""

    model: Values
    """Values of GPTConfig that were given; it is made once the vocabulary is known."""
    train: TrainConfig
    data: DataConfig

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model's shape for a tokenizer of ``vocab_size``, unless another size was given."""
        given = self.model.get("vocab_size", vocab_size)
        if given < vocab_size:
            raise ConfigError(
                f"vocab_size={given} is smaller than the tokenizer's {vocab_size}. Leave it out to "
                f"take the tokenizer's, or choose a smaller vocabulary with --tokenizer."
            )
        return GPTConfig.from_dict({**self.model, "vocab_size": given})

    def to_toml(self) -> str:
        """A commented file for ``--config``, with every field in it."""
        model = GPTConfig.from_dict(self.model)
        text = to_toml({"model": model, "train": self.train, "data": self.data}, comments=True)
        if "vocab_size" in self.model:
            return text
        line = f"vocab_size = {model.vocab_size}"
        return text.replace(line, f"# vocab_size = {FOUND_LATER['vocab_size']}", 1)


def flags(
    config: type[Config],
    title: str,
    defaults: Values = FOUND_LATER,
    automatic: Mapping[str, str] | None = None,
) -> Any:
    """A type for cyclopts: a flag per config field, with its documentation as help.

    What arrives in the command is a dictionary of only those that were given. ``defaults`` are
    shown in place of the config's own. The fields of ``automatic`` may also be ``auto``, which
    means what is said there.
    """
    group = Group(title)
    docs, hints = field_docs(config), get_type_hints(config)
    types = {}
    for field in fields(config):  # type: ignore[arg-type]
        default = defaults.get(field.name, None if field.default is None else repr(field.default))
        text, hint = docs[field.name], hints[field.name]
        if automatic and field.name in automatic:
            text, hint = f"{text} {automatic[field.name]}", hint | Literal["auto"]
        text += f" [default: {default}]" if default is not None else ""
        parameter = Parameter(name=field.name.replace("_", "-"), help=text, group=group)
        types[field.name] = Annotated[hint, parameter]
    return TypedDict(f"{config.__name__}Flags", types, total=False)  # type: ignore[operator]


if TYPE_CHECKING:
    ModelFlags = dict[str, Any]
    TrainFlags = dict[str, Any]
else:
    ModelFlags, TrainFlags = flags(GPTConfig, "Model"), flags(TrainConfig, "Training")


def given_tables(model: Values | None, train: Values | None, data: Values) -> Tables:
    """What was given as flags; None in ``data`` means that it was not."""
    given = {name: value for name, value in data.items() if value is not None}
    return {"model": dict(model or {}), "train": dict(train or {}), "data": given}


def resolve(*layers: Tables, planned: bool = False) -> Settings:
    """Later layers win, field by field; what no layer gives keeps its default.

    Where shape and batch are yet to be ``planned``, they need not agree with what is given so far.
    Raises ConfigError for an unknown table or field, naming the nearest, and for values that cannot
    work.
    """
    merged: Tables = {name: {} for name in CONFIGS}
    for layer in layers:
        for name, values in layer.items():
            merged[name] |= values
    checked = _agreeing(merged) if planned else merged
    model = GPTConfig.from_dict(checked["model"])  # checked here, before any text is read
    given = {name: value for name, value in model.to_dict().items() if name in merged["model"]}
    train, data = TrainConfig.from_dict(checked["train"]), DataConfig.from_dict(merged["data"])
    check_together(model, train)
    return Settings(given, train, data)


def _agreeing(tables: Tables) -> Tables:
    """With heads, a width and a batch that divide, where they are not given."""
    heads = tables["model"].get("n_head", 1)
    devices = len(device_names(tables["train"].get("devices")))
    return tables | {
        "model": {"n_head": heads, "n_embd": 32 * heads} | tables["model"],
        "train": {"batch_size": TrainConfig.batch_size * devices} | tables["train"],
    }


def preset_tables(name: str | None) -> Tables:
    """The values of a preset; none without one."""
    if name is None:
        return {}
    if name not in PRESETS:
        known = list(PRESETS)
        raise ConfigError(
            f"There is no preset {name!r}.{nearest(name, known)} Presets: {', '.join(known)}."
        )
    preset = PRESETS[name]
    data = {"tokenizer": preset.tokenizer}
    return {"model": dict(preset.model), "train": dict(preset.train), "data": data}


def file_tables(path: Path | None) -> Tables:
    """The values of a TOML file with tables [model], [train] and [data]."""
    if path is None:
        return {}
    try:
        tables = read_config(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path} is not a TOML file: {clip(error)}.") from error
    for name, values in tables.items():
        _check_table(path, name, values)
    return tables


def run_tables(folder: Path) -> Tables:
    """The settings of the run in a folder; none if there is no such file."""
    file = folder / CONFIG
    tables = file_tables(file if file.is_file() else None)
    if "data" in tables:  # a run without the field is older than it, and parted them so
        tables = {**tables, "data": {"separator": "blank", **tables["data"]}}
    return tables


def _check_table(path: Path, name: str, values: Any) -> None:
    known = list(CONFIGS)
    if name not in known or not isinstance(values, dict):
        homes = [t for t, c in CONFIGS.items() if name in field_docs(c)]
        advice = f" {name!r} belongs under [{homes[0]}]." if homes else nearest(name[:99], known)
        raise ConfigError(
            f"{path}: there is no table [{clip(name, 40)}].{advice} Tables: {', '.join(known)}."
        )
    try:
        CONFIGS[name].from_dict(values)
    except ConfigError as error:
        if all(key in field_docs(CONFIGS[name]) for key in values):
            return  # the values may fit together once every layer is there; resolve() checks again
        raise ConfigError(f"{path}, table [{name}]: {error}") from error
