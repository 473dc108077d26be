"""From a request's next tokens to what its stream brings: text, probabilities, an end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tinygpt.generation.batching import Line
from tinygpt.generation.sample import first_choice, likeliest, log_probabilities
from tinygpt.generation.stream import StopStrings
from tinygpt.server.engine.sequence import FinishReason, Piece, Stream
from tinygpt.text.tokenizers import TextStream, Tokenizer, ends_of


class Writer:
    """A request with a place: what its next token depends on, and what becomes of it."""

    def __init__(self, stream: Stream, line: Line, tokenizer: Tokenizer) -> None:
        request = stream.request
        self.stream, self.line = stream, line
        self.choice = first_choice(
            request.config, request.seed, request.penalties, len(request.ids)
        )
        self._left, self._logprobs = request.max_tokens, request.logprobs
        self._text, self._stop = TextStream(tokenizer), StopStrings(request.stop)
        self._ends = () if request.ignore_eos else ends_of(tokenizer)

    def advance(self, token: int, logits: npt.NDArray[np.float32]) -> FinishReason | None:
        """Pass on the token, chosen from logits (V,); -> why it is the last one, if it is."""
        self.line.ids.append(token)
        self._left -= 1
        ended = token in self._ends
        text = "" if ended else self._stop.push(self._text.push(token))
        if ended or self._left == 0:
            text += self._stop.push(self._text.flush()) + self._stop.flush()
        if self._logprobs is None:
            self.stream.put(Piece(token, text))
        else:
            logs = log_probabilities(logits)
            top = tuple((i, float(logs[i])) for i in likeliest(logs, self._logprobs))
            self.stream.put(Piece(token, text, float(logs[token]), top))
        return "stop" if ended or self._stop.stopped else "length" if self._left == 0 else None
