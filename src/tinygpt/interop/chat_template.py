"""Our chat template as Jinja, the form in which other tools keep one, and back.

The text is a function of the template and of the names of the special tokens, so what we wrote is
known again by making it once more. No Jinja is run here: it would be a stranger's program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tinygpt.text.chat.template import CHATML, TEMPLATES, Template, template_of
from tinygpt.text.tokenizers import BaseTokenizer, Tokenizer, special_of

CHATML_OF_OTHERS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}",
)
"""ChatML as it is commonly written. Its text is ours, but for names of markers in a message."""


def chat_template(tokenizer: Tokenizer | None) -> str | None:
    """The Jinja of the template that a vocabulary is used with; None where it has none."""
    template = template_of(tokenizer)
    return None if template is None else to_jinja(template, special_of(tokenizer))


def to_jinja(template: Template, special: Iterable[str] = ()) -> str:
    """The template for ``apply_chat_template`` of transformers and for llama.cpp.

    Its text has our ``Template.text``, and no name in ``special`` in what a message holds.
    """
    lines = [
        f"{{{{- {quoted(template.start)} -}}}}" if template.start else "",
        "{%- for message in messages -%}",
        "{%- set role = message['role'] -%}",
        "{%- set content = message['content'] -%}",
        *(
            f"{{%- set content = content | replace({quoted(name)}, {quoted(harmless)}) -%}}"
            for name, harmless in template.harmless(special)
        ),
        "{%- if role == 'system' or role == 'developer' -%}",
        f"{{{{- {quoted(template.system)} + content -}}}}",
        "{%- elif role == 'user' -%}",
        f"{{{{- {quoted(template.user)} + content -}}}}",
        "{%- elif role == 'assistant' -%}",
        *_answer(template),
        "{%- else -%}",
        "{{- raise_exception('There is no role ' + role + ': wanted system, user, assistant.') -}}",
        "{%- endif -%}",
        f"{{{{- {quoted(template.end)} -}}}}",
        *_last(template),
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        f"{{{{- {quoted(template.assistant)} -}}}}",
        "{%- endif -%}",
    ]
    return "\n".join(line for line in lines if line)


def _answer(template: Template) -> list[str]:
    if not template.space:
        return [f"{{{{- {quoted(template.assistant)} + content -}}}}"]
    return [
        f"{{{{- {quoted(template.assistant)} -}}}}",
        "{%- set content = content | trim -%}",
        "{%- if content -%}",
        f"{{{{- {quoted(template.space)} + content -}}}}",
        "{%- endif -%}",
    ]


def _last(template: Template) -> list[str]:
    """The beginning of the user's turn, which ends an answer in plain text."""
    if not template.stop:
        return []
    return [
        "{%- if loop.last and role == 'assistant' and not add_generation_prompt -%}",
        f"{{{{- {quoted(template.user.rstrip())} -}}}}",
        "{%- endif -%}",
    ]


def quoted(text: str) -> str:
    r"""A text as a literal of Jinja.

    >>> print(quoted("it's\n"))
    'it\'s\n'
    """
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def with_jinja(tokenizer: Tokenizer, jinja: str | None) -> tuple[Tokenizer, bool]:
    """A vocabulary with the template that this Jinja is, and whether it is one that we know.

    The template is not kept where it follows from the vocabulary alone.
    """
    found = read_jinja(jinja, special_of(tokenizer)) if jinja else None
    if found is None or not isinstance(tokenizer, BaseTokenizer):
        return tokenizer, not jinja
    kept = (
        tokenizer if found == template_of(tokenizer) else tokenizer.with_template(found.to_dict())
    )
    return kept, True


def read_jinja(jinja: str, special: Iterable[str]) -> Template | None:
    """The template that a Jinja is; None where it is neither ours nor a common form of ChatML.

    ChatML needs its two special tokens.
    """
    names = list(special)
    for template in TEMPLATES.values():
        if to_jinja(template, names) == jinja.strip():
            return template
    is_chatml = _bare(jinja) in map(_bare, CHATML_OF_OTHERS)
    return CHATML if is_chatml and {"<|im_start|>", "<|im_end|>"} <= set(names) else None


def _bare(jinja: str) -> str:
    """A Jinja without what changes nothing in the forms that are compared: spaces and hyphens of
    statements, and the kind of quotes."""
    return re.sub(r"\s+|(?<=[{%])-|-(?=[%}])", "", jinja).replace('"', "'")
