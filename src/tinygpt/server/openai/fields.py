"""What a request may hold: the fields of OpenAI's two endpoints, with our bounds.

A field that would change the text is either implemented or refused by name. Of some that are not
implemented, the values that change nothing are accepted: those fields are `_neutral`. Unknown
fields are accepted too, and named in a header of the answer (`Service.ignored`), unless the API
is strict.
"""

from __future__ import annotations

from typing import Any

from tinygpt.config import MAX_CHAT_TOKENS
from tinygpt.server.http.limits import Limits
from tinygpt.server.openai.schema import Schema, object_schema

LARGEST_SEED = (1 << 63) - 1
LARGEST_COUNT = (1 << 31) - 1
MAX_TOKENS = 16
"""Tokens of a completion without ``max_tokens``, as with OpenAI."""

Fields = dict[str, Any]


def completion_schema(name: str, vocab_size: int, limits: Limits, strict: bool = False) -> Schema:
    """The body of POST /v1/completions."""
    prompt = _prompt(vocab_size, limits)
    fields = {
        "model": _model(name),
        "prompt": prompt,
        "max_tokens": _tokens(limits, MAX_TOKENS),
        **_sampling(limits),
        "best_of": _whole("As many as n.", 1, limits.choices),
        "logprobs": _whole(LOGPROBS, 0, limits.logprobs),
        "echo": _flag("Begin each text with its prompt."),
        "suffix": _neutral("", None),
    }
    return object_schema(fields, "prompt", strict=strict)


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
        "logprobs": _flag("Tell log probabilities of the tokens."),
        "top_logprobs": _whole(TOP_LOGPROBS, 0, limits.top_logprobs),
        "tools": _optional("array", f"None, unless tool_choice is none: {CALLS}."),
        "functions": _optional("array", f"None, unless function_call is none: {CALLS}."),
        "tool_choice": _neutral("none", "auto", None),
        "function_call": _neutral("none", "auto", None),
        "parallel_tool_calls": _flag(NOTHING),
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
    return object_schema(fields, "messages", strict=strict)


def tokenize_schema(name: str, limits: Limits) -> Schema:
    """The body of POST /tokenize: what vLLM takes, and what llama.cpp does."""
    text = {"type": ["string", "null"]}
    fields = {
        "model": _model(name),
        "prompt": {**text, "description": "Text to cut into tokens."},
        "content": {**text, "description": "The same, as llama.cpp calls it."},
        "messages": {**_messages(limits), "type": ["array", "null"]},
        "add_special_tokens": _flag(NOTHING),
        "add_special": _flag(NOTHING),
        "add_generation_prompt": _neutral(True, None),
        "return_token_strs": _flag("Tell the text of each token."),
        "with_pieces": _flag("Tell tokens as objects with id and piece."),
    }
    return object_schema(fields, strict=False)


def detokenize_schema(name: str, vocab_size: int, limits: Limits) -> Schema:
    """The body of POST /detokenize, of vLLM and llama.cpp alike."""
    ids = _ids(vocab_size, limits.body_bytes, least=0)
    return object_schema({"model": _model(name), "tokens": ids}, "tokens", strict=False)


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
    """A turn, and the fields of an answer that clients send back as a turn."""
    text = {"type": "string"}
    part, refusal = (
        object_schema({"type": {"enum": [kind]}, kind: text}, "type", kind, strict=strict)
        for kind in ("text", "refusal")
    )
    several = {"type": "array", "items": {"anyOf": [part, refusal]}}
    fields = {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [text, several, {"type": "null"}]},
        "name": _optional("string", "Changes nothing: the template knows two speakers."),
        "refusal": _optional("string", "Stands for a missing content."),
        "tool_calls": {**_optional("array", "None: nothing was called."), "maxItems": 0},
        **dict.fromkeys(("function_call", "tool_call_id", "audio"), _neutral(None)),
        "annotations": _optional("array", NOTHING),
    }
    return object_schema(fields, "role", strict=strict)


def _sampling(limits: Limits) -> Fields:
    """The fields of both endpoints."""
    string = {"type": "string", "minLength": 1, "maxLength": limits.stop_length}
    return {
        "n": _whole("Texts for each prompt.", 1, limits.choices),
        "temperature": _number("0 is greedy.", 0, 2),
        "top_p": _number("Nucleus sampling; 0 is greedy.", 0, 1),
        "top_k": _whole("Among this many likeliest; 0 and -1: all.", -1, LARGEST_COUNT),
        "min_p": _number("Drop what is less likely.", 0, 1),
        "repetition_penalty": _number("1 is none.", 0.1, 10),
        "presence_penalty": _number("Off the logit of each token written before.", -2, 2),
        "frequency_penalty": _number("As often as it was.", -2, 2),
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
        "ignore_eos": _flag("Go on behind the token that ends a text."),
        "seed": _whole("One seed, one text; -1: a random one.", -LARGEST_SEED - 1, LARGEST_SEED),
        "stream": _flag("Send the text as it is written, as server-sent events."),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {
                "include_usage": _flag("Count tokens in a last event."),
                "include_obfuscation": _flag(NOTHING),
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
        "store": _flag(NOTHING),
        **{name: _optional("string", NOTHING) for name in REMARKS},
        **{name: _neutral(*values, None) for name, values in OTHERS.items()},
    }


LOGPROBS = "Tell log probabilities of the tokens, and of this many likeliest ones."
TOP_LOGPROBS = "And of this many likeliest ones; needs logprobs."
NOTHING = "Changes nothing."
CALLS = "the model calls nothing"
REMARKS = ("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Fields for OpenAI's own infrastructure."""
OTHERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("length_penalty", "repeat_penalty", "typical_p", "tfs_z"), (1,)),
    **dict.fromkeys(("min_tokens", "mirostat", "dynatemp_range"), (0,)),
    **dict.fromkeys(("xtc_probability", "dry_multiplier"), (0,)),
    **dict.fromkeys(("stop_token_ids", "bad_words"), ([],)),
    **dict.fromkeys(("allowed_token_ids", "truncate_prompt_tokens", "prompt_logprobs"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("structured_outputs", "json_schema", "n_predict"), ()),
    "skip_special_tokens": (True,),
    "grammar": ("",),
}
"""Fields of vLLM and llama.cpp that would change the text, with the values that do not."""


def _tokens(limits: Limits, default: int) -> Schema:
    text = f"Most tokens of each text; {default} if left out, {limits.max_tokens} at most."
    return _whole(text, 0, LARGEST_SEED)


def _optional(kind: str, description: str, **bounds: float) -> Schema:
    """A field that may be null, which means the same as leaving it out, as in OpenAI's API."""
    return {"type": [kind, "null"], **bounds, "description": description}


def _whole(description: str, low: float, high: float) -> Schema:
    return _optional("integer", description, minimum=low, maximum=high)


def _number(description: str, low: float, high: float) -> Schema:
    return _optional("number", description, minimum=low, maximum=high)


def _flag(description: str) -> Schema:
    return _optional("boolean", description)


def _neutral(*values: Any) -> Schema:
    """A field of which only values that change nothing are accepted."""
    return {"enum": list(values), "description": "Only at the value that changes nothing."}
