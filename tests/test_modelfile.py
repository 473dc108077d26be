"""The Modelfile beside a GGUF file, with its template rendered by the rules of Go's language."""

from __future__ import annotations

import re

import pytest

from tinygpt.errors import UsageError
from tinygpt.interop.gguf.modelfile import beside, check_target, modelfile, write_modelfile
from tinygpt.text.chat.template import CHATML, MARKED, PLAIN, Template
from tinygpt.text.tokenizers import END, MARKERS, ByteTokenizer

MARKED_BYTES = ByteTokenizer().with_specials([END, *MARKERS])
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And\n\nmore?"},
]


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """The actions range, if, else if, else, end and .Content, as text/template has them."""
    before, loop, after = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    out = before
    for message in messages:
        chosen, done, inside = True, False, False
        for text, action in re.findall(r"(.*?)(\{\{ .*? \}\}|$)", loop, re.DOTALL):
            if not inside or chosen:
                out += text
            if action == "{{ .Content }}" and (not inside or chosen):
                out += message["content"]
            elif condition := re.fullmatch(r'\{\{ (else )?if eq \.Role "(\w+)" \}\}', action):
                inside, chosen = True, not done and message["role"] == condition[2]
                done |= chosen
            elif action == "{{ else }}":
                chosen, done = not done, True
            elif action == "{{ end }}":
                inside, chosen = False, True
    return out + after


@pytest.mark.parametrize("template", [MARKED, PLAIN, CHATML], ids=lambda t: t.name)
def test_the_template_makes_the_text_that_ours_makes(template: Template) -> None:
    kept = MARKED_BYTES.with_template(template.to_dict())
    [written] = re.findall(r'TEMPLATE """(.*?)"""', modelfile("m.gguf", kept, 64), re.DOTALL)
    assert rendered(written, TALK) == template.text(TALK, answer=True)


def test_it_names_the_file_the_window_and_where_answers_end(tmp_path) -> None:
    path = write_modelfile(tmp_path / "my.gguf", MARKED_BYTES, 64)
    assert path == beside(tmp_path / "my.gguf") == tmp_path / "my.Modelfile"
    lines = path.read_text().splitlines()
    assert lines[1:3] == ["FROM ./my.gguf", "PARAMETER num_ctx 64"]
    assert {'PARAMETER stop "<|end|>"', 'PARAMETER stop "<|user|>"'} <= set(lines)
    check_target(tmp_path / "my.gguf")  # one of ours may be overwritten
    plain = ByteTokenizer().with_template(PLAIN.to_dict())
    assert 'PARAMETER stop "User:"' in modelfile("m.gguf", plain, 64)


def test_without_a_template_there_is_none_and_another_s_file_is_kept(tmp_path) -> None:
    text = modelfile("m.gguf", ByteTokenizer(), 64)
    assert "FROM ./m.gguf" in text and "TEMPLATE" not in text and "stop" not in text
    odd = MARKED_BYTES.with_template({**MARKED.to_dict(), "start": "{{ x }}"})
    assert "TEMPLATE" not in modelfile("m.gguf", odd, 64)
    (tmp_path / "m.Modelfile").write_text("FROM llama3\n")
    with pytest.raises(UsageError, match="not a Modelfile"):
        check_target(tmp_path / "m.gguf")
