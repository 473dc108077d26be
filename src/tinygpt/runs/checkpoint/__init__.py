"""One self-describing safetensors file per checkpoint, written whole or not at all.

``format`` defines the bytes of the file, ``reader`` checks every one of them, and ``writer`` writes
the file from memory. ``copier`` copies a model's state into that memory, ``state`` loads it back,
and ``background`` saves while a run goes on. ``keeping`` decides which checkpoints stay, which
folders may take a run, and what is set aside when a run goes back.
"""

# mypy: implicit-reexport
# ruff: noqa: F401
from tinygpt.runs.checkpoint.background import Saver, ensure_run
from tinygpt.runs.checkpoint.copier import Copier, layout_of, named_tensors, state_size
from tinygpt.runs.checkpoint.format import FORMAT_VERSION, Meta
from tinygpt.runs.checkpoint.keeping import check_claim, newest_good, remove_old, set_aside
from tinygpt.runs.checkpoint.reader import describe, origin, read, read_meta, rehearse, verify
from tinygpt.runs.checkpoint.state import load, origin_of, save, start_from, weights
from tinygpt.runs.checkpoint.writer import Snapshot, foresee_space, stream, write
