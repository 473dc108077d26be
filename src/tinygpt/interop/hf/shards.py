"""Weights in several files, with an index that says which of them each one is in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tinygpt.errors import InteropError, nearest
from tinygpt.interop.hf.hf_config import read_object
from tinygpt.interop.hf.weight_files import Entry, read_file
from tinygpt.untrusted import brief, clip

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}\.safetensors")
"""Names of files that an index may speak of: beside itself, and nothing hidden."""
MAX_SHARDS = 1024
LISTED = 5
"""Names that an error lists at most."""


def read_shards(index: Path) -> dict[str, Entry]:
    """The tensors of all files that an index names; InteropError if they are not those it lists."""
    places = weight_map(index)
    found: dict[str, Entry] = {}
    absent = sorted({n for n in places.values() if not (index.parent / n).exists()})
    if absent:
        listed = clip(", ".join(absent[:LISTED]))
        raise InteropError(f"{index} names {len(absent)} that are not beside it: {listed}.")
    for shard in sorted(set(places.values())):
        for name, entry in read_file(index.parent / shard).items():
            if places.get(name) != shard:
                said = f"says that it is in {places[name]}" if name in places else "lacks it"
                raise InteropError(f"{index.parent / shard} holds {brief(name)}; the index {said}.")
            found[name] = entry
    missing = [name for name in places if name not in found]
    if missing:
        near = nearest(missing[0][:99], list(found)[:10_000])
        place = index.parent / places[missing[0]]
        raise InteropError(f"{place} lacks {brief(missing[0])}, which {index} lists.{near}")
    return found


def weight_map(index: Path) -> dict[str, str]:
    """From each tensor's name to the name of its file, which is a plain one beside the index."""
    places: Any = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InteropError(f"{index} is damaged: it has no weight_map.")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise InteropError(
                f"{index}: {brief(name)} would be in {brief(shard)}, which is no name of a "
                f"safetensors file beside the index. Such a file is not opened."
            )
    if len(set(places.values())) > MAX_SHARDS:
        raise InteropError(f"{index} names more than {MAX_SHARDS:,} files.")
    return dict(places)
