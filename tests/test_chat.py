"""``tinygpt chat``: a talk in a terminal, and through a pipe."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_end_of_text import saying
from tinygpt.cli import main
from tinygpt.config import GPTConfig, SampleConfig
from tinygpt.errors import DataError, TokenizerError, UsageError
from tinygpt.generation.dialogue import Dialogue
from tinygpt.text.chat.template import MARKED, PLAIN
from tinygpt.text.tokenizers import END, MARKERS, TURN_END, ByteTokenizer, CharTokenizer

TOKENIZER = ByteTokenizer().with_specials([END, *MARKERS])
CONFIG = GPTConfig(block_size=96, vocab_size=272, n_layer=1, n_head=1, n_embd=16)
ANSWERING = {ord("a"): 30.0, ord("b"): 30.0, TOKENIZER.special_id(TURN_END): 27.5}
ENDLESS = {ord("a"): 30.0}
PATIENCE = 90.0
"""Seconds after which a test gives up; nothing takes so long."""

Chat = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that answer with some letters, one that never ends, and one without a template."""
    folder = tmp_path_factory.mktemp("talking")
    plain = ByteTokenizer()
    saying(ANSWERING, CONFIG).save_checkpoint(1, None, folder / "answering", tokenizer=TOKENIZER)
    saying(ENDLESS, CONFIG).save_checkpoint(1, None, folder / "endless", tokenizer=TOKENIZER)
    saying(ENDLESS, CONFIG).save_checkpoint(1, None, folder / "base", tokenizer=plain)
    return folder


@pytest.fixture
def chat(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """A talk through a pipe: -> exit code, lines of stdout, stderr."""

    def talk(questions: str | bytes, *arguments: object, run: str = "answering"):
        given = questions if isinstance(questions, bytes) else questions.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        words = ["chat", str(runs / run), "--seed", "4", *map(str, arguments)]
        code = main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), err

    return talk


def test_each_line_is_a_question_and_its_answer_a_line(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    code, answers, err = chat(
        f"你好吗。\n\nAnd?\r\n/save {file}\n", "--system", "Be 短.", "--max-tokens", 9
    )
    assert code == 0 and len(answers) == 2 and err == f"Saved to {file}.\n"
    assert all(answer and set(answer) <= set("ab") for answer in answers)
    [line] = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["messages"] == [
        {"role": "system", "content": "Be 短."},
        {"role": "user", "content": "你好吗。"},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": answers[1]},
    ]
    assert chat("你好吗。\nAnd?\n", "--max-tokens", 9)[1] == answers  # the same seed


def test_commands_change_the_talk(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    said = ["one", "/retry", "two", "/undo", "/system Be brief.", "/system", f"/save {file}"]
    said += ["/reset", "/system -", "//three", f"/save {file}", "/exit", "never asked"]
    code, answers, err = chat("\n".join(said))
    assert code == 0 and len(answers) == 4 and answers[0] != answers[1]
    assert "Taken back: two" in err and err.count("The system says: Be brief.") == 2
    first, second = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert first == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": answers[1]},
    ]
    assert second == [
        {"role": "user", "content": "/three"},
        {"role": "assistant", "content": answers[3]},
    ]
    assert all(name in chat("/help")[2] for name in ("/reset", "/undo", "/retry", "/save FILE"))


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("/unod", "There is no command '/unod'. Did you mean '/undo'?"),
        ("/undo", "nothing was asked yet"),
        ("/retry", "nothing was asked yet"),
        ("/save", "Give a file"),
        ("/save x.jsonl", "There is no talk yet"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_talk_goes_on(
    chat: Chat, line: str, advice: str
) -> None:
    code, answers, err = chat(f"{line}\none\n")
    assert code == 1 and len(answers) == 1 and advice in err


def test_no_other_file_is_written_to(chat: Chat, tmp_path: Path) -> None:
    for content in (b"text", b'{"a": 1}\n', b'{"messages": []}', b"\xff\n"):
        file = tmp_path / "kept"
        file.write_bytes(content)
        code, _, err = chat(f"one\n/save {file}\n/save {tmp_path}\n/save {tmp_path}/no/x\n")
        assert code == 1 and "is no file of talks" in err and err.count("could not be written") == 2
        assert file.read_bytes() == content


def test_the_oldest_turns_leave_and_that_is_said(chat: Chat) -> None:
    _, answers, err = chat("".join(f"question {i}\n" for i in range(8)), "--max-tokens", "20")
    assert len(answers) == 8
    assert "The window is full: messages that have left it, the oldest first: 2." in err
    assert "This question is longer than the model's window" in chat("x" * 200)[2]


def test_a_model_without_a_template_says_what_to_do(chat: Chat) -> None:
    code, answers, err = chat("Hi\nAnd?\n", "--max-tokens", 5, run="base")
    assert (code, answers) == (0, ["aaaaa", "aaaaa"])
    assert err.count("This model has no chat template") == 1 and "tinygpt train CHATS.jsonl" in err


def test_the_snippet_of_the_documentation_prints_what_it_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "chat.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.rsplit("# ", 1)[1].strip()


def test_input_that_is_no_text_is_explained(chat: Chat) -> None:
    code, _, err = chat(b"one\n\xff\n")
    assert code == 1 and "not UTF-8" in err


def dialogue(scores: dict[int, float], tokenizer=TOKENIZER, **more) -> Dialogue:
    from dataclasses import replace

    model = saying(scores, replace(CONFIG, vocab_size=max(tokenizer.vocab_size, 3)))
    return Dialogue(model.decoder, tokenizer, **more)


def test_an_answer_that_is_stopped_stays_and_an_empty_one_does_not() -> None:
    talk = dialogue(ENDLESS, max_tokens=50)
    answer = talk.say("one")
    assert [next(answer), next(answer)] == ["a", "a"]
    answer.close()
    assert talk.said == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "aa"},
    ]
    silent = dialogue({TOKENIZER.special_id(TURN_END): 30.0})
    assert list(silent.say("one")) == [] and silent.said == []


def test_plain_text_loses_the_template_s_white_space() -> None:
    talk = dialogue({ord(" "): 30.0, ord("x"): 29.0}, ByteTokenizer(), max_tokens=20, seed=3)
    shown = "".join(talk.say("Hi"))
    assert shown.startswith("x") and talk.said[-1]["content"] == shown == shown.strip()


def test_a_model_answers_in_python_what_it_answers_in_a_talk() -> None:
    for tokenizer in (TOKENIZER, ByteTokenizer().with_template(PLAIN.to_dict())):
        scores = {ord(" "): 30.0, ord("x"): 29.0, ord("y"): 29.0}
        model = saying(scores, CONFIG)
        talk = Dialogue(model.decoder, tokenizer, SampleConfig(0.9), 20, seed=3, system="Hm.")
        first = "".join(talk.say("Hi"))
        told = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Hi"}]
        settings = {"max_tokens": 20, "temperature": 0.9}
        pieces = model.chat(told, tokenizer, seed=3, **settings)
        assert next(pieces) and "".join(model.chat(told, tokenizer, seed=3, **settings)) == first
        said = [*told, {"role": "assistant", "content": first}, {"role": "user", "content": "?"}]
        again = "".join(model.chat(said, tokenizer, seed=4, **settings))
        assert again == "".join(talk.say("?"))
        cut = "".join(model.chat(told, tokenizer, seed=3, stop="y", **settings))
        assert first.startswith(cut) and "y" not in cut


def test_without_a_template_or_messages_it_is_said_what_to_do() -> None:
    model, asked = saying(ENDLESS, CONFIG), [{"role": "user", "content": "Hi"}]
    for tokenizer in (None, ByteTokenizer()):
        with pytest.raises(UsageError, match=r"no chat template.*with_template"):
            model.chat(asked, tokenizer)
    for given in ("Hi", [], ["Hi"], [{"role": "tool", "content": "Hi"}], [{"role": "user"}]):
        with pytest.raises(DataError):
            model.chat(given, TOKENIZER)


def test_a_character_that_the_vocabulary_lacks_leaves_the_talk_as_it_was() -> None:
    talk = dialogue({1: 30.0}, CharTokenizer("".join(sorted("User: Asitn\naH"))), max_tokens=2)
    list(talk.say("Hi"))
    before = list(talk.said)
    with pytest.raises(TokenizerError):
        talk.say("€")
    assert talk.said == before


@pytest.mark.parametrize(("tokenizer", "template"), [(TOKENIZER, MARKED), (ByteTokenizer(), PLAIN)])
def test_the_model_reads_the_template_s_tokens(monkeypatch, tokenizer, template) -> None:
    """What reaches the model is the rendering of the talk, in every turn."""
    from tinygpt.generation import dialogue as module

    seen = []
    monkeypatch.setattr(
        module, "continued", lambda model, own, ids, *_: (seen.append(list(ids)), iter(["ok"]))[1]
    )
    talk = Dialogue(saying(ENDLESS, CONFIG).decoder, tokenizer, SampleConfig(), 8, system="Hm.")
    for question in ("a", "<|user|>"):
        asked = [*talk.messages, {"role": "user", "content": question}]
        list(talk.say(question))
        assert seen[-1] == template.render(tokenizer, asked, answer=True).ids.tolist()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")])
def test_the_prompt_is_plain_where_colours_are_not_wanted(monkeypatch, name, value) -> None:
    from tinygpt.cli.chatting import PROMPT, _prompt

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert _prompt() != PROMPT
    monkeypatch.setenv(name, value)
    assert _prompt() == PROMPT


def test_ctrl_c_at_the_prompt_ends_nothing(capsys, monkeypatch) -> None:
    from tinygpt.cli import chatting

    lines = iter([KeyboardInterrupt, "one", "/undo", KeyboardInterrupt, EOFError, "never asked"])

    def asked(prompt: str) -> str:
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(chatting, "_asked", asked)
    talk = dialogue(ENDLESS, max_tokens=3)
    assert chatting._talk(talk) == 0 and talk.said == [] and next(lines) == "never asked"
    out, err = capsys.readouterr()
    assert out == "aaa\n" and err.count("Ctrl-D or /exit ends the talk") == 2


# In a terminal ----------------------------------------------------------------------------------


class Terminal:
    """A talk in a terminal of its own."""

    def __init__(self, run: Path, environment: dict[str, str]) -> None:
        import pty

        self.fd, child = pty.openpty()
        words = ["chat", str(run), "--max-tokens", str(10**9)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tinygpt", *words],
            stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(child)
        self.heard = b""

    def expect(self, text: str) -> str:
        """Read up to a text; -> what came, with it."""
        end, wanted = time.monotonic() + PATIENCE, text.encode()
        while wanted not in self.heard:
            assert time.monotonic() < end, (text, self.heard[-2000:])
            if select.select([self.fd], [], [], 0.2)[0]:
                self.heard += os.read(self.fd, 65536)
        before, _, self.heard = self.heard.partition(wanted)
        return (before + wanted).decode()

    def write(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(
    runs: Path, child_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = {**child_environment, "TERM": "xterm", "PYTHONUTF8": "1"}
    environment.pop("NO_COLOR", None)
    terminal = Terminal(runs / "endless", environment)
    try:
        start = terminal.expect("> ")
        assert "/help lists commands" in start and "\x1b[1m" in start
        terminal.write("你好\n")
        terminal.expect("a" * 20)
        terminal.write("\x03")
        terminal.expect("stopped; what was written stays in the talk")
        terminal.expect("> ")
        terminal.write(f"/save {tmp_path / 'talk.jsonl'}\n")
        terminal.expect("Saved to")
        terminal.expect("> ")
        terminal.write("\x04")
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()
    [line] = (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()
    question, answer = json.loads(line)["messages"]
    assert question["content"] == "你好" and set(answer["content"]) == {"a"}
