"""ROUGE F-measures, by Google's rouge-score, without stemming, with tokens that suit the language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import MissingExtra
from .metric import Metric, mean_of, measure
from .tokens import Tokens, letter_runs, segments


@measure("weighted_rouge")
def weighted_rouge(language: str) -> Metric:
    """Return R1/6 + R2/3 + R3/2 of the best answer; an answer of two tokens has no trigram and scores at most ½."""
    scorer = _scorer(language, ["rouge1", "rouge2", "rouge3"])

    def score(answer: str, prediction: str) -> float:
        one, two, three = (part.fmeasure for part in scorer.score(answer, prediction).values())
        return float(one / 6 + two / 3 + three / 2)

    return mean_of("weighted ROUGE", score)


@measure("rouge_l")
def rouge_l(language: str) -> Metric:
    """Return the F-measure of the longest common subsequence, 2 P R / (P + R), with the best answer."""
    scorer = _scorer(language, ["rougeL"])
    return mean_of("ROUGE-L", lambda answer, prediction: float(scorer.score(answer, prediction)["rougeL"].fmeasure))


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenising function wrapped for rouge-score."""

    tokenize: Tokens


def _scorer(language: str, kinds: list[str]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtra("a ROUGE score", "rouge-score", "metrics") from error
    return RougeScorer(kinds, tokenizer=None if language == "en" else Tokenizer(_words(language)))


def _words(language: str) -> Tokens:
    """Return a lower-casing tokenizer: words of MeCab (ja) or jieba (zh), white space for ko, else runs of letters.

    English uses rouge-score's own tokenizer, runs of a-z and 0-9; runs of letters are the same for any alphabet.
    """
    if language not in ("ja", "zh", "ko"):
        return lambda text: letter_runs(text.lower())
    pieces = segments(language)
    if language == "ko":
        return lambda text: pieces(text.lower())
    return lambda text: [word for word in pieces(text.lower()) if letter_runs(word)]
