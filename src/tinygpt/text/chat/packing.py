"""Conversations as tokens: which of them the loss counts, and how they share blocks.

A block holds whole conversations, one behind another, and is filled up with tokens that nothing is
learned from. The targets are the assistant's tokens and those that end its turns; every other
target is -1, which the loss leaves out. The first token of a conversation is never an answer, so
none is predicted from the conversation before it in the block.

A conversation that is longer than a block loses its end, and one of which no answer is left then is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinygpt.errors import DataError, TokenizerError
from tinygpt.text.chat.conversations import Messages, is_learned
from tinygpt.text.chat.template import Template
from tinygpt.text.joined import Joined
from tinygpt.text.tokenizers import Tokenizer

Places = NDArray[np.int64]
OPEN = 16
"""Blocks that the next conversation may still go into."""
IGNORED = -1
"""The target that the loss leaves out."""


class Packed(NamedTuple):
    """Conversations in blocks of T tokens and the target of the last."""

    ids: NDArray[np.integer[Any]]
    """(rows, T + 1)"""
    counted: NDArray[np.bool_]
    """(rows, T + 1)"""
    cut: int
    """Conversations that lost their end."""
    left_out: int
    """Those of which no answer was left."""

    def rows(self, numbers: Places) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Inputs and targets (count, T) of the blocks with these numbers."""
        ids = self.ids[numbers].astype(np.int32)
        return ids[:, :-1], np.where(self.counted[numbers, 1:], ids[:, 1:], IGNORED)


class Conversations(Joined):
    """Conversations one behind another: as a sequence, their ids (n,); as batches, ``packed``."""

    def __init__(
        self,
        ids: NDArray[Any],
        counted: NDArray[np.bool_],
        ends: Places,
        answers: Places,
        context: Places,
    ) -> None:
        """``ends``, ``answers`` and ``context`` (conversations,): where each ends in ``ids`` and
        ``counted`` (n,), how many answers are learned from it, and how many are not."""
        super().__init__([ids], ids.dtype)
        self.ids, self.counted, self.ended = ids, counted, ends
        self.answers, self.context = answers, context
        self._packed: dict[int, Packed] = {}

    def _view(self, first: int, last: int) -> Joined:
        """A part of the sequence is a sequence of ids only."""
        return Joined(self.parts, self.dtype, bounds=(first, last))

    @property
    def count(self) -> int:
        """The number of conversations."""
        return len(self.ended)

    def split(self, val_fraction: float) -> tuple[Conversations, Conversations]:
        """The first conversations, and the last ``val_fraction`` of them."""
        cut = int(self.count * (1 - val_fraction))
        at = int(self.ended[cut - 1]) if cut else 0
        answers, context = self.answers, self.context
        return (
            Conversations(
                self.ids[:at], self.counted[:at], self.ended[:cut], answers[:cut], context[:cut]
            ),
            Conversations(
                self.ids[at:],
                self.counted[at:],
                self.ended[cut:] - at,
                answers[cut:],
                context[cut:],
            ),
        )

    def question(self, number: int) -> list[int]:
        """The ids of a conversation up to its first answer."""
        number %= self.count
        start = int(self.ended[number - 1]) if number else 0
        answer = start + int(np.argmax(self.counted[start : self.ended[number]]))
        return [int(i) for i in self.ids[start:answer]]

    def packed(self, block_size: int) -> Packed:
        """The conversations in blocks. Raises DataError if none has an answer that fits."""
        if block_size not in self._packed:
            self._packed[block_size] = _pack(self, block_size)
        return self._packed[block_size]


def tokens_of_conversations(
    conversations: Iterable[Messages], tokenizer: Tokenizer, template: Template
) -> Conversations:
    """The tokens of conversations. Raises TokenizerError for characters the vocabulary lacks."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    ids, counted = [np.zeros(0, dtype)], [np.zeros(0, np.bool_)]
    answers, context = list[int](), list[int]()
    for number, messages in enumerate(conversations, 1):
        try:
            rendered = template.render(tokenizer, messages)
        except TokenizerError as error:
            raise TokenizerError(f"Conversation {number}: {error}") from error
        ids.append(rendered.ids.astype(dtype))
        counted.append(rendered.counted)
        answers.append(sum(map(is_learned, messages)))
        context.append(sum(m["role"] == "assistant" for m in messages) - answers[-1])
    ends = np.cumsum([len(part) for part in ids[1:]], dtype=np.int64)
    return Conversations(
        np.concatenate(ids),
        np.concatenate(counted),
        ends,
        np.array(answers, np.int64),
        np.array(context, np.int64),
    )


def _pack(tokens: Conversations, block_size: int) -> Packed:
    """Each conversation into the first of the open blocks that has room for it, or a new one."""
    room = block_size + 1
    starts = np.concatenate([[0], tokens.ended[:-1]]).astype(np.int64)
    full = tokens.ended - starts
    lengths = np.minimum(full, room)
    before = np.concatenate([[0], np.cumsum(tokens.counted)])
    kept = before[starts + lengths] > before[starts]  # an answer is left
    if not kept.any():
        longest = int(full.max(initial=0))
        raise DataError(
            f"No conversation has an answer within block_size={block_size} tokens; the longest has "
            f"{longest}. Try --block-size {max(longest - 1, 1)}."
        )
    rows, offsets = _places(lengths[kept].tolist(), room)
    size = lengths[kept]
    within = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
    source = np.repeat(starts[kept], size) + within
    target = np.repeat(np.array(rows) * room + np.array(offsets), size) + within
    count = max(rows) + 1
    ids, counted = np.zeros(count * room, tokens.ids.dtype), np.zeros(count * room, np.bool_)
    ids[target], counted[target] = tokens.ids[source], tokens.counted[source]
    return Packed(
        ids.reshape(count, room),
        counted.reshape(count, room),
        int((kept & (full > room)).sum()),
        int((~kept).sum()),
    )


def _places(lengths: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """The block of each conversation, and where in it it begins."""
    open_rows = list[list[int]]()  # number, tokens in it; the fullest leaves first
    rows, offsets, count = list[int](), list[int](), 0
    for length in lengths:
        found = next((row for row in open_rows if row[1] + length <= room), None)
        if found is None:
            if len(open_rows) == OPEN:
                open_rows.remove(max(open_rows, key=lambda row: row[1]))
            found = [count, 0]
            open_rows.append(found)
            count += 1
        rows.append(found[0])
        offsets.append(found[1])
        found[1] += length
    return rows, offsets


def report(training: Conversations, block_size: int) -> list[str]:
    """What is learned from, in lines: turns, answers, and what is cut off and why."""
    packed = training.packed(block_size)
    answers = int(training.counted.sum())
    lines = [
        f"conversations: {training.count:,} with {training.answers.sum():,} answers, which are "
        f"{answers:,} of {len(training):,} tokens ({answers / len(training):.0%}); the loss counts "
        f"only these. {len(packed.ids):,} blocks, "
        f"{len(training.ids) / packed.ids.size:.0%} full"
    ]
    if context := int(training.context.sum()):
        lines.append(
            f"answers that are context, from which nothing is learned: {context:,} (their weight "
            f"is 0, or they stand before the first question)"
        )
    if packed.cut or packed.left_out:
        lines.append(
            f"too long for block_size={block_size}: {packed.cut:,} lose their end, and "
            f"{packed.left_out:,} are left out, for no answer begins within the block"
        )
    return lines
