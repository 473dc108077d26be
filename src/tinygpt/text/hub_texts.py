"""Texts of a dataset on the Hugging Face hub, by ``hf://datasets/OWNER/NAME[@REVISION][/PATH]``.

``huggingface_hub`` fetches the files into its own cache, where they stay, and finds them there
without a network. PATH is a file, a folder, or a pattern; without a pattern the most frequent kind
of text below it is read. A PATH that ends like a token file names token files, as in
``hf://datasets/OWNER/NAME/*_train_*.bin``, which ``shards`` reads. ``HF_ENDPOINT`` names another
server that speaks the same protocol.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tinygpt.errors import DataError, UsageError, extras
from tinygpt.files.disk import free_space, size
from tinygpt.text.compressed import is_compressed
from tinygpt.untrusted import brief, clip

SCHEME = "hf://"
ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.*))?"
)
KINDS = (".parquet", ".jsonl", ".ndjson", ".txt", ".json.gz", ".json.zst")
"""Endings of texts, from which those of one kind are chosen; a .gz or .zst may follow."""
BESIDE = ("index", "metadata")
"""What datatrove writes beside a file of tokens."""
WANTED = "Wanted: hf://datasets/OWNER/NAME, perhaps with @REVISION and /FOLDER, /FILE or /PATTERN"


class Fetched(NamedTuple):
    """Files of one commit of a dataset."""

    folder: Path
    files: list[Path]
    commit: str


def is_on_hub(source: str | Path) -> bool:
    return str(source).startswith(SCHEME)


def names_tokens(source: str | Path) -> bool:
    """Whether an address means token files, and not texts: by its end, without a network."""
    from tinygpt.text.token_files import TOKEN_FILES  # late: it loads numpy

    return is_on_hub(source) and str(source).endswith(TOKEN_FILES)


def fetch(source: str) -> Fetched:
    """Fetch the files that an address means, unless they are in the cache.

    Raises UsageError for what is no address, DataError for files that are not there or do not fit
    on the disk, and MissingExtraError.
    """
    found = ADDRESS.fullmatch(source)
    if found is None:
        raise UsageError(f"{brief(source, 200)} is no dataset of the hub. {WANTED}.")
    repo, revision, path = found["repo"], found["revision"], (found["path"] or "").strip("/")
    if ".." in path.split("/"):
        raise UsageError(f"{brief(source, 200)} leads out of the dataset. {WANTED}.")
    hub = extras.need("hub", f"Reading {source}", "huggingface_hub.errors", "huggingface_hub")
    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        names = _listed(hub, repo, where, endpoint, path, source)
        wanted = [*names, *(f"{name}.{end}" for name in names for end in BESIDE)]
        download = partial(hub.snapshot_download, allow_patterns=wanted, endpoint=endpoint)
        folder = Path(download(repo, **where))
    except (OSError, ValueError, RuntimeError, hub.errors.HfHubHTTPError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source} could not be fetched: {clip(error, 300)}") from error
    if not names:  # no network: what an earlier start has fetched
        kept = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        names = _chosen(kept, path, source)
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{source}: {missing[0]} did not arrive. Start again: it goes on there.")
    return Fetched(folder, files, folder.name)


def _listed(
    hub: Any, repo: str, where: dict[str, Any], endpoint: str | None, path: str, source: str
) -> list[str]:
    """The names of the files to fetch; none where the hub cannot be asked and its cache must do."""
    try:
        entries = list(hub.HfApi(endpoint=endpoint).list_repo_tree(repo, recursive=True, **where))
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise DataError(
            f"{source}: there is no such dataset or revision, or it needs a login. Look at its "
            f"page, and log in with: hf auth login"
        ) from error
    except Exception as error:  # whatever its HTTP library raises without a network
        if isinstance(error, MemoryError):
            raise
        return []
    sizes = {e.path: e.size for e in entries if getattr(e, "size", None) is not None}
    names = _chosen(list(sizes), path, source)
    total, free = sum(sizes[name] for name in names), free_space(Path.home())
    if free is not None and total > free:
        raise DataError(
            f"{source} has {size(total)} in {len(names)} files, and {size(free)} are free. Name a "
            f"part of it: a folder, a file, or a pattern such as {SCHEME}datasets/{repo}/*0001*"
        )
    return names


def _chosen(names: Sequence[str], path: str, source: str) -> list[str]:
    """The files that a path means, in the order of their names."""
    if path in names:
        return [path]
    if any(sign in path for sign in "*?["):
        found = [name for name in names if fnmatchcase(name, path)]
    else:
        below = [name for name in names if not path or name.startswith(f"{path}/")]
        kinds = Counter(kind for name in below if (kind := _kind(name)) is not None)
        most = kinds.most_common(1)[0][0] if kinds else None
        found = [name for name in below if most is not None and _kind(name) == most]
    if not found:
        folders = sorted({name.rpartition("/")[0] for name in names if _kind(name)})[:8]
        listed = f" Folders with texts: {', '.join(folders) or 'none'}."
        raise DataError(f"{source}: no file with text is there.{listed}")
    return sorted(found)


def _kind(name: str) -> str | None:
    path = Path(name.lower())
    plain = path.stem if is_compressed(path) else path.name
    ends = (kind for kind in KINDS if path.name.endswith(kind) or plain.endswith(kind))
    return next(ends, None)
