"""``tinygpt train TEXT --init RUN``: a new run that begins with the weights of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.cli.console import command
from tinygpt.cli.loading import ready_tokenizer
from tinygpt.cli.options import DataConfig, Tables
from tinygpt.config import fine_tuning
from tinygpt.errors import UsageError
from tinygpt.files.atomic import user_path

if TYPE_CHECKING:
    from tinygpt.runs.checkpoint import Meta
    from tinygpt.text.tokenizers import Tokenizer

FREE = ("dropout", "attention", "block_size")
"""What need not be as it was when the weights were learned; a block may be shorter."""


class Beginning:
    """The checkpoint that a run begins with: its weights, its shape and its tokenizer.

    Raises CheckpointError if there is none at ``init``, UsageError if it lies in ``out``, where the
    new run is to go.
    """

    def __init__(self, init: str, out: Path | None) -> None:
        from tinygpt.runs import checkpoint
        from tinygpt.runs.folder import choose_checkpoint, list_checkpoints

        path = user_path(init)
        if (path / "config.json").is_file() and not list_checkpoints(path):
            take_in = command("import", "hf", path, "--out", "RUN")
            raise UsageError(f"{path} holds a model of Hugging Face's. Take it in first: {take_in}")
        self.path = choose_checkpoint(path).resolve()
        if out is not None and out.resolve() == self.path.parent:
            raise UsageError(
                f"--init is from --out {out}: nothing there is overwritten. Choose another."
            )
        self.meta: Meta = checkpoint.read_meta(self.path)

    def layers(self, preset: Tables, *given: Tables) -> list[Tables]:
        """What to resolve: settings that go with these weights, and those that were given.

        Of a preset only how to train counts: shape and tokenizer are those of the weights. What
        else was given must not contradict them.
        """
        preset = {"train": preset.get("train", {})}
        model, data = _values("model", *given), _values("data", *given)
        shape = self.meta.model.to_dict()
        if data.get("markers"):
            grown = self.tokenizer(DataConfig.from_dict(data))
            shape["vocab_size"] = max(shape["vocab_size"], grown.vocab_size if grown else 0)
        wrong = [name for name, value in model.items() if name not in FREE and value != shape[name]]
        if wrong:
            listed = ", ".join(f"{name}={model[name]!r} (it has {shape[name]!r})" for name in wrong)
            raise UsageError(f"{self.path} has weights of another shape: {listed}. Leave that out.")
        longest, wanted = shape["block_size"], model.get("block_size", 0)
        if isinstance(wanted, int) and wanted > longest:
            raise UsageError(
                f"block_size={wanted} is more than the {longest} positions that {self.path} has "
                f"learned an embedding for. Give at most {longest}."
            )
        training = _values("train", preset, *given)
        own = {"model": shape, "train": {**fine_tuning(training), **self._rows(training, data)}}
        return [own, preset, *given, {"data": {"init": str(self.path)}}]

    def tokenizer(self, data: DataConfig) -> Tokenizer | None:
        """The weights' own tokenizer, with markers where these are asked for.

        UsageError if another is asked for, or none is known.
        """
        from tinygpt.text.chat.markers import marked

        found = self._known(data)
        if not data.markers:
            return found
        if found is None:
            raise UsageError(
                f"--markers adds tokens to a vocabulary, and {self.path} holds none. Name it: "
                f"--tokenizer gpt2, byte, or the path of a saved one."
            )
        return marked(found)

    def _rows(self, train: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, int]:
        """The rows of new tokens, which learn beside adapters: nothing else could teach them."""
        from tinygpt.text.chat.markers import new_rows
        from tinygpt.text.tokenizers import tokenizer_from_dict

        if not data.get("markers") or train.get("lora_rank") is None:
            return {}
        described = self.meta.tokenizer
        old = None if described is None else tokenizer_from_dict(described)
        added = new_rows(old, self.tokenizer(DataConfig.from_dict(dict(data))))
        return {"lora_rows": min(added)} if added else {}

    def _known(self, data: DataConfig) -> Tokenizer | None:
        from tinygpt.text.tokenizers import fingerprint, tokenizer_from_dict

        described, spec = self.meta.tokenizer, data.tokenizer
        named = None if spec is None else ready_tokenizer(spec)
        if described is None:
            if named is None and not _are_tokens(data):
                raise UsageError(
                    f"{self.path} holds no tokenizer. Name the one that made the tokens it has "
                    f"learned: --tokenizer gpt2, byte, or the path of a saved one."
                )
            return named
        own = tokenizer_from_dict(described)
        if named is not None and fingerprint(named) != fingerprint(own):
            raise UsageError(
                f"--tokenizer {spec} is not the one that {self.path} has learned with, {own.kind} "
                f"of {own.vocab_size:,}: its weights mean nothing for other tokens. Leave it out."
            )
        return own


def _are_tokens(data: DataConfig) -> bool:
    """Whether nothing has to be tokenized."""
    from tinygpt.text.mix_shares import is_mix, parse_mix
    from tinygpt.text.shards import is_tokens

    source = str(data.source)
    names = parse_mix(source) if is_mix(source) else [source]
    return all(is_tokens(name, data.glob) for name in names)


def _values(table: str, *layers: Tables) -> dict[str, Any]:
    """What the layers say of one table, later ones winning."""
    return {name: value for layer in layers for name, value in layer.get(table, {}).items()}
