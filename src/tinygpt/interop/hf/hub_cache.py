"""What Hugging Face's own tools keep: models that they have fetched, and the user's token.

The layout is that of ``huggingface_hub``: ``models--OWNER--NAME`` holds ``refs/REVISION``, a file
with a commit, and ``snapshots/COMMIT``, a folder with the files of that commit.
"""

from __future__ import annotations

import os
from pathlib import Path

from tinygpt.untrusted import read_bounded


def snapshot(repository: str, revision: str) -> Path | None:
    """The folder in which a commit, branch or tag of a repository would lie; None if it is unknown.

    Which of its files are there depends on what was asked for.
    """
    model = _hub_folder() / f"models--{repository.replace('/', '--')}"
    if (folder := model / "snapshots" / revision).is_dir():
        return folder
    try:
        commit = read_bounded(model / "refs" / revision, 100).decode().strip()
    except (OSError, ValueError):
        return None
    return model / "snapshots" / commit if commit.isalnum() else None


def token() -> str | None:
    """The user's token: ``HF_TOKEN``, or what ``hf auth login`` has written to a file."""
    if found := os.environ.get("HF_TOKEN", "").strip():
        return found
    path = os.environ.get("HF_TOKEN_PATH")
    try:
        return (
            read_bounded(Path(path) if path else _home() / "token", 1000).decode().strip() or None
        )
    except (OSError, ValueError):
        return None


def _home() -> Path:
    named = os.environ.get("HF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or Path(cache, "huggingface")).expanduser()


def _hub_folder() -> Path:
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named).expanduser() if named else _home() / "hub"
