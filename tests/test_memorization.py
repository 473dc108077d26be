"""Passages of the training text in a model's samples: found, measured, and beside honest text."""

from __future__ import annotations

import doctest
import json
import random
from pathlib import Path

import numpy as np
import pytest

from tinygpt.cli import main
from tinygpt.text import overlap as memorization
from tinygpt.text.overlap import as_codes, matches, overlap, overlaps

ALPHABETS = ["ab", "abc", "ab我们的", "abcdefghij \n", "\x00\uffff🐈"]


def naive(sample: str, text: str) -> list[int]:
    lengths = []
    for start in range(len(sample)):
        end = start
        while end < len(sample) and sample[start : end + 1] in text:
            end += 1
        lengths.append(end - start)
    return lengths


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.randint(0, len(text)) for _ in range(3))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(12))
def test_the_longest_passages_are_those_that_a_plain_search_finds(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        alphabet = rng.choice(ALPHABETS)
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 200)))
        samples = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(3)]
        start = rng.randrange(len(text) + 1)
        samples.append(f"xx{text[start : start + 30]}y")
        monkeypatch.setattr(memorization, "PART", rng.choice([8, 50, 1000]))
        lengths, places = matches([as_codes(s) for s in samples], cut(text, rng))
        for sample, found, at in zip(samples, lengths, places, strict=True):
            assert found.tolist() == naive(sample, text)
            for i, (length, place) in enumerate(zip(found.tolist(), at.tolist(), strict=True)):
                assert (place < 0) == (length == 0)
                assert length == 0 or text[place : place + length] == sample[i : i + length]


def noise(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=length))


def test_planted_passages_are_found_at_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    text = noise(20_000, 1)
    long, short = text[7_000:7_120], text[19_940:]
    sample = noise(300, 2) + long + noise(100, 3) + short + noise(40, 4)
    for part in (4_000, 1 << 21):
        monkeypatch.setattr(memorization, "PART", part)
        found = overlap([sample, noise(200, 5)], [text], min_length=50)
        assert found.samples == 2 and found.characters == len(sample) + 200
        lengths = [(p.sample, p.place, p.text) for p in found.passages]
        assert len(lengths) == 2  # the ends may agree by chance with a few characters more
        assert long in lengths[0][2] and short in lengths[1][2]
        assert lengths[0][1] in range(6_990, 7_001) and lengths[1][1] in range(19_930, 19_941)
        assert 180 <= found.covered * found.characters <= 200
        assert 120 <= found.longest <= 130
        assert found.mean_longest < found.longest  # the other one has nothing long


def test_many_small_pieces_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, concatenate = [0], np.concatenate

    def counted(arrays: list[np.ndarray]) -> np.ndarray:
        joined[0] += sum(map(len, arrays))
        return concatenate(arrays)

    monkeypatch.setattr(np, "concatenate", counted)
    monkeypatch.setattr(memorization, "PART", 3000)
    text = noise(20_000, 6)
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    found = list(memorization.parts(pieces, overlapping=100))
    assert joined[0] <= 2 * len(text)  # joining what waits to each piece was 1,500 times that
    assert [begin for begin, _ in found] == [i * 2900 for i in range(7)]
    for begin, part in found:
        assert part.tolist() == as_codes(text[begin : begin + 3000]).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_common_lengths_are_those_of_a_plain_comparison(seed: int) -> None:
    rng = random.Random(seed)
    codes = as_codes("".join(rng.choices("ab", [1, rng.choice([1, 9, 999])], k=300)))
    pairs = [rng.sample(range(300), 2) for _ in range(200)]
    a, b = np.array(pairs).T
    wanted = []
    for i, j in pairs:
        length = 0
        while max(i, j) + length < 300 and codes[i + length] == codes[j + length]:
            length += 1
        wanted.append(length)
    assert memorization.common_length(codes, a, b).tolist() == wanted


def test_a_sample_that_is_all_by_heart_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, lengths = memorization._compared, []

    def counted(*given: np.ndarray) -> np.ndarray:
        lengths.append(compared(*given))
        return lengths[-1]

    monkeypatch.setattr(memorization, "_compared", counted)
    text = noise(10_000, 7)
    assert overlap([text[2000:5000]], [text]).longest == 3000
    assert sum(map(np.sum, lengths)) < 2 * 3000 * memorization.STEP  # each suffix to its end: 4.5 M


@pytest.mark.parametrize("lengths", [[5, 4, 3, 2, 1], [0, 3, 2, 1, 4, 3, 2, 1], [3, 3, 3, 2, 1]])
def test_the_longest_passages_that_do_not_overlap_are_kept(lengths: list[int]) -> None:
    free, wanted = set(range(len(lengths))), []
    for start in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        places = set(range(start, start + lengths[start]))
        if lengths[start] >= 2 and places <= free:
            free -= places
            wanted.append((start, lengths[start]))
    assert list(memorization._apart(np.array(lengths), 2)) == wanted


def test_chinese_is_counted_in_characters() -> None:
    poem = "床前明月光疑是地上霜举头望明月低头思故乡"
    found = overlap([f"他说{poem}。"], [f"一二三{poem}四五"], min_length=10)
    assert (found.longest, found.passages[0].place, found.passages[0].start) == (20, 3, 2)
    assert found.passages[0].text == poem and found.covered == pytest.approx(20 / 23)


def test_no_passage_spans_two_samples_or_leaves_the_text() -> None:
    found = overlaps([["abc", "def"], ["ghi"]], ["xabcdefghi"], min_length=2)
    assert [each.longest for each in found] == [3, 3]
    assert overlap(["abcabc"], ["abc"], min_length=2).longest == 3


def test_overlapping_passages_are_covered_once() -> None:
    found = overlap(["abcdefgh"], ["abcdef_cdefgh"], min_length=6)
    assert found.covered == 1 and len(found.passages) == 1


@pytest.mark.parametrize("samples", [[], [""], ["", "a"]])
@pytest.mark.parametrize("pieces", [[], [""], ["b"]])
def test_nothing_shares_nothing(samples: list[str], pieces: list[str]) -> None:
    found = overlap(samples, pieces, min_length=1)
    assert (found.longest, found.mean_longest, found.covered) == (0, 0, 0)
    assert found.passages == [] and found.samples == len(samples)


def test_a_text_of_one_character_is_no_trap() -> None:
    found = overlap(["a" * 300], ["a" * 50_000], min_length=10)
    assert found.longest == 300 and found.covered == 1


def test_the_examples_of_the_docstrings() -> None:
    found = doctest.testmod(memorization)
    assert found.attempted >= 1 and found.failed == 0


# The command line -------------------------------------------------------------------------------


def story(seed: int, sentences: int) -> str:
    """Sentences that are not foreseen: random names, verbs and numbers."""
    rng = random.Random(seed)
    words = ["Ada", "Bo", "Cyd", "saw", "ate", "hid", "nine", "red", "old", "cats", "eggs", "maps"]
    lines = (" ".join(rng.choices(words, k=8)) for _ in range(sentences))
    return "\n".join(lines) + "\n"


def trained(folder: Path, text: str, steps: int, *flags: str) -> Path:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    shape = "--model.n-layer 1 --model.n-embd 64 --model.n-head 2 --model.block-size 32"
    recipe = (
        f"--tokenizer char --train.batch-size 16 --train.learning-rate 0.01 --train.eval-iters 1 "
        f"--train.max-iters {steps} --train.eval-interval {steps} --train.warmup-steps 5"
    )
    arguments = [*shape.split(), *recipe.split(), *flags, "--out", folder / "run"]
    assert main(["train", str(folder / "text.txt"), *map(str, arguments)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has read a few lines often."""
    text = story(1, 6) + story(2, 3)
    return trained(tmp_path_factory.mktemp("heart"), text, 250, "--val-fraction", "0.3")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has hardly begun to learn."""
    return trained(tmp_path_factory.mktemp("fresh"), story(3, 60), 3)


def memorize(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["memorization", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


SHORT = ["--samples", "3", "--max-tokens", "80", "--temperature", "0", "0.5", "--min-length", "30"]


def test_a_model_that_writes_by_heart_is_told_from_one_that_does_not(
    by_heart: Path, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = memorize(capsys, by_heart, *SHORT, "--json")
    assert code == 0
    found = json.loads(out)
    assert [each["temperature"] for each in found["temperatures"]] == [0, 0.5]
    assert [each["samples"] for each in found["temperatures"]] == [1, 3]
    text = (by_heart.parent / "text.txt").read_text(encoding="utf-8")
    for each in found["temperatures"]:
        assert each["longest"] >= 35 and each["covered"] > 0.5
        for passage in each["passages"]:
            start = passage["place"]
            assert text[start : start + passage["length"]] == passage["text"]
    assert found["held_out"]["covered"] < 0.2
    assert found["held_out"]["longest"] < found["temperatures"][0]["longest"]
    code, out, _ = memorize(capsys, fresh, *SHORT, "--json")
    assert code == 0
    assert all(each["covered"] == 0 for each in json.loads(out)["temperatures"])


def test_the_table_names_passages_places_and_the_baseline(
    by_heart: Path, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = memorize(capsys, by_heart, *SHORT)
    assert code == 0 and "text.txt" in err
    for word in ("temperature 0.5", "mean longest", "held-out text", "from character"):
        assert word in out
    code, out, _ = memorize(capsys, fresh, *SHORT)
    assert code == 0 and "No passage of 30 characters" in out


def test_the_same_seed_finds_the_same(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SHORT[:4], "--temperature", "1", "--min-length", "2", "--json"]
    first, again, other = (memorize(capsys, fresh, *flags, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again
    assert json.loads(first)["temperatures"] != json.loads(other)["temperatures"]


def test_another_text_can_be_given_without_a_held_out_part(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "other.txt"
    text.write_text(story(9, 20), encoding="utf-8")
    flags = [*SHORT, "--data", text, "--val-fraction", "0", "--json"]
    code, out, _ = memorize(capsys, fresh, *flags)
    found = json.loads(out)
    assert code == 0 and found["held_out"] is None and "other.txt" in found["data"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "EMPTY"], "EMPTY"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--samples", "0"], "for --samples. It must be at least 1"),
        (["--min-length", "0"], "for --min-length. It must be at least 1"),
        (["--max-tokens", "0"], "for --max-tokens. It must be at least 1"),
        (["--temperature", "-1"], "temperature"),
        (["--prompt", "§"], "--prompt"),
        (["--prompt", ""], "prompt is empty"),
    ],
)
def test_what_cannot_be_searched_is_said(
    fresh: Path,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").touch()
    code, _, err = memorize(capsys, fresh, *arguments)
    assert code != 0 and said in err


def test_a_checkpoint_without_its_run_asks_for_the_text(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "ckpt_3.safetensors"
    alone.write_bytes((fresh / "ckpt_3.safetensors").read_bytes())
    code, _, err = memorize(capsys, alone)
    assert code != 0 and "--data TEXT.txt" in err
