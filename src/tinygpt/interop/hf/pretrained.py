"""GPT-2 as Hugging Face keeps it: a folder with config.json and model.safetensors, read in place.

Names and shapes are those of ``layout``, but the prefix may be missing. The causal masks that old
versions stored beside the weights (``attn.bias``, ``attn.masked_bias``) are left out. Weights may
be float32, float16 or bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np

from tinygpt.config import GPTConfig, to_toml
from tinygpt.config.weights import Weight, weights
from tinygpt.errors import InteropError, TokenizerError, UsageError, nearest
from tinygpt.files.atomic import building, replacing, user_path
from tinygpt.files.disk import writing
from tinygpt.files.tensor_file import arrange
from tinygpt.interop import parity
from tinygpt.interop.hf import hub
from tinygpt.interop.hf.hf_config import read_config, read_end_name, read_ends
from tinygpt.interop.hf.hf_tokenizer import read_tokenizer
from tinygpt.interop.hf.layout import PREFIX, stored_shape
from tinygpt.interop.hf.weight_files import (
    INDEX,
    LISTED,
    WEIGHTS,
    Entry,
    Floats,
    read_file,
    read_shards,
    refuse_pickle,
)
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import CONFIG, TOKENIZER, checkpoint_path, list_checkpoints
from tinygpt.text.names import exists, is_name
from tinygpt.text.tokenizers import BPETokenizer, Tokenizer
from tinygpt.untrusted import brief, clip

if TYPE_CHECKING:
    from tinygpt.model.transformer import Transformer

WEIGHTS_FILE = "model.safetensors"
PICKLE = "pytorch_model.bin"
CACHED = ("snapshots/*/", "models--*/snapshots/*/", "hub/models--*/snapshots/*/")
"""Where models lie below a model's folder in Hugging Face's cache, the cache, and HF_HOME."""
WRAPPED = re.compile(r"^(_orig_mod\.|module\.)+")
"""What torch.compile and DistributedDataParallel put before the names of a model's weights."""
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
"""Causal masks, which are no weights."""
OTHER_TOKENIZER = (
    "Name the tokenizer that belongs to the model, such as --tokenizer gpt2, or take the weights "
    "alone: --tokenizer none"
)
OF_ANOTHER = "Is the config.json of another model? Fetch both from the same place."
"""What to do where the weights are not those that config.json describes."""
MOST_PADDING = 1024
"""Rows of an embedding beyond the tokens: vocabularies are padded to a multiple of 64, as nanoGPT's
50,304 rows for GPT-2's 50,257 tokens, or of up to so many. More tell that the tokenizer is not the
model's."""


@dataclass(frozen=True)
class Pretrained:
    """A GPT-2 that others trained: its shape, and where each of its weights is in a mapped file."""

    source: str
    folder: Path
    config: GPTConfig
    entries: Mapping[str, Entry]
    """By our names."""
    snapshot: hub.Snapshot | None = None
    """Where on the hub it is from; None for files that were given."""

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The one beside the weights, if there is one.

        It ends texts as the model does. InteropError if it has more tokens than the model has rows,
        or cannot be read.
        """
        try:
            found = read_tokenizer(self.folder)
        except TokenizerError as error:
            raise InteropError(f"{error} {OTHER_TOKENIZER}") from error
        if found is not None:
            self.check_vocabulary(found)
        if isinstance(found, BPETokenizer):
            ends = [i for i in self.ends if i < found.vocab_size] or read_end_name(
                self.folder, found
            )
            return found.with_ends(ends) if ends else found
        return found

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text, as the files of the folder say; those without a row are none."""
        return tuple(i for i in read_ends(self.folder) if i < self.config.vocab_size)

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """InteropError unless the model has a row for each token, and few more that only pad."""
        if not 0 <= self.config.vocab_size - tokenizer.vocab_size <= MOST_PADDING:
            raise InteropError(
                f"{self.source}: the model has a vocabulary of {self.config.vocab_size:,}, and the "
                f"tokenizer one of {tokenizer.vocab_size:,}. {OTHER_TOKENIZER}"
            )

    @property
    def place(self) -> str:
        """Where they are from, for a person."""
        if self.snapshot is None:
            return f"the files in {self.folder}"
        commit = self.snapshot.commit
        return f"{self.snapshot.repository} of the hub" + (f", commit {commit}" if commit else "")

    @property
    def dtypes(self) -> str:
        """The types of the weights in the files, such as F16."""
        return ", ".join(sorted({entry.place.dtype for entry in self.entries.values()}))

    def pieces(self, weight: Weight) -> Iterator[Floats]:
        """A weight as our model has it, in float32, flat, a piece at a time."""
        entry = self.entries[weight.name]
        pieces = self._turned(entry) if weight.kind == "linear" else entry.pieces()
        for piece in pieces:
            if not np.isfinite(piece).all():
                raise InteropError(
                    f"{entry.path}: {weight.name} holds values that are not finite, and nothing "
                    f"can be computed with them. Fetch the file again, or take an earlier state."
                )
            yield piece

    def _turned(self, entry: Entry) -> Iterator[Floats]:
        yield np.ascontiguousarray(entry.floats().T).reshape(-1)  # (in, out) -> (out, in)
        entry.release()

    def fetch(self, name: str) -> Floats:
        """A weight as it is stored, by Hugging Face's name: for ``parity.plain_logits``."""
        entry = self.entries[name.removeprefix(PREFIX)]
        entry.release()  # of the one before
        return entry.floats()


# Finding ----------------------------------------------------------------------------------------


def open_pretrained(
    source: str | Path, progress: bool = False, revision: str | None = None
) -> Pretrained:
    """The GPT-2 in a folder, in the folder of a .safetensors file, or of a name on the hub.

    ``gpt2`` and the other short names are always those of the hub, see ``names``; ``owner/name`` is
    a folder if there is one. ``revision`` is a commit, tag or branch of the hub. Everything is
    checked but the values. Nothing is read of the weights yet. ``progress`` shows a bar where
    something has to be fetched. Raises InteropError that says what does not fit.
    """
    path, snapshot = user_path(source), None
    if is_name(source, hub.NAMES) or not exists(path):
        snapshot = hub.fetch(str(source), progress, revision)
        folder, files = snapshot.folder, _weight_files(snapshot.folder)
    elif revision is not None:
        raise UsageError(
            f"{source} is here, in no revision but one. Leave revision {brief(revision)} out, or "
            f"give the name of a model on the hub."
        )
    elif path.is_dir():
        folder, files = path, _weight_files(path)
    else:
        folder, files = path.parent, path
    found = read_shards(files) if files.name == INDEX else read_file(files)
    if not (folder / "config.json").exists():
        raise InteropError(f"{files} needs the config.json of the model beside it: its shape.")
    config = read_config(folder / "config.json")
    return Pretrained(str(source), folder, config, _matched(files, config, found), snapshot)


def _weight_files(folder: Path) -> Path:
    """The file with the weights in a folder, or the one that says in which they are."""
    for name in (WEIGHTS_FILE, INDEX):
        if (folder / name).exists():
            return folder / name
    if list_checkpoints(folder):
        raise UsageError(f"{folder} is a run of TinyGPT's own; there is nothing to import.")
    for pickle in (PICKLE, f"{PICKLE}.index.json"):
        if (folder / pickle).exists():
            raise InteropError(refuse_pickle(folder / pickle))
    if not (folder / "config.json").exists():
        raise InteropError(
            f"{folder} is no folder of Hugging Face's: it has no config.json and no {WEIGHTS_FILE}."
            f"{_in_cache(folder)}"
        )
    raise InteropError(f"{folder} has a config.json, but no weights: {WEIGHTS_FILE} is missing.")


def _in_cache(folder: Path) -> str:
    """The models below a folder of Hugging Face's cache, whose files lie in snapshots."""
    found = [path.parent for deep in CACHED for path in sorted(folder.glob(f"{deep}config.json"))]
    if not found:
        return ""
    more = f", or one of {len(found) - 1} more" if len(found) > 1 else ""
    return f" It is a cache; give the folder of one model in it: {quote(str(found[0]))}{more}."


def _matched(path: Path, config: GPTConfig, found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries by our names; InteropError for what is missing, too much, or does not fit."""
    ours = {WRAPPED.sub("", name).removeprefix(PREFIX): entry for name, entry in found.items()}
    if len(ours) != len(found):
        raise InteropError(f"{path} holds weights both with and without the prefix {PREFIX!r}.")
    ours = {name: entry for name, entry in ours.items() if not BUFFERS.fullmatch(name)}
    if config.tie_embeddings:
        ours = _without_copy(path, ours)
    wanted = {weight.name: weight for weight in weights(config)}
    _check_names(path, wanted, ours)
    for name, weight in wanted.items():
        _check_entry(path, weight, ours[name])
    return {name: ours[name] for name in wanted}


def _without_copy(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Tied embeddings are stored once, under either name, or twice, and then they are the same."""
    head = entries.pop("lm_head.weight", None)
    if head is None:
        return entries
    embedding = entries.setdefault("wte.weight", head)
    if not _same(embedding, head):
        raise InteropError(
            f"{path}: lm_head.weight differs from wte.weight, but config.json says that they are "
            f"one. If they are not, set tie_word_embeddings to false there."
        )
    return entries


def _same(a: Entry, b: Entry) -> bool:
    if (a.place.dtype, a.place.shape) != (b.place.dtype, b.place.shape):
        return False
    return all(np.array_equal(x, y) for x, y in zip(a.pieces(), b.pieces(), strict=True))


def _check_names(path: Path, wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    for names, others, said in ((wanted, found, "lacks"), (found, wanted, "holds")):
        lost = [name for name in names if name not in others]
        if lost:
            listed = clip(", ".join(lost[:LISTED])) + (", …" if len(lost) > LISTED else "")
            known = list(others) if len(others) < 10_000 else []
            near = nearest(lost[0][:99], [n for n in known if n not in names])
            what = "" if said == "lacks" else ", which the GPT-2 of its config.json does not have"
            raise InteropError(
                f"{path} {said} {len(lost):,} weight{'s' * (len(lost) > 1)}{what}: {listed}.{near} "
                f"{OF_ANOTHER}"
            )


def _check_entry(path: Path, weight: Weight, entry: Entry) -> None:
    if entry.place.shape != (stored := stored_shape(weight)):
        raise InteropError(
            f"{path}: {weight.name} has shape {entry.place.shape}, and by config.json it would be "
            f"{stored}. {OF_ANOTHER}"
        )
    if (kind := entry.place.dtype) not in WEIGHTS:
        raise InteropError(
            f"{path}: {weight.name} is of type {kind}; weights are {', '.join(WEIGHTS)}."
        )


# Taking it in -----------------------------------------------------------------------------------


def load_weights(model: Transformer, pretrained: Pretrained) -> None:
    """Put the weights into a model of the same shape, one after another."""
    from tinygpt.machine.transfer import fill

    parameters = model.parameters()
    for weight in weights(pretrained.config):
        fill(parameters[weight.name], pretrained.pieces(weight))


def check(pretrained: Pretrained) -> float:
    """The largest difference of our model's logits to those of a plain forward pass in numpy.

    Raises InteropError if it is too large.
    """
    from tinygpt.model.transformer import Transformer

    model = Transformer(pretrained.config, seed=None)
    load_weights(model, pretrained)
    config = pretrained.config
    plain = parity.plain_logits(pretrained.fetch, config, parity.fixed_prompt(config))
    return parity.prove(model, pretrained.fetch, plain, "A plain forward pass").difference


def _origin(pretrained: Pretrained) -> dict[str, str]:
    """Where weights come from, to be passed on with them: of a path no more than its last name."""
    snapshot = pretrained.snapshot
    if snapshot is None:
        return {"source": f"./{user_path(pretrained.source).resolve().name}"}
    if snapshot.commit is None:
        return {"source": pretrained.source}
    repository = {"repository": snapshot.repository, "commit": snapshot.commit}
    return {"source": pretrained.source, **repository}


def import_run(pretrained: Pretrained, folder: Path, tokenizer: Tokenizer | None) -> Path:
    """Make a run of it, with one checkpoint, of step 0; -> the checkpoint.

    The folder appears whole or not at all. Weights go from file to file a piece at a time.
    """
    folder = user_path(folder)
    named = {f"model.{weight.name}": weight for weight in weights(pretrained.config)}
    layout = arrange((n, np.dtype(np.float32), w.shape) for n, w in named.items())
    meta = checkpoint.Meta(
        0,
        pretrained.config,
        tokenizer=None if tokenizer is None else tokenizer.to_dict(),
        progress={"imported": {**_origin(pretrained), "types": pretrained.dtypes}},
    )
    checkpoint.rehearse(meta, layout)
    with writing(folder), building(folder) as staging:
        run = checkpoint.ensure_run(staging)
        meta, path = replace(meta, run=run), checkpoint_path(staging, 0)
        checkpoint.stream(path, layout, lambda name: pretrained.pieces(named[name]), meta)
        with replacing(staging / CONFIG) as file:
            file.write(to_toml({"model": pretrained.config}, comments=True).encode())
        if tokenizer is not None:
            tokenizer.save(staging / TOKENIZER)
    return checkpoint_path(folder, 0)
