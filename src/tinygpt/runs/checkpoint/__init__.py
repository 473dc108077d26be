"""One self-describing safetensors file per checkpoint, written whole or not at all.

``format`` is what stands in the file, ``reader`` checks every byte of it, ``writer`` makes it
from memory, ``folder`` knows the names beside each other, and ``keeping`` which of them are good.
``claim`` says which folders may take a run, and ``branch`` sets aside what a run leaves when it
goes back. ``state`` is the way from and to a model, and ``background`` saves while a run goes on.
"""

from tinygpt.runs.checkpoint.background import Saver, ensure_run
from tinygpt.runs.checkpoint.branch import set_aside
from tinygpt.runs.checkpoint.claim import check_claim
from tinygpt.runs.checkpoint.format import FORMAT_VERSION, Meta, arrange
from tinygpt.runs.checkpoint.keeping import newest_good, remove_old
from tinygpt.runs.checkpoint.reader import describe, origin, read, read_meta, rehearse, verify
from tinygpt.runs.checkpoint.state import (
    Copier,
    layout_of,
    load,
    named_tensors,
    origin_of,
    save,
    start_from,
    state_size,
    weights,
)
from tinygpt.runs.checkpoint.writer import Snapshot, foresee_space, stream, write

__all__ = [
    "FORMAT_VERSION",
    "Copier",
    "Meta",
    "Saver",
    "Snapshot",
    "arrange",
    "check_claim",
    "describe",
    "ensure_run",
    "foresee_space",
    "layout_of",
    "load",
    "named_tensors",
    "newest_good",
    "origin",
    "origin_of",
    "read",
    "read_meta",
    "rehearse",
    "remove_old",
    "save",
    "set_aside",
    "start_from",
    "state_size",
    "stream",
    "verify",
    "weights",
    "write",
]
