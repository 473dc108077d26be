"""One self-describing safetensors file per checkpoint, written whole or not at all.

``format`` defines the bytes of the file, ``reader`` checks every one of them, and ``writer`` writes
the file from memory. ``copier`` copies a model's state into that memory, ``state`` loads it back,
and ``background`` saves while a run goes on. ``keeping`` decides which checkpoints stay, ``claim``
which folders may take a run, and ``branch`` sets later checkpoints aside when a run goes back.
"""

from tinygpt.runs.checkpoint.background import Saver, ensure_run
from tinygpt.runs.checkpoint.branch import set_aside
from tinygpt.runs.checkpoint.claim import check_claim
from tinygpt.runs.checkpoint.copier import Copier, layout_of, named_tensors, state_size
from tinygpt.runs.checkpoint.format import FORMAT_VERSION, Meta, arrange
from tinygpt.runs.checkpoint.keeping import newest_good, remove_old
from tinygpt.runs.checkpoint.reader import describe, origin, read, read_meta, rehearse, verify
from tinygpt.runs.checkpoint.state import load, origin_of, save, start_from, weights
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
