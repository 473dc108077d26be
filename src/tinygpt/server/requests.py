"""What a request may hold: the fields of OpenAI's two endpoints, with our bounds."""

from __future__ import annotations

from typing import Any

from tinygpt.server.limits import Limits
from tinygpt.server.schema import Schema

LARGEST_SEED = (1 << 63) - 1
MAX_TOKENS = 16
"""Tokens of a completion that names no number, as with OpenAI."""
MAX_CHAT_TOKENS = 256
"""Tokens of an answer in a chat that names no number: a base model seldom ends by itself."""

Fields = dict[str, Any]


def completion_schema(name: str, vocab_size: int, limits: Limits) -> Schema:
    """The body of POST /v1/completions."""
    tokens = {
        "type": "array",
        "minItems": 1,
        "maxItems": limits.prompt_tokens,
        "items": {"type": "integer", "minimum": 0, "maximum": vocab_size - 1},
    }
    text = {"type": "string", "minLength": 1}
    several = {"type": "array", "minItems": 1, "maxItems": limits.choices}
    prompt = {
        "anyOf": [text, {**several, "items": text}, tokens, {**several, "items": tokens}],
        "description": "Text or token ids to continue, one or several.",
    }
    fields = {
        "model": _model(name),
        "prompt": prompt,
        "max_tokens": _tokens(0, limits, MAX_TOKENS),
        **_sampling(limits),
        "best_of": _optional("integer", "As many as n.", minimum=1, maximum=limits.choices),
        "logprobs": _optional(
            "integer",
            "Tell log probabilities of the tokens, and of this many likeliest ones.",
            minimum=0,
            maximum=limits.logprobs,
        ),
        "echo": _optional("boolean", "Begin each text with its prompt."),
        "suffix": _neutral("", None),
    }
    return _body(fields, "prompt")


def chat_schema(name: str, limits: Limits) -> Schema:
    """The body of POST /v1/chat/completions."""
    fields = {
        "model": _model(name),
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": limits.messages,
            "items": _message(),
            "description": "What was said so far.",
        },
        "max_tokens": _tokens(1, limits, MAX_CHAT_TOKENS),
        "max_completion_tokens": _tokens(1, limits, MAX_CHAT_TOKENS),
        **_sampling(limits),
        "logprobs": _optional("boolean", "Tell log probabilities of the tokens."),
        "top_logprobs": _optional(
            "integer",
            "And of this many likeliest ones; needs logprobs.",
            minimum=0,
            maximum=limits.top_logprobs,
        ),
        "response_format": {
            "type": ["object", "null"],
            "properties": {"type": {"enum": ["text"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        "tools": {"type": ["array", "null"], "maxItems": 0},
        "tool_choice": _neutral("none", None),
        "store": _neutral(False, None),
    }
    return _body(fields, "messages")


def _body(fields: Fields, required: str) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": [required],
        "additionalProperties": False,
    }


def _model(name: str) -> Schema:
    return {"type": "string", "enum": [name], "description": "May be left out: there is only one."}


def _message() -> Schema:
    text = {"type": "string"}
    part = {
        "type": "object",
        "properties": {"type": {"enum": ["text"]}, "text": text},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [text, {"type": "array", "minItems": 1, "items": part}]},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    }


def _sampling(limits: Limits) -> Fields:
    """What both endpoints have in common."""
    string = {"type": "string", "minLength": 1, "maxLength": limits.stop_length}
    return {
        "n": _optional("integer", "Texts for each prompt.", minimum=1, maximum=limits.choices),
        "temperature": _optional("number", "0 is greedy.", minimum=0, maximum=2),
        "top_p": _optional("number", "Nucleus sampling.", exclusiveMinimum=0, maximum=1),
        "top_k": _optional(
            "integer", "Among this many likeliest.", minimum=1, maximum=(1 << 31) - 1
        ),
        "min_p": _optional("number", "Drop what is less likely.", minimum=0, maximum=1),
        "repetition_penalty": _optional("number", "1 is none.", minimum=0.1, maximum=10),
        "stop": {
            "anyOf": [
                string,
                {"type": "array", "maxItems": limits.stops, "items": string},
                {"type": "null"},
            ],
            "description": "End before these strings.",
        },
        "ignore_eos": _optional("boolean", "Go on behind the token that ends a text."),
        "seed": _optional("integer", "One seed, one text.", minimum=0, maximum=LARGEST_SEED),
        "stream": _optional("boolean", "Send the text as it is written, as server-sent events."),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {
                "include_usage": _optional("boolean", "Count tokens in a last event."),
                "include_obfuscation": _neutral(False, None),
            },
            "additionalProperties": False,
            "description": "Only with stream.",
        },
        "presence_penalty": _neutral(0, None),
        "frequency_penalty": _neutral(0, None),
        "logit_bias": {
            "type": ["object", "null"],
            "properties": {},
            "additionalProperties": False,
            "description": "Only empty.",
        },
        "user": _optional("string", "Changes nothing.", maxLength=256),
    }


def _tokens(low: int, limits: Limits, default: int) -> Schema:
    return _optional(
        "integer",
        f"Most tokens of each text; {default} if left out.",
        minimum=low,
        maximum=limits.max_tokens,
    )


def _optional(kind: str, description: str, **bounds: float) -> Schema:
    """As in OpenAI's own API null stands for what is left out."""
    return {"type": [kind, "null"], **bounds, "description": description}


def _neutral(*values: Any) -> Schema:
    """A field of OpenAI's that is understood only where it asks for nothing."""
    return {"enum": list(values), "description": "Only at the value that changes nothing."}
