"""A conversation in a window of tokens."""

import itertools

import pytest

from tinygpt.errors import DataError
from tinygpt.text.chat.template import MARKED, PLAIN
from tinygpt.text.chat.window import ROOM, ask
from tinygpt.text.tokenizers import MARKERS, ByteTokenizer

BYTES = ByteTokenizer()
MARKED_BYTES = BYTES.with_specials(["<|endoftext|>", *MARKERS])
SYSTEM = {"role": "system", "content": "Be brief."}


def talk(turns, length=4):
    """Turns of a question and an answer, and a last question; each has its own letter."""
    said = []
    for letter in "abcdefghijklmnopqrstuvwxyz"[:turns]:
        said.append({"role": "user", "content": letter * length})
        said.append({"role": "assistant", "content": letter.upper() * length})
    return [*said, {"role": "user", "content": "?"}]


@pytest.mark.parametrize(("tokenizer", "template"), [(BYTES, PLAIN), (MARKED_BYTES, MARKED)])
def test_what_fits_is_the_template_s_rendering(tokenizer, template):
    messages = [SYSTEM, *talk(3)]
    asked = ask(tokenizer, messages, 1000, 50)
    assert list(asked.ids) == template.render(tokenizer, messages, answer=True).ids.tolist()
    assert not asked.left_out and not asked.too_long and not asked.remark
    assert asked.stop == template.stop_strings
    assert set(asked.stop_ids) >= set(template.stop_ids(tokenizer))


@pytest.mark.parametrize("tokenizer", [BYTES, MARKED_BYTES])
@pytest.mark.parametrize("system", [[], [SYSTEM], [SYSTEM, SYSTEM]])
def test_the_oldest_turns_leave_first_and_no_more_than_must(tokenizer, system):
    """Against a plain search: from the whole talk, turn after turn is taken off."""
    for turns, window, room in itertools.product((0, 1, 4, 9), (40, 96, 160), (1, 200)):
        said = talk(turns)
        asked = ask(tokenizer, [*system, *said], window, room)
        template = MARKED if tokenizer is MARKED_BYTES else PLAIN
        left = 0
        while True:
            kept = template.render(tokenizer, [*system, *said[left:]], answer=True).ids
            if len(kept) <= window - min(room, window // ROOM) or left == len(said) - 1:
                break
            left += 2
        assert asked.left_out == left
        assert list(asked.ids) == kept.tolist()
        assert asked.too_long == (len(kept) > window)
        assert bool(asked.remark) == bool(left or asked.too_long)


def test_a_question_longer_than_the_window_stays_and_is_said():
    asked = ask(BYTES, [*talk(2), {"role": "user", "content": "x" * 99}], 64, 20, most=80)
    assert asked.too_long and "longer than the model's window" in asked.remark
    assert len(asked.ids) == 80 and bytes(asked.ids).endswith(b"xx\n\nAssistant:")


def test_what_is_no_message_is_named():
    for wrong in ({"role": "robot", "content": "x"}, {"role": "user"}, {}):
        with pytest.raises(DataError, match="Message 2"):
            ask(BYTES, [{"role": "user", "content": "x"}, wrong], 64, 8)


def test_a_user_s_text_never_becomes_a_marker():
    ids = ask(MARKED_BYTES, [{"role": "user", "content": "".join(MARKERS) * 3}], 999, 8).ids
    assert [i for i in ids if i >= 256] == [
        MARKED_BYTES.special_id(name) for name in ("<|user|>", "<|end|>", "<|assistant|>")
    ]
