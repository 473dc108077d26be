"""A Modelfile beside a GGUF file: what ollama wants to know of a model to chat with it.

Its template is written in Go's language, https://docs.ollama.com/modelfile, which cannot change a
text: so in ollama a question that holds the name of a marker is not made harmless.
"""

from __future__ import annotations

from pathlib import Path

from tinygpt.errors import CheckpointError
from tinygpt.files.atomic import check_overwritable, replacing
from tinygpt.text.chat.template import Template, template_of
from tinygpt.text.tokenizers import Tokenizer, special_of

MARK = "# Written by TinyGPT for ollama: "
"""Begins every Modelfile of ours, so that only such a file is overwritten."""


def beside(path: Path) -> Path:
    """The Modelfile of a GGUF file: ``model.Modelfile`` of ``model.gguf``."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}.Modelfile")


def check_target(path: Path) -> None:
    """UsageError if something else than a Modelfile of ours is there; ``path`` is the GGUF file."""
    check_overwritable(beside(path), MARK.encode(), "a Modelfile")


def write_modelfile(path: Path, tokenizer: Tokenizer, block_size: int) -> Path:
    """Write the Modelfile of the GGUF file at ``path``; -> where it is.

    Raises CheckpointError for a place that cannot be written.
    """
    target = beside(path)
    try:
        with replacing(target) as file:
            file.write(modelfile(path.name, tokenizer, block_size).encode())
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error.strerror}.") from error
    return target


def modelfile(name: str, tokenizer: Tokenizer, block_size: int) -> str:
    """The text of a Modelfile for a GGUF file of that name in the same folder."""
    model = name.removesuffix(".gguf")
    lines = [f"{MARK}ollama create {model} -f {model}.Modelfile", f"FROM ./{name}"]
    lines += [f"PARAMETER num_ctx {block_size}"]
    template = template_of(tokenizer)
    if template is not None and _can_be_written(template):
        lines += [f'TEMPLATE """{go_template(template)}"""']
        lines += [f'PARAMETER stop "{stop}"' for stop in _stops(template, tokenizer)]
    return "\n".join(lines) + "\n"


def go_template(template: Template) -> str:
    """The template in Go's language, for ollama's ``.Messages``."""
    roles = (
        f'{{{{ if eq .Role "user" }}}}{template.user}'
        f'{{{{ else if eq .Role "assistant" }}}}{template.assistant}{template.space}'
        f"{{{{ else }}}}{template.system}{{{{ end }}}}"
    )
    turn = f"{roles}{{{{ .Content }}}}{template.end}"
    return f"{template.start}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{template.assistant}"


def _can_be_written(template: Template) -> bool:
    """Whether no text of the template would be read as a part of the Modelfile."""
    return not any(sign in text for text in template.to_dict().values() for sign in ("{{", '"""'))


def _stops(template: Template, tokenizer: Tokenizer) -> list[str]:
    names = {i: name for name, i in special_of(tokenizer).items()}
    texts = [names[i] for i in template.stop_ids(tokenizer)] + list(template.stop_strings)
    return [text.strip() for text in texts if '"' not in text]
