"""From a checked HTTP request to engine requests: one for each text of the answer."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tinygpt.config import MAX_CHAT_TOKENS, SampleConfig
from tinygpt.errors import TinyGPTError
from tinygpt.generation.decoder import Logits
from tinygpt.generation.sample import Penalties
from tinygpt.server.engine.scheduler import EngineClosed, QueueFull
from tinygpt.server.engine.scoring import Score, Scored
from tinygpt.server.engine.sequence import Piece, Request
from tinygpt.server.http.refusal import Refusal
from tinygpt.server.openai.choices import Delta
from tinygpt.server.openai.fields import MAX_TOKENS
from tinygpt.server.openai.prompts import Ids, encode, encode_chat, prompts_of
from tinygpt.server.openai.service import Service
from tinygpt.server.openai.shapes import ChatShape, CompletionShape

Body = Mapping[str, Any]

LEAST = 5e-324
"""The smallest number above 0: as top_p it leaves the likeliest token alone."""


@dataclass(frozen=True)
class Job:
    """The work for one HTTP request."""

    shape: CompletionShape
    requests: tuple[Request, ...]
    """One for every text, in the order of the answer."""
    echoes: tuple[Delta, ...]
    """What each text begins with."""
    prompt_tokens: int
    stream: bool
    include_usage: bool
    left_out: int = 0
    """Messages of a chat that found no place in the model's window."""


async def completion_job(service: Service, body: Body) -> Job:
    """The work for a valid body of /v1/completions."""
    given = prompts_of(body["prompt"])
    n = _count(service, body, len(given))
    if body.get("best_of", n) != n:
        raise _conflict("best_of must be as large as n: nothing is ranked.", "best_of")
    logprobs = body.get("logprobs")
    prompts = [await encode(service, each, "prompt") for each in given]
    echoes = [Delta() for _ in prompts]
    firsts: Sequence[Logits | None] = [None for _ in prompts]
    if body.get("echo"):
        echoes, firsts = await _echoes(service, given, prompts, logprobs)
    return Job(
        CompletionShape(service.name, service.tokenizer, logprobs),
        _requests(body, prompts, n, _tokens(service, body, MAX_TOKENS), logprobs, firsts),
        tuple(echo for echo in echoes for _ in range(n)),
        sum(map(len, prompts)),
        *_streaming(body),
    )


async def chat_job(service: Service, body: Body) -> Job:
    """The work for a valid body of /v1/chat/completions."""
    n = _count(service, body, 1)
    for offered, chosen in (("tools", "tool_choice"), ("functions", "function_call")):
        if body.get(offered) and body.get(chosen) != "none":
            message = f"This model calls nothing: leave {offered} out, or set {chosen} to 'none'."
            raise _conflict(message, offered)
    logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    if logprobs is None and body.get("top_logprobs"):
        raise _conflict("top_logprobs needs logprobs to be true.", "top_logprobs")
    max_tokens = _tokens(service, body, MAX_CHAT_TOKENS)
    asked = await encode_chat(service, body["messages"], max_tokens)
    return Job(
        ChatShape(service.name, service.tokenizer, logprobs),
        _requests(body, [asked.ids], n, max_tokens, logprobs, [None], asked.stop, asked.stop_ids),
        tuple(Delta() for _ in range(n)),
        len(asked.ids),
        *_streaming(body),
        left_out=asked.left_out,
    )


def _conflict(message: str, param: str) -> Refusal:
    """For fields that are each valid, and exclude each other."""
    return Refusal(400, message, param=param, code="conflicting_fields")


def _count(service: Service, body: Body, prompts: int) -> int:
    """Texts for each prompt; a Refusal if that makes too many."""
    n: int = body.get("n", 1)
    most = service.limits.choices
    if n * prompts > most:
        message = f"{prompts} prompts with n={n} make {n * prompts} texts; {most} are the most."
        raise _conflict(message, "n")
    return n


def _tokens(service: Service, body: Body, default: int) -> int:
    """Tokens of each text: no more than either field says, nor than the limit."""
    names = ("max_tokens", "max_completion_tokens")
    asked: list[int] = [body[name] for name in names if name in body]
    return min(*(asked or [default]), service.limits.max_tokens)


def _streaming(body: Body) -> tuple[bool, bool]:
    """Whether to stream, and whether to count tokens at the end of the stream."""
    options = body.get("stream_options", {})
    return bool(body.get("stream")), bool(options.get("include_usage"))


def _requests(
    body: Body,
    prompts: Sequence[Ids],
    n: int,
    max_tokens: int,
    logprobs: int | None,
    firsts: Sequence[Logits | None],
    stop: tuple[str, ...] = (),
    ends: tuple[int, ...] = (),
) -> tuple[Request, ...]:
    """Every text has a seed of its own: the seed, the seed + 1, and so on. ``firsts`` are logits
    of the first token, where they are known."""
    config, penalties, seed = sampling_of(body), _penalties(body), seed_of(body)
    stops = stops_of(body) + stop
    texts = [each for each in zip(prompts, firsts, strict=True) for _ in range(n)]
    seeds = [None if seed is None else seed + i for i in range(len(texts))]
    ignore_eos = bool(body.get("ignore_eos"))
    return tuple(
        Request(ids, max_tokens, config, seed, stops, logprobs, first, penalties, ignore_eos, ends)
        for (ids, first), seed in zip(texts, seeds, strict=True)
    )


def stops_of(body: Body) -> tuple[str, ...]:
    """The strings before which a text ends."""
    own = body.get("stop", ())
    return (own,) if isinstance(own, str) else tuple(own)


def sampling_of(body: Body) -> SampleConfig:
    """The settings. Some values switch a filter off, as in other servers."""
    penalty, top_k, top_p = (body.get(k) for k in ("repetition_penalty", "top_k", "top_p"))
    return SampleConfig(
        temperature=float(body.get("temperature", 1)),
        top_k=None if top_k in (0, -1) else top_k,
        top_p=None if top_p is None else top_p or LEAST,
        min_p=body.get("min_p") or None,  # 0 is none
        repetition_penalty=None if penalty == 1 else penalty,
    )


def seed_of(body: Body) -> int | None:
    """The seed; -1 means a random one, as in other servers. Ours are from 0 to 2^64 - 1."""
    seed = body.get("seed", -1)
    return None if seed == -1 else seed % (1 << 64)


def _penalties(body: Body) -> Penalties | None:
    bias = {int(token): float(value) for token, value in body.get("logit_bias", {}).items()}
    presence, frequency = (
        float(body.get(f"{name}_penalty", 0)) for name in ("presence", "frequency")
    )
    return Penalties(presence, frequency, bias) if presence or frequency or bias else None


async def _echoes(
    service: Service, given: Sequence[str | list[int]], prompts: Sequence[Ids], logprobs: int | None
) -> tuple[list[Delta], list[Logits | None]]:
    """Each prompt as the beginning of its texts; if it is scored, logits of the next token."""
    texts = [
        each if isinstance(each, str) else service.tokenizer.decode(ids)
        for each, ids in zip(given, prompts, strict=True)
    ]
    if logprobs is None:
        return [Delta(text) for text in texts], [None] * len(texts)
    scored = await _scored(service, prompts, logprobs)
    echoes = [
        Delta(text, _pieces(service, text, ids, each.tokens))
        for text, ids, each in zip(texts, prompts, scored, strict=True)
    ]
    return echoes, [each.following for each in scored]


async def _scored(service: Service, prompts: Sequence[Ids], count: int) -> list[Scored]:
    """The scores of all prompts, or of none."""
    block_size = service.model.config.block_size
    if max(map(len, prompts)) > block_size:
        message = f"Log probabilities of a prompt (echo) are for {block_size} tokens at most."
        raise Refusal(400, message, param="logprobs", code="context_length_exceeded")
    work: list[Future[Scored]] = []
    try:
        for ids in prompts:
            work.append(service.engine.score(ids, count))
        return await asyncio.gather(*map(asyncio.wrap_future, work))
    except (EngineClosed, QueueFull):
        raise
    except TinyGPTError as error:
        raise Refusal(500, str(error), code="model_failed") from error
    finally:
        for future in work:
            future.cancel()  # where it is not done


def _pieces(service: Service, text: str, ids: Ids, scores: Sequence[Score]) -> list[Piece]:
    """The tokens of a prompt, which begin before the generated text: at negative offsets."""
    decoder, begins = codecs.getincrementaldecoder("utf-8")(errors="replace"), -len(text)
    pieces = []
    for token, (logprob, top) in zip(ids, scores, strict=True):
        raw = service.tokenizer.decode_bytes([token])
        pieces.append(Piece(token, "", logprob, top, raw, begins))
        begins += len(decoder.decode(raw))
    return pieces
