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
    """2 P R / (P + R) over the bag of tokens, of the best answer; two texts without a token agree."""
    tokens = _tokens(language)

    def score(answer: str, prediction: str) -> float:
        right, said = Counter(tokens(answer)), Counter(tokens(prediction))
        if not right or not said:
            return float(right == said)
        return 2 * (right & said).total() / (right.total() + said.total())

    return mean_of("F1", score)


def _tokens(language: str) -> Tokens:
    """Lower-cased tokens (MeCab ja, jieba zh, else white space) without Unicode's and ASCII's punctuation; in English
    without articles.
    """
    pieces, dropped = segments(language), ARTICLES if language == "en" else frozenset[str]()

    punctuation = _punctuation()

    def tokens(text: str) -> list[str]:
        bare = (piece.translate(punctuation) for piece in pieces(text.lower()))
        return [token for token in bare if token and token not in dropped]

    return tokens


@functools.cache
def _punctuation() -> dict[int, None]:
    """Every sign of Unicode's and ASCII's punctuation, to be deleted; found in a tenth of a second, once."""
    signs = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "P")
    return dict.fromkeys([*map(ord, string.punctuation), *signs])
