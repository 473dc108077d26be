"""What a tokenizer of transformers does besides its vocabulary: the same ids, or a refusal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mixed_text import mixed_text
from tinygpt.errors import TokenizerError
from tinygpt.interop.hf.hf_reading import read_tokenizer
from tinygpt.interop.hf.hf_tokenizer import write_tokenizer
from tinygpt.text.tokenizers import BPETokenizer

TEXTS = [
    "the cat",
    " the  cat ",
    "",
    "\n",
    "a<b>c###d",
    mixed_text(2000).replace("<|endoftext|>", ""),
    "x" * 300,
]
Values = dict[str, Any]
Change = Callable[[Values], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """A tokenizer.json of 400 tokens and a special one."""
    trained = BPETokenizer.train(mixed_text(20_000), 400)
    merges = [token for token in trained.ranks if len(token) > 1]
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(BPETokenizer.from_merges(merges, special={"<end>": 400}), folder, 64)
    found: Values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return found


def put(**values: Any) -> Change:
    return lambda file: file.update(values)


def inside(part: str, **values: Any) -> Change:
    return lambda file: file[part].update(values)


def added(text: str, special: bool = False, **flags: bool) -> Change:
    """One more added token."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = {"content": text, **plain, "special": special, **flags}
    return lambda file: file["added_tokens"].append({"id": 400 + len(file["added_tokens"]), **new})


def template(*single: str, **more: Any) -> Values:
    """A TemplateProcessing; ``A`` is the text."""
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "A"
        else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in single
    ]
    special = {"<end>": {"id": "<end>", "ids": [400], "tokens": ["<end>"]}}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    kind = {"type": "TemplateProcessing", "single": parts, "pair": pair}
    return {**kind, "special_tokens": special, **more}


LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
PAD = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<end>"}
SPLIT = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}

SAME: dict[str, Change] = {
    "nothing": put(),
    "post_processor of offsets": put(post_processor=LEVEL),
    "template of the text alone": put(post_processor=template("A")),
    "both": put(post_processor={"type": "Sequence", "processors": [LEVEL, template("A")]}),
    "another decoder": inside("decoder", add_prefix_space=True, trim_offsets=False),
    "offsets": inside("pre_tokenizer", trim_offsets=False),
    "padding of batches": put(
        padding={**PAD, "strategy": "BatchLongest", "pad_to_multiple_of": None}
    ),
    "special that strips": added("<mask>", special=True, lstrip=True, rstrip=True),
    "special that is normalized": added("<pad>", special=True, normalized=True),
    "fuse_unk": inside("model", fuse_unk=True),
}
REFUSED: dict[str, tuple[Change, str]] = {
    "before": (put(post_processor=template("<end>", "A")), "TemplateProcessing with '<end>'"),
    "behind": (put(post_processor=template("A", "<end>")), "TemplateProcessing with '<end>'"),
    "twice": (put(post_processor=template("A", "A")), "a text more than once"),
    "in a sequence": (
        put(post_processor={"type": "Sequence", "processors": [LEVEL, template("<end>", "A")]}),
        "TemplateProcessing with '<end>'",
    ),
    "as RoBERTa": (
        put(
            post_processor={
                "type": "RobertaProcessing",
                **{"sep": ["<end>", 400], "cls": ["<end>", 400]},
                **{"trim_offsets": True, "add_prefix_space": False},
            }
        ),
        "post_processor of type 'RobertaProcessing'",
    ),
    "as BERT": (
        put(
            post_processor={"type": "BertProcessing", "sep": ["<end>", 400], "cls": ["<end>", 400]}
        ),
        "post_processor of type 'BertProcessing'",
    ),
    "space": (inside("pre_tokenizer", add_prefix_space=True), "add_prefix_space"),
    "one word": (inside("pre_tokenizer", use_regex=False), "use_regex=false"),
    "another pattern": (
        put(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [SPLIT, {**LEVEL, "use_regex": False, "add_prefix_space": False}],
            }
        ),
        "behind Sequence",
    ),
    "lower case": (put(normalizer={"type": "Lowercase"}), "by Lowercase"),
    "NFC": (put(normalizer={"type": "NFKC"}), "by NFKC"),
    "cut": (
        put(
            truncation={
                **{"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
            }
        ),
        "cuts texts to a length .* set truncation to null",
    ),
    "filled": (
        put(padding={**PAD, "strategy": {"Fixed": 8}, "pad_to_multiple_of": None}),
        "fills texts up to a length .* set padding to null",
    ),
    "filled to a multiple": (
        put(padding={**PAD, "strategy": "BatchLongest", "pad_to_multiple_of": 8}),
        "set padding to null",
    ),
    "an added word": (added("cat"), "'cat' is taken out of each text"),
    "added spaces": (added("  ", normalized=True), "'  ' is taken out of each text"),
    "an added word with its space": (added("cat", lstrip=True), "is taken out of each text"),
    "a special word": (added("###", special=True), "'###' may stand in any text"),
    "a special space": (added(" the", special=True), "may stand in any text"),
}


def write(folder: Path, base: Values, *changes: Change) -> Path:
    values = json.loads(json.dumps(base))
    for change in changes:
        change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    return folder / "tokenizer.json"


def ids_of(path: Path) -> list[list[int]]:
    """What the library makes of the texts."""
    hf = pytest.importorskip("tokenizers", reason="needs the extra 'oracle'")
    theirs = hf.Tokenizer.from_file(str(path))
    return [theirs.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def plain_ids(base: Values, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return ids_of(write(tmp_path_factory.mktemp("plain"), base))


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_id_is_passed_over(name: str, base: Values, tmp_path: Path) -> None:
    path = write(tmp_path, base, SAME[name])
    ours = read_tokenizer(tmp_path)
    assert ours is not None and [ours.encode(text) for text in TEXTS] == ids_of(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_ids_is_refused_by_name(
    name: str, base: Values, plain_ids: list[list[int]], tmp_path: Path
) -> None:
    change, message = REFUSED[name]
    path = write(tmp_path, base, change)
    assert ids_of(path) != plain_ids  # it would be another tokenizer
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_read_makes_the_ids_of_the_library(
    seed: int, base: Values, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    changes = [*SAME.values(), *(change for change, _ in REFUSED.values())]
    weights = [3] * len(SAME) + [1] * len(REFUSED)
    path = write(tmp_path, base, *rng.choices(changes, weights, k=rng.randint(1, 3)))
    theirs = ids_of(path)
    try:
        ours = read_tokenizer(tmp_path)
    except TokenizerError:
        return
    assert ours is not None and [ours.encode(text) for text in TEXTS] == theirs


SETTINGS = [
    ({"add_prefix_space": True}, r"puts a space before each text \(add_prefix_space\)"),
    ({"add_bos_token": True, "bos_token": "<end>"}, r"before each text \(add_bos_token\)"),
    ({"add_eos_token": True, "eos_token": "<end>"}, r"behind each text \(add_eos_token\)"),
    (
        {"add_bos_token": True, "add_eos_token": True, "bos_token": "<end>"},
        "before .* and .*behind",
    ),
    ({"tokenizer_class": "RobertaTokenizer"}, "of the class 'RobertaTokenizer'"),
    ({"tokenizer_class": ["GPT2Tokenizer"]}, "of the class a list"),
    (
        {"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["m.T", None]}},
        "auto_map",
    ),
    ({"auto_map": ["m.T", None]}, "code of its own"),
    ({"added_tokens_decoder": {"401": {"content": "cat", "special": False}}}, "taken out"),
    ({"added_tokens_decoder": {"401": {"content": ["cat"]}}}, "no content"),
    ({"added_tokens_decoder": {"401": {"content": "###", "special": True}}}, "in any text"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_beside_the_vocabulary_are_refused_by_name(
    settings: Values, message: str, base: Values, tmp_path: Path
) -> None:
    write(tmp_path, base)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json: .*{message}"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for name, content in (("vocab.json", "{}"), ("merges.txt", "")):  # the older form
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"add_prefix_space": False, "add_bos_token": False, "add_eos_token": None},
        {
            "bos_token": {"__type": "AddedToken", "content": "<end>", "lstrip": True},
            "model_max_length": 64,
        },
        {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<end>"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<end>"]},
        {"added_tokens_decoder": {"400": {"content": "<end>", "special": True}}},
    ],
)
def test_other_settings_change_nothing(settings: Values, base: Values, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    write(tmp_path, base)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = read_tokenizer(tmp_path)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]


CLASSES = [
    *("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizer", "PreTrainedTokenizerFast"),
    *("TokenizersBackend", "PythonBackend"),
]
OTHERS = [
    *("RobertaTokenizer", "RobertaTokenizerFast", "Qwen2Tokenizer", "GPTNeoXTokenizerFast"),
    *("BertTokenizer", "T5Tokenizer"),
]


def of_class(folder: Path, base: Values, config: str | None, settings: str | None) -> None:
    write(folder, base)
    described = {"model_type": "gpt2", "tokenizer_class": config}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": settings}))


def theirs_of(folder: Path) -> list[list[int]] | None:
    """What transformers makes of the texts; None where it fails."""
    hf = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    try:
        return [hf.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in TEXTS]
    except Exception:
        return None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("other", [None, "", "RobertaTokenizer"])
def test_classes_that_add_nothing_are_followed(
    name: str, other: str | None, base: Values, tmp_path: Path
) -> None:
    if other == "RobertaTokenizer":  # in the file that does not count
        of_class(tmp_path, base, other, name)
    else:
        of_class(tmp_path, base, name, other)
    ours = read_tokenizer(tmp_path)
    assert ours is not None and [ours.encode(text) for text in TEXTS] == theirs_of(tmp_path)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("settings", [None, "settings"])
def test_classes_that_make_other_ids_are_refused_where_they_count(
    name: str, settings: str | None, base: Values, plain_ids: list[list[int]], tmp_path: Path
) -> None:
    """Whatever pipeline the tokenizer.json beside them describes."""
    of_class(tmp_path, base, *((name, None) if settings is None else ("GPT2Tokenizer", name)))
    assert theirs_of(tmp_path) != plain_ids
    file = "config" if settings is None else "tokenizer_config"
    with pytest.raises(TokenizerError, match=rf"/{file}\.json: .*of the class '{name}'"):
        read_tokenizer(tmp_path)


def test_llama_puts_a_token_before_a_text_by_default(base: Values, tmp_path: Path) -> None:
    of_class(tmp_path, base, "LlamaTokenizerFast", None)  # up to transformers 4
    with pytest.raises(TokenizerError, match="of the class 'LlamaTokenizerFast'"):
        read_tokenizer(tmp_path)


def test_an_added_token_is_special_if_a_role_says_so(base: Values, tmp_path: Path) -> None:
    write(tmp_path, base, added("<pad>"))
    with pytest.raises(TokenizerError, match="mark it as special in the file"):
        read_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    ours = read_tokenizer(tmp_path)
    assert isinstance(ours, BPETokenizer) and ours.special == {"<end>": 400, "<pad>": 401}


def test_a_special_token_that_texts_hold_is_not_handed_on(tmp_path: Path) -> None:
    doubtful = BPETokenizer.from_merges([b"ab"], special={"###": 257})
    with pytest.raises(TokenizerError, match=r"'###' may stand in any text.* Call it '<###>'"):
        write_tokenizer(doubtful, tmp_path, 64)
    assert not any(tmp_path.iterdir())
