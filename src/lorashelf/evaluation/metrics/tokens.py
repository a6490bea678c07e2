"""Texts as tokens: MeCab for Japanese, jieba for Chinese, white space or Unicode letters for other languages."""

from __future__ import annotations

import functools
import unicodedata
import warnings
from collections.abc import Callable

from ...errors import MissingExtra

Tokens = Callable[[str], list[str]]


def segments(language: str) -> Tokens:
    """Return a tokenizer: MeCab (UniDic) for ja, jieba for zh, white space for other languages.

    Raises MissingExtra (`metrics`).
    """
    return {"ja": _mecab, "zh": _jieba}.get(language, _white_space)()


def is_word_character(character: str) -> bool:
    """Return whether a character is a letter, a mark that belongs to one, or a number (Unicode categories L, M, N)."""
    return unicodedata.category(character)[0] in "LMN"


def letter_runs(text: str) -> list[str]:
    """Return the runs of letters, marks and numbers; everything else separates.

    >>> letter_runs("L'été 2024, déjà-vu!")
    ['L', 'été', '2024', 'déjà', 'vu']
    """
    return "".join(c if is_word_character(c) else " " for c in text).split()


def letters_and_signs(text: str) -> list[str]:
    """Return runs of letters, marks and numbers, and every other character on its own, except white space.

    >>> letters_and_signs("C'est 5 €!")
    ['C', "'", 'est', '5', '€', '!']
    """
    return "".join(c if is_word_character(c) or c.isspace() else f" {c} " for c in text).split()


def _white_space() -> Tokens:
    return str.split


@functools.cache
def _mecab() -> Tokens:
    """Load MeCab with unidic-lite, whichever other dictionaries are installed."""
    try:
        import fugashi
        import unidic_lite
    except ImportError as error:
        raise MissingExtra("a Japanese score", "fugashi with unidic-lite", "metrics") from error
    folder = unidic_lite.DICDIR
    tagger = fugashi.GenericTagger(f'-r "{folder}/mecabrc" -d "{folder}"')
    return lambda text: [str(word.surface) for word in tagger(text)]


@functools.cache
def _jieba() -> Tokens:
    """Load jieba in precise mode with its own dictionary.

    jieba's `initialize` would write a cache to the shared temporary folder and load any file found there; reading the
    dictionary instead takes half a second.
    """
    try:
        with warnings.catch_warnings():  # escape sequences, and pkg_resources where an old setuptools has it
            warnings.simplefilter("ignore")
            import jieba
    except ImportError as error:
        raise MissingExtra("a Chinese score", "jieba", "metrics") from error
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return lambda text: [word for word in tokenizer.cut(text) if not word.isspace()]
