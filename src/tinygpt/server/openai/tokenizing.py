"""POST /tokenize and /detokenize, as vLLM and llama.cpp have them, and GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinygpt.errors import TokenizerError
from tinygpt.interop.chat_template import chat_template
from tinygpt.server.http.answers import JSONResponse
from tinygpt.server.http.refusal import Refusal
from tinygpt.server.openai.fields import detokenize_schema, tokenize_schema
from tinygpt.server.openai.prompts import messages_of, strange
from tinygpt.server.openai.service import Service
from tinygpt.text.chat import window
from tinygpt.text.tokenizers import Tokenizer

Json = dict[str, Any]


def routes(service: Service) -> list[Route]:
    """The three routes."""
    return [
        Route("/tokenize", partial(_tokenize, service), methods=["POST"]),
        Route("/detokenize", partial(_detokenize, service), methods=["POST"]),
        Route("/tokenizer_info", partial(_info, service), methods=["GET"]),
    ]


async def _tokenize(service: Service, request: Request) -> Response:
    body = await service.body(request, tokenize_schema(service.name, service.limits))
    name = _given(body)
    try:
        ids = await asyncio.to_thread(_ids, service.tokenizer, name, body[name])
    except TokenizerError as error:
        raise Refusal(400, strange(service, name), param=name, code="bad_text") from error
    answer: Json = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": service.model.config.block_size,
    }
    if body.get("return_token_strs"):
        answer["token_strs"] = [_raw(service, token).decode(errors="replace") for token in ids]
    if body.get("with_pieces"):
        answer["tokens"] = [{"id": token, "piece": _piece(_raw(service, token))} for token in ids]
    return JSONResponse(answer)


def _given(body: Json) -> str:
    """The one field that was given."""
    given = [name for name in ("prompt", "content", "messages") if body.get(name) is not None]
    if len(given) != 1:
        message = "Give one text to cut into tokens: as prompt, as content, or as messages."
        raise Refusal(400, message, param="prompt", code="conflicting_fields")
    return given[0]


def _ids(tokenizer: Tokenizer, name: str, value: Any) -> list[int]:
    """The tokens of a text, or of a whole chat up to where the assistant is to speak."""
    if name != "messages":
        return tokenizer.encode(value)
    rendered = window.chat_template(tokenizer).render(tokenizer, messages_of(value), answer=True)
    ids: list[int] = rendered.ids.tolist()
    return ids


def _raw(service: Service, token: int) -> bytes:
    return service.tokenizer.decode_bytes([token])


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or, as in llama.cpp, its bytes where they are no whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def _detokenize(service: Service, request: Request) -> Response:
    schema = detokenize_schema(service.name, service.vocab_size, service.limits)
    body = await service.body(request, schema)
    try:
        text = await asyncio.to_thread(service.tokenizer.decode, [int(i) for i in body["tokens"]])
    except TokenizerError as error:
        message = "tokens holds an id that the vocabulary leaves out."
        raise Refusal(400, message, param="tokens", code="invalid_value") from error
    return JSONResponse({"prompt": text, "content": text})  # vLLM's name for it, and llama.cpp's


async def _info(service: Service, request: Request) -> Response:
    """lm-evaluation-harness asks for this before it uses a remote tokenizer."""
    return JSONResponse(
        {
            "tokenizer_class": service.tokenizer.kind,
            "vocab_size": service.vocab_size,
            "model_max_length": service.model.config.block_size,
            "bos_token": None,
            "eos_token": None,
            "chat_template": chat_template(service.tokenizer),
        }
    )
