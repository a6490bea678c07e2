"""Token F1 of answers to questions, after SQuAD's normalisation (Rajpurkar et al. 2016; MLQA for other languages)."""

from __future__ import annotations

import functools
import string
import sys
import unicodedata
from collections import Counter

from .metric import Metric, mean_of, measure
from .tokens import Tokens, segments

ARTICLES = frozenset(["a", "an", "the"])


@measure("f1")
def token_f1(language: str) -> Metric:
    """Return 2 P R / (P + R) over the bag of tokens, with the best answer; two texts without tokens agree."""
    tokens = _tokens(language)

    def score(answer: str, prediction: str) -> float:
        right, given = Counter(tokens(answer)), Counter(tokens(prediction))
        if not right or not given:
            return float(right == given)
        return 2 * (right & given).total() / (right.total() + given.total())

    return mean_of("F1", score)


def _tokens(language: str) -> Tokens:
    """Return a lower-casing tokenizer (MeCab ja, jieba zh, else white space) that drops punctuation, in en articles."""
    pieces, dropped = segments(language), ARTICLES if language == "en" else frozenset[str]()

    punctuation = _punctuation()

    def tokens(text: str) -> list[str]:
        bare = (piece.translate(punctuation) for piece in pieces(text.lower()))
        return [token for token in bare if token and token not in dropped]

    return tokens


@functools.cache
def _punctuation() -> dict[int, None]:
    """Return a table that deletes Unicode and ASCII punctuation; computed once, in a tenth of a second."""
    signs = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "P")
    return dict.fromkeys([*map(ord, string.punctuation), *signs])
