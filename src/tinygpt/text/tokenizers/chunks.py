r"""Cutting a long text into chunks that encode, one by one, to the tokens of the whole.

A BPE first splits text into words by a pattern, and merges only within words. A cut is harmless
where a word ends *and* the pattern, looking at either side alone, would still end one there. No
word of GPT-2's pattern goes from a letter or digit on into white space or punctuation, and the
pattern looks ahead only past white space, which the left side then does not end in. The apostrophe
is left out because later patterns take ``'s`` to the word before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

CHUNK = 1 << 20
"""Characters per chunk, about: enough for the encoder to be busy, little enough for any machine."""
LONGEST = 8 << 20
"""A text without any harmless place for so many characters is cut where it stands. It still decodes
to itself; the tokens at the cut may differ from those of the whole."""

_SCRIPTS = "0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_POINTS = r"!-&(-/:-@\[-`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_CUT = rf"(?:[^\W_](?=[ \t\r\n])|[{_SCRIPTS}](?=[{_POINTS}]))"
_FIRST_CUT, _LAST_CUT = re.compile(_CUT), re.compile(rf"(?s).*{_CUT}")

_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG = 50_000
_LONG_SPACE = re.compile(rf"(?<![{_SPACE}])[{_SPACE}]{{{_LONG},}}(?=[{_SPACE}][^{_SPACE}])")


def chunks(pieces: Iterable[str], size: int = CHUNK, longest: int = LONGEST) -> Iterator[str]:
    """The same text in chunks of about ``size`` characters, cut where a BPE does not notice."""
    waiting: list[str] = []
    length = searched = 0  # characters waiting, and how many of them are known to have no cut
    due = size  # characters at which a cut is sought: joining at every small piece is quadratic
    for piece in pieces:
        for start in range(0, len(piece), size):
            waiting.append(piece[start : start + size])
            length += len(waiting[-1])
            if length < due:
                continue
            text = "".join(waiting)
            found = _LAST_CUT.match(text, max(searched - 1, 0))
            cut = found.end() if found else (length if length >= longest else 0)
            if cut:
                yield text[:cut]
            waiting, length = [text[cut:]], length - cut
            searched = length
            due = min(length + size, longest)
    if length:
        yield "".join(waiting)


def first_cut(text: str) -> int | None:
    """The first place, in characters, at which a BPE would not notice a cut; None without one."""
    found = _FIRST_CUT.search(text)
    return found.end() if found else None


def split_space(text: str) -> list[str]:
    r"""Cut behind very long white space, on which the regular expressions of a BPE give up.

    The pattern ``\s+(?!\S)`` takes all of a run but its last character, which may begin the word
    that follows; cut there, the left side's ``\s++$`` takes just the same.
    """
    block = _LONG // 2  # of so much white space, half of it or more would fill a whole block
    if not any(text[i : i + block].isspace() for i in range(0, len(text) - block + 1, block)):
        return [text]
    ends = [found.end() for found in _LONG_SPACE.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
