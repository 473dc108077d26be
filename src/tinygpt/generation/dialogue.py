"""A conversation with a model: what was said, and the next answer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

from tinygpt.config import MAX_CHAT_TOKENS, SampleConfig
from tinygpt.files.strict_json import to_json
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.stream import continued
from tinygpt.text.chat.window import Asked, ask, chat_template
from tinygpt.text.tokenizers import Tokenizer

Answer = Generator[str, None, None]
"""The pieces of an answer. Closing it ends the answer."""


def answer_to(
    asked: Asked,
    model: Decoder,
    tokenizer: Tokenizer,
    max_tokens: int,
    config: SampleConfig,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The pieces of an answer; white space around plain text is the template's and left out."""
    ends = (*stop, *asked.stop)
    pieces = continued(model, tokenizer, asked.ids, max_tokens, config, seed, ends, asked.stop_ids)
    return _stripped(pieces) if chat_template(tokenizer).space else pieces


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces that joined have no white space at either end."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            begun = True
            yield shown


@dataclass
class Dialogue:
    """What was said so far, and how answers are written.

    >>> for piece in dialogue.say("Who are you?"):
    ...     print(piece, end="", flush=True)
    """

    model: Decoder
    tokenizer: Tokenizer
    config: SampleConfig = field(default_factory=SampleConfig)
    max_tokens: int = MAX_CHAT_TOKENS
    """Tokens of an answer at most."""
    seed: int | None = None
    """The same seed gives the same answers to the same questions; None: other ones each time."""
    stop: Sequence[str] = ()
    """Texts before which an answer ends, besides those of the template."""
    system: str = ""
    """What the model is told before everything else; nothing if it is empty."""
    said: list[dict[str, str]] = field(default_factory=list)
    """Questions and answers by turns, as messages."""
    remark: str = ""
    """What a person should know of the last prompt, such as that turns have left the window."""
    answers: int = 0
    """Answers that were begun: each has a seed of its own."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole talk in OpenAI's form, with what the system says."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        return [*told, *self.said]

    def say(self, question: str) -> Answer:
        """Ask; the answer comes piece by piece.

        It belongs to the talk when the iterator ends or is closed, as far as it has come. A
        question without an answer does not. Raises TokenizerError at once for a character that the
        vocabulary lacks.
        """
        question_and = [{"role": "user", "content": question}]
        asked = ask(
            self.tokenizer,
            [*self.messages, *question_and],
            self.model.model.config.block_size,
            self.max_tokens,
        )
        self.remark = asked.remark
        return self._answer(question, self._pieces(asked))

    def again(self) -> Answer | None:
        """Another answer to the last question; None where there is none."""
        question = self.undo()
        return None if question is None else self.say(question)

    def undo(self) -> str | None:
        """Take back the last question with its answer; -> the question, or None."""
        if not self.said:
            return None
        question = self.said[-2]["content"]
        del self.said[-2:]
        return question

    def line(self) -> str:
        """The talk as a line of JSON, which ``tinygpt train`` reads."""
        return to_json({"messages": self.messages}, unicode=True)

    def _pieces(self, asked: Asked) -> Iterator[str]:
        seed = None if self.seed is None else self.seed + self.answers
        self.answers += 1
        return answer_to(
            asked, self.model, self.tokenizer, self.max_tokens, self.config, seed, self.stop
        )

    def _answer(self, question: str, pieces: Iterator[str]) -> Answer:
        """The pieces, which become a turn."""
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:
            if answer:
                self.said += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
