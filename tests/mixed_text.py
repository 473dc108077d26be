"""Text of every kind that trips tokenizers, the same on every machine: ``mixed_text(300_000)``.

Prose, code, several scripts, emoji of many code points, combining marks, control characters, long
runs of one character, contractions, what looks like a special token, and single characters from
all over Unicode. It is made by rule from a seed. Those single characters are of Unicode 3.2, which
every Python carries, so that the text is the same under all of them.
"""

# ruff: noqa: RUF001  # letters that look like others are the point
from __future__ import annotations

import functools
import random
from unicodedata import ucd_3_2_0

WORDS = (
    "the of and to in that it was for on with as his they at be this from have or by one had not "
    "but what all were when we there can an your which their said if do will each about how up "
    "naïve café résumé Ærøskøbing Straße İstanbul Łódź fiancée coöperate HTTP iPhone 3rd x86_64"
)
CONTRACTIONS = (
    "don't I'm we've you'll he'd she's they're O'Brien 'tis DON'T I'M WE'VE YOU'LL don’t 's 't 'll "
    "''s ' 'sst rock'n'roll"
)
SCRIPTS = (
    "我们在春天的早晨读书，天气很好。人工智能；《红楼梦》「繁體字」！",
    "ひらがなとカタカナ、漢字もまじる。ー〜",
    "한국어 문장은 이렇게 띄어쓰기를 한다.",
    "هذا نص عربي، وفيه أرقام ٠١٢٣٤٥٦٧٨٩؟",
    "זה טקסט בעברית עם ניקוד: שָׁלוֹם",
    "यह हिन्दी में एक वाक्य है। क्षत्रिय १२३",
    "นี่คือข้อความภาษาไทยที่ไม่มีช่องว่าง",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐍈𐌰 𒀀𒁀 ½ ² Ⅷ ① ٣",
)
EMOJI = (
    "😀",
    "👍🏽",
    "👩🏿\u200d🚀",
    "👨\u200d👩\u200d👧\u200d👦",
    "🏳\ufe0f\u200d🌈",
    "🇫🇷🇯🇵",
    "❤\ufe0f\u200d🔥",
    "1\ufe0f\u20e3",
    "🧑🏻\u200d🤝\u200d🧑🏾",
    "☺\ufe0e",
)
MARKS = "\u0300\u0301\u0308\u0323\u0327\u20d7\u0489\u0670\u094d"
CONTROLS = "\x00\x01\x07\x08\x0b\x0c\x1b\x1c\x1d\x1e\x1f\x7f\x85\x9f\u200b\u200c\u200d\u2060\ufeff"
DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202e\u2066\u2067\u2069"
SPACES = " \t\n\r\x0b\x0c\xa0\u1680\u2002\u2003\u2009\u2028\u2029\u202f\u205f\u3000\u180e"
SPECIAL = "<|endoftext|> <|im_start|> [UNK] [MASK] <s> </s> <unk> <0x0A> ▁ Ġ Ċ ĠĠ ##ing ÿ"
CODE = (
    "def f(x, *args, **kwargs):\n    return {k: v for k, v in zip(x, args)}  # nothing\n",
    "for (int i = 0; i < n; ++i) {\n\t\tp[i] += 0x1F & ~mask; /* ... */\n}\r\n",
    '<a href="/?q=%20&amp;x=1">link</a><!-- ---- -->\n',
    "SELECT * FROM t WHERE a >= 1.5e-10 AND b != 'it''s';\n",
    "\\begin{align} E &= mc^2 \\\\ \\end{align}\n",
    '{"key": [1, -2.50, null, true, "\\u00e9\\n"]}\n',
)


@functools.cache
def mixed_text(size: int = 300_000, seed: int = 1337) -> str:
    """At least ``size`` bytes of UTF-8; a longer text begins with the shorter ones of its seed."""
    rng = random.Random(seed)
    makers = (_prose, _prose, _code, _script, _script, _emoji, _marks, _controls, _runs, _anything)
    pieces: list[str] = []
    length = 0
    while length < size:
        pieces.append(rng.choice(makers)(rng))
        pieces.append(rng.choice(("", "", " ", "\n", "  ", "\n\n")))
        length += sum(len(piece.encode()) for piece in pieces[-2:])
    return "".join(pieces)


def _prose(rng: random.Random) -> str:
    known = f"{WORDS} {CONTRACTIONS} {SPECIAL}".split()
    words = rng.choices(known, k=rng.randint(3, 40))
    if rng.random() < 0.2:
        words.append(str(rng.randrange(10 ** rng.randint(1, 9))))
    return rng.choice((" ", " ", " ", "-", ", ")).join(words) + rng.choice(".!?…,;: ")


def _code(rng: random.Random) -> str:
    return rng.choice(CODE)


def _script(rng: random.Random) -> str:
    sentence = rng.choice(SCRIPTS)
    start = rng.randrange(len(sentence))
    return sentence[start:] + sentence[:start]


def _emoji(rng: random.Random) -> str:
    return rng.choice(("", " ", "a")).join(rng.choices(EMOJI, k=rng.randint(1, 6)))


def _marks(rng: random.Random) -> str:
    def marked() -> str:
        return rng.choice("aeionZש我 ") + "".join(rng.choices(MARKS, k=rng.randint(0, 5)))

    return "".join(marked() for _ in range(rng.randint(1, 12)))


def _controls(rng: random.Random) -> str:
    return "".join(rng.choices(CONTROLS + DIRECTIONS + SPACES + "a1.'", k=rng.randint(1, 12)))


def _runs(rng: random.Random) -> str:
    runs = (rng.choice(" \n\t0123456789.=-'aé\u3000字") for _ in range(rng.randint(1, 3)))
    return "".join(character * rng.randint(1, 80) for character in runs)


def _anything(rng: random.Random) -> str:
    return "".join(chr(rng.choice(_code_points())) for _ in range(rng.randint(1, 20)))


@functools.cache
def _code_points() -> list[int]:
    """The characters of Unicode 3.2: but for surrogates, which no text has, and private ones."""
    left_out = ("Cn", "Cs", "Co")
    return [p for p in range(0x30000) if ucd_3_2_0.category(chr(p)) not in left_out]
