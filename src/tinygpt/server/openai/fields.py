"""What a request may hold: the fields of OpenAI's two endpoints, with our bounds.

A field that asks for nothing that cannot be done is accepted. One that would change the text is
done, or refused by its name: those that are understood only at values that ask for nothing are
`_neutral`. Fields that nobody here has heard of are accepted too, and named in a header of the
answer (see `ignored`), unless the API is strict.
"""

from __future__ import annotations

from typing import Any

from tinygpt.server.http.limits import Limits
from tinygpt.server.openai.schema import Schema

LARGEST_SEED = (1 << 63) - 1
LARGEST_COUNT = (1 << 31) - 1
MAX_TOKENS = 16
"""Tokens of a completion that names no number, as with OpenAI."""
MAX_CHAT_TOKENS = 256
"""Tokens of an answer in a chat that names no number: a base model seldom ends by itself."""

Fields = dict[str, Any]


def completion_schema(name: str, vocab_size: int, limits: Limits, strict: bool = False) -> Schema:
    """The body of POST /v1/completions."""
    prompt = _prompt(vocab_size, limits)
    fields = {
        "model": _model(name),
        "prompt": prompt,
        "max_tokens": _tokens(limits, MAX_TOKENS),
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
    return _body(fields, "prompt", strict=strict)


def _prompt(vocab_size: int, limits: Limits) -> Schema:
    tokens = _ids(vocab_size, limits.prompt_tokens)
    text = {"type": "string", "minLength": 1}
    several = {"type": "array", "minItems": 1, "maxItems": limits.choices}
    return {
        "anyOf": [text, {**several, "items": text}, tokens, {**several, "items": tokens}],
        "description": "Text or token ids to continue, one or several.",
    }


def _ids(vocab_size: int, most: int, least: int = 1) -> Schema:
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    return {"type": "array", "minItems": least, "maxItems": most, "items": token}


def chat_schema(name: str, limits: Limits, strict: bool = False) -> Schema:
    """The body of POST /v1/chat/completions."""
    fields = {
        "model": _model(name),
        "messages": _messages(limits, strict),
        "max_tokens": _tokens(limits, MAX_CHAT_TOKENS),
        "max_completion_tokens": _tokens(limits, MAX_CHAT_TOKENS),
        **_sampling(limits),
        "logprobs": _optional("boolean", "Tell log probabilities of the tokens."),
        "top_logprobs": _optional(
            "integer",
            "And of this many likeliest ones; needs logprobs.",
            minimum=0,
            maximum=limits.top_logprobs,
        ),
        "tools": _optional("array", f"None, unless tool_choice is none: {CALLS}."),
        "functions": _optional("array", f"None, unless function_call is none: {CALLS}."),
        "tool_choice": _neutral("none", "auto", None),
        "function_call": _neutral("none", "auto", None),
        "parallel_tool_calls": _optional("boolean", NOTHING),
        "modalities": _neutral(["text"], None),
        "audio": _neutral(None),
        "web_search_options": _neutral(None),
        "reasoning_effort": _neutral("none", None),
        "verbosity": _neutral("medium", None),
        "prediction": _optional("object", NOTHING),
        "echo": _neutral(False, None),
        "add_generation_prompt": _neutral(True, None),
        "continue_final_message": _neutral(False, None),
        "chat_template": _neutral(None),
    }
    return _body(fields, "messages", strict=strict)


def tokenize_schema(name: str, limits: Limits) -> Schema:
    """The body of POST /tokenize: what vLLM takes, and what llama.cpp does."""
    text = {"type": ["string", "null"]}
    fields = {
        "model": _model(name),
        "prompt": {**text, "description": "Text to cut into tokens."},
        "content": {**text, "description": "The same, as llama.cpp calls it."},
        "messages": {**_messages(limits), "type": ["array", "null"]},
        "add_special_tokens": _optional("boolean", NOTHING),
        "add_special": _optional("boolean", NOTHING),
        "add_generation_prompt": _neutral(True, None),
        "return_token_strs": _optional("boolean", "Tell the text of each token."),
        "with_pieces": _optional("boolean", "Tell tokens as objects with id and piece."),
    }
    return _body(fields)


def detokenize_schema(name: str, vocab_size: int, limits: Limits) -> Schema:
    """The body of POST /detokenize, of vLLM and llama.cpp alike."""
    ids = _ids(vocab_size, limits.body_bytes, least=0)
    return _body({"model": _model(name), "tokens": ids}, "tokens")


def _body(fields: Fields, *required: str, strict: bool = False) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": not strict,
    }


def _model(name: str) -> Schema:
    return {"enum": [name, None], "description": "May be left out: there is only one."}


def _messages(limits: Limits, strict: bool = False) -> Schema:
    return {
        "type": "array",
        "minItems": 1,
        "maxItems": limits.messages,
        "items": _message(strict),
        "description": "What was said so far.",
    }


def _message(strict: bool) -> Schema:
    """A turn, and what clients hand back of an answer that was one."""
    text = {"type": "string"}
    part = {
        "type": "object",
        "properties": {"type": {"enum": ["text"]}, "text": text},
        "required": ["type", "text"],
        "additionalProperties": not strict,
    }
    refusal = {
        "type": "object",
        "properties": {"type": {"enum": ["refusal"]}, "refusal": text},
        "required": ["type", "refusal"],
        "additionalProperties": not strict,
    }
    several = {"type": "array", "items": {"anyOf": [part, refusal]}}
    return {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [text, several, {"type": "null"}]},
            "name": _optional("string", "Changes nothing: the template knows two speakers."),
            "refusal": _optional("string", "Stands for a missing content."),
            "tool_calls": {**_optional("array", "None: nothing was called."), "maxItems": 0},
            "function_call": _neutral(None),
            "tool_call_id": _neutral(None),
            "audio": _neutral(None),
            "annotations": _optional("array", NOTHING),
        },
        "required": ["role"],
        "additionalProperties": not strict,
    }


def _sampling(limits: Limits) -> Fields:
    """What both endpoints have in common."""
    string = {"type": "string", "minLength": 1, "maxLength": limits.stop_length}
    return {
        "n": _optional("integer", "Texts for each prompt.", minimum=1, maximum=limits.choices),
        "temperature": _optional("number", "0 is greedy.", minimum=0, maximum=2),
        "top_p": _optional("number", "Nucleus sampling; 0 is greedy.", minimum=0, maximum=1),
        "top_k": _optional(
            "integer",
            "Among this many likeliest; 0 and -1: all.",
            minimum=-1,
            maximum=LARGEST_COUNT,
        ),
        "min_p": _optional("number", "Drop what is less likely.", minimum=0, maximum=1),
        "repetition_penalty": _optional("number", "1 is none.", minimum=0.1, maximum=10),
        "presence_penalty": _optional(
            "number", "Off the logit of each token written before.", minimum=-2, maximum=2
        ),
        "frequency_penalty": _optional("number", "As often as it was.", minimum=-2, maximum=2),
        "logit_bias": {
            "type": ["object", "null"],
            "properties": {},
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "description": "Added to the logits of tokens, by their ids.",
        },
        "stop": {
            "anyOf": [
                string,
                {"type": "array", "maxItems": limits.stops, "items": string},
                {"type": "null"},
            ],
            "description": "End before these strings.",
        },
        "ignore_eos": _optional("boolean", "Go on behind the token that ends a text."),
        "seed": _optional(
            "integer",
            "One seed, one text; -1: a random one.",
            minimum=-LARGEST_SEED - 1,
            maximum=LARGEST_SEED,
        ),
        "stream": _optional("boolean", "Send the text as it is written, as server-sent events."),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {
                "include_usage": _optional("boolean", "Count tokens in a last event."),
                "include_obfuscation": _optional("boolean", NOTHING),
            },
            "additionalProperties": True,
            "description": "How to stream, if it is one.",
        },
        "response_format": {
            "type": ["object", "null"],
            "properties": {"type": {"enum": ["text"]}},
            "required": ["type"],
            "additionalProperties": True,
            "description": "Only text.",
        },
        "user": _optional("string", NOTHING, maxLength=256),
        "metadata": _optional("object", NOTHING),
        "store": _optional("boolean", NOTHING),
        **{name: _optional("string", NOTHING) for name in REMARKS},
        **{name: _neutral(*values, None) for name, values in OTHERS.items()},
    }


NOTHING = "Changes nothing."
CALLS = "the model calls nothing"
REMARKS = ("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""OpenAI's words to its own machinery."""
OTHERS: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "grammar": ("",),
    "json_schema": (),
    "n_predict": (),
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
}
"""What would change the text in vLLM or llama.cpp, at the values that do not."""


def _tokens(limits: Limits, default: int) -> Schema:
    return _optional(
        "integer",
        f"Most tokens of each text; {default} if left out, {limits.max_tokens} at most.",
        minimum=0,
        maximum=LARGEST_SEED,
    )


def _optional(kind: str, description: str, **bounds: float) -> Schema:
    """As in OpenAI's own API null stands for what is left out."""
    return {"type": [kind, "null"], **bounds, "description": description}


def _neutral(*values: Any) -> Schema:
    """A field that is understood only where it asks for nothing."""
    return {"enum": list(values), "description": "Only at the value that changes nothing."}
