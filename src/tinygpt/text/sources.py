"""Any source to tokens: a text, token files, or a mix of several of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

from tinygpt.errors import DataError
from tinygpt.files.atomic import user_path
from tinygpt.text.chat.packing import tokens_of_conversations
from tinygpt.text.chat.template import PLAIN, template_of
from tinygpt.text.chat.window import chat_template
from tinygpt.text.corpus import Corpus, open_corpus
from tinygpt.text.mix import Mix
from tinygpt.text.mix_shares import is_mix, parse_mix, write_mix
from tinygpt.text.shards import check_made_with, is_tokens, own_tokenizer
from tinygpt.text.tokenizers import END, MARKERS, BaseTokenizer, Tokenizer
from tinygpt.text.tokens import Tokens, load_tokens, tokens_of

GLOB = "**/*.txt"


def opened(
    source: str, field: str = "text", glob: str = GLOB, separator: str = "end"
) -> dict[str, Corpus | None]:
    """The sources of a mix, or the one that ``source`` is; None for those that are tokens already.

    ``separator`` is ``end`` or ``blank``, see ``corpus_of``.
    Raises UsageError and DataError for what cannot be read.
    """
    names = parse_mix(source) if is_mix(source) else [source]
    return {
        name: None if is_tokens(name, glob) else corpus_of(name, field, glob, separator)
        for name in names
    }


def corpus_of(source: str, field: str = "text", glob: str = GLOB, separator: str = "end") -> Corpus:
    """A text; with ``separator`` ``blank``, one in which no token parts the documents."""
    corpus = open_corpus(source, field=field, glob=glob)
    return corpus if separator == "end" else replace(corpus, documents=None)


def specials_for(corpora: Iterable[Corpus | None]) -> tuple[str, ...]:
    """The special tokens of a vocabulary that is made for these texts.

    Texts of several documents need the one that ends a document, and conversations those that
    begin and end turns as well; one plain text needs none.
    """
    texts = [corpus for corpus in corpora if corpus is not None]
    if any(corpus.conversations is not None for corpus in texts):
        return (END, *MARKERS)
    return (END,) if any(corpus.documents is not None for corpus in texts) else ()


def with_template_for(
    tokenizer: Tokenizer | None, corpora: Iterable[Corpus | None]
) -> Tokenizer | None:
    """The vocabulary; with ``PLAIN`` where it has no template and is to learn conversations."""
    asked = any(corpus is not None and corpus.conversations is not None for corpus in corpora)
    if asked and isinstance(tokenizer, BaseTokenizer) and template_of(tokenizer) is None:
        return tokenizer.with_template(PLAIN.to_dict())
    return tokenizer


def tokenizer_in(found: dict[str, Corpus | None]) -> Tokenizer | None:
    """The tokenizer that lies beside tokens among the sources, if there is one."""
    known = (own_tokenizer(name) for name, corpus in found.items() if corpus is None)
    return next((tokenizer for tokenizer in known if tokenizer is not None), None)


def text_to_learn(found: dict[str, Corpus | None], share: float) -> Callable[[], Iterator[str]]:
    """Starts a reading of the first ``share`` of each text among the sources."""
    corpora = [corpus for corpus in found.values() if corpus is not None]
    return lambda: chain.from_iterable(corpus.beginning(share) for corpus in corpora)


def read_tokens(
    source: str,
    found: dict[str, Corpus | None],
    tokenizer: Tokenizer | None,
    vocab_size: int | None = None,
    glob: str = GLOB,
) -> Tokens:
    """The tokens of a source that was opened; those of a mix are a ``Mix``.

    Raises DataError for ids that the vocabulary does not have, and for tokens of another tokenizer.
    """

    def read(name: str, corpus: Corpus | None) -> Tokens:
        if corpus is None:
            tokens = load_tokens(name, vocab_size, glob=glob)
            if tokenizer is not None:
                check_made_with(tokens, tokenizer, name)
            return tokens
        if tokenizer is None:
            raise DataError(f"{name} is a text, and there is no tokenizer to read it with.")
        if corpus.conversations is not None:
            template = chat_template(tokenizer)
            made = tokens_of_conversations(corpus.conversations(), tokenizer, template)
            return load_tokens(made, vocab_size)
        return tokens_of(corpus, tokenizer, vocab_size)

    read_all = {name: read(name, corpus) for name, corpus in found.items()}
    return Mix(read_all, parse_mix(source)) if is_mix(source) else read_all[source]


def name_of(source: str, found: dict[str, Corpus | None]) -> str:
    """A short name for a run: of the text, the file, the folder, or the mix."""
    names = [
        user_path(name).resolve().stem if corpus is None else corpus.name
        for name, corpus in found.items()
    ]
    return "-".join(names) if is_mix(source) else names[0]


def lasting_mix(source: str, lasting: Callable[[str], str]) -> str:
    """A mix with each source written so that it means the same elsewhere."""
    return write_mix({lasting(name): share for name, share in parse_mix(source).items()})
