"""Tables and pictures of measured suites: each function returns a document with its part written anew."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lorashelf.bench import page
from lorashelf.bench.calibration import calibration
from lorashelf.bench.peers import PEERS
from lorashelf.bench.plot import drawn
from lorashelf.bench.results import (
    Sample,
    Vector,
    interval,
    mean_over_tasks,
    normalised_score,
    read_results,
    sampled,
    shares_kept,
)
from lorashelf.bench.suite import Cell, Suite, read_suite
from lorashelf.lora.quality import MEASURED

HERE = Path(__file__).parent
AIMS = {
    12.5: (0.998, 0.97),
    5: (0.995, 0.96),
    2.5: (0.985, 0.93),
    1: (0.96, 0.86),
    0.5: (0.87, 0.66),
    0.25: (0.74, 0.48),
}
"""Percent of the bytes → the loss kept that coded adapters should reach: mean and worst task."""
SCORE_AIMS = {12.5: 0.99, 5: 0.96, 1: 0.92}
"""Percent of the bytes → the S that coded adapters should reach on the tasks where the own adapter clearly helps."""


def replaced(text: str, name: str, end: str, content: str) -> str:
    """The text with this content between the marker of a generated part and its end."""
    begin, close = f"<!-- generated: {name} -->", f"<!-- {end} -->"
    before, found, rest = text.partition(begin)
    inside, closed, after = rest.partition(close)
    if not (found and closed) or "<!-- generated" in inside:
        sys.exit(f"a document that has the generated part {name} lacks {begin} … {close}")
    return f"{before}{begin}\n{content}\n{close}{after}"


SUITES = (
    "small",
    "first_table",
    "frontier",
    "own",
    "scores",
    "longer",
    "d2c",
    "d2c_scores",
    "kmerge",
    "kmerge_scores",
    "merges",
    "next",
    "types",
    "seeds",
    "seeds_one",
    "gemma",
    "gemma_smollm2",
)
STATED_ARRIVALS = (None, 10, 20, 30)
"""The numbers of arrivals whose rows a table has; the pictures have all."""


@cache
def _results(name: str) -> tuple[Suite, dict[str, dict[str, Any]]]:
    suite = read_suite(HERE.parent / "suites" / f"{name}.toml")
    return suite, read_results(suite, suite.folder)


def results(text: str) -> str:
    """docs/results.md with the tables of the suites whose results are committed, and what of them was not run."""
    for name in SUITES:
        suite, found = _results(name)
        parts = []
        if found:
            count = f"{len(found)} of {len(suite.cells)} cells are measured. " if len(found) < len(suite.cells) else ""
            rows = [row for row in page.rows(suite, found) if row["after"] in STATED_ARRIVALS]
            parts.append(count + page.table(suite, found, rows))
        if left := page.unmeasured(suite, found):
            parts.append(left)
        text = replaced(text, f"suite {name}", "end suite", "\n\n".join(parts))
    return text


def _frontier() -> tuple[Suite, dict[str, dict[str, Any]]]:
    return _results("frontier")


@cache
def _frontier_rows() -> dict[str | float, dict[str, Any]]:
    """A cell's label, for coded adapters the percentage → the row of the page, coded ones from the most bytes to the
    fewest.
    """
    cells = page.groups(*_frontier())
    rows = sorted(page.rows(*_frontier()), key=lambda row: -(row["percent"] or 0))
    return {row["percent"] or cells[row["method"], row["merge"], row["options"]][0].label: row for row in rows}


@cache
def _shares() -> dict[str | float, dict[str, Vector]]:
    """As `_frontier_rows` → task → loss kept, on all examples and on every resample."""
    suite, found = _frontier()
    measured = {cell.options.get("percent", cell.label): found[cell.id] for cell in suite.cells if cell.id in found}
    losses = {key: sampled([result]).losses for key, result in measured.items()}
    return {key: shares_kept(each, losses["own"], losses["base"]) for key, each in losses.items()}


SEARCHED = "guided, each under its merge"


def merges(text: str) -> str:
    """docs/results.md with its tables of merge methods on the same blocks, each against `linear` and `ties`."""
    suite, found = _results("merges")
    samples = {cell.method: sampled([found[cell.id]]).losses for cell in suite.cells if cell.method in ("own", "base")}
    titles = {"type": "the five types", SEARCHED: "guided D2C under the merge itself"}
    kept: dict[str, dict[str, Vector]] = {}
    for cell in suite.cells:
        if cell.id not in found or cell.method in samples:
            continue
        more = "restore_norm" if cell.options.get("restore_norm") else ""
        name = f"`{cell.options['merge']}` {more}".strip()
        shares = shares_kept(sampled([found[cell.id]]).losses, samples["own"], samples["base"])
        on = [cell.options.get("result") or ("type" if cell.method == "type" else f"{cell.method}-{cell.id}")]
        if cell.how == "search":
            guided = cell.options["propose"] == "guided"
            titles[on[0]] = "guided D2C under `linear`" if guided else "D2C under `linear`"
            on = [*(on if cell.options["merge"] == "linear" else []), *([SEARCHED] if guided else [])]
        for blocks in on:
            kept.setdefault(blocks, {})[name] = 100 * _mean(shares, shares)
    lines = []
    for blocks, by_merge in kept.items():
        if len(by_merge) == 1:
            continue
        lines += [f"| blocks of {titles[blocks]}: merge | loss kept % | − `linear` | − `ties` |", "|---|---|---|---|"]
        for name, share in sorted(by_merge.items(), key=lambda item: -item[1][0]):
            others = (("–" if other == name else by_merge.get(other)) for other in ("`linear`", "`ties`"))
            apart = (
                "not run" if x is None else x if isinstance(x, str) else _stated(share - x, "+.1f") for x in others
            )
            lines.append(f"| {name} | {_stated(share, '.1f')} | {' | '.join(apart)} |")
        lines.append("")
    return replaced(text, "merges", "end merges", "\n".join(lines[:-1]))


def _with_interval(stated: tuple[float, ...], form: str = ".3f") -> str:
    value, low, high = stated
    return f"{value:{form}} ({low:{form}} … {high:{form}})"


def _stated(values: Vector, form: str = ".3f") -> str:
    return _with_interval((values[0], *interval(values)), form)


def _against(value: float, aim: float) -> str:
    return f"≥ {aim:.3f}: " + ("reached" if value >= aim else f"missed by {aim - value:.3f}")


def frontier(text: str) -> str:
    """docs/results.md with its table of coded adapters beside the best merge and what was aimed at."""
    rows, tasks = _frontier_rows(), len(_shares()["own"])
    merges = [key for key, row in rows.items() if row["merge"]]
    best = max(merges, key=lambda method: rows[method]["loss_kept"][0])
    lines = [
        f"| bytes | kB per adapter | loss kept, mean | aim | worst task | aim | mean − `{best}` |",
        "|---|---|---|---|---|---|---|",
    ]
    for percent, (mean, worst) in AIMS.items():
        row, size = rows[percent], rows[percent]["storage"] * _own_bytes() / tasks
        apart = mean_over_tasks({task: kept - _shares()[best][task] for task, kept in _shares()[percent].items()})
        assert apart is not None
        lines.append(
            f"| {percent:g} % | {size / 1000:.1f} | {_with_interval(row['loss_kept'])} "
            f"| {_against(row['loss_kept'][0], mean)} | {row['worst_task']} {_with_interval(row['worst'])} "
            f"| {_against(row['worst'][0], worst)} | {_stated(apart, '+.3f')} |"
        )
    return replaced(text, "frontier", "end frontier", "\n".join(lines))


def _coded_at(share: float) -> dict[str, Vector]:
    """Task → loss kept by coded adapters in this share of the bytes: between two measured rates linear in the logarithm
    of the bytes, beyond them that of the last.
    """
    rates = sorted(AIMS)
    sizes = [math.log(_frontier_rows()[percent]["storage"]) for percent in rates]
    place = float(np.interp(math.log(share), sizes, np.arange(len(rates))))
    below, above = rates[math.floor(place)], rates[math.ceil(place)]
    return {task: kept + place % 1 * (_shares()[above][task] - kept) for task, kept in _shares()[below].items()}


def peers(text: str) -> str:
    """docs/results.md with its table of other codes beside coded adapters in the same bytes."""
    suite, found = _frontier()
    lines = [
        "| code | options | bytes | loss kept, mean | worst task | coded in these bytes | coded − other |",
        "|---|---|---|---|---|---|---|",
    ]
    ahead = []
    measured = [cell for cell in suite.cells if cell.method in PEERS and cell.id in found]
    order = list(PEERS)
    for cell in sorted(measured, key=lambda c: (order.index(c.method), -_frontier_rows()[c.label]["storage"])):
        row, shares = _frontier_rows()[cell.label], _shares()[cell.label]
        coded = _coded_at(row["storage"])
        apart = mean_over_tasks({task: coded[task] - kept for task, kept in shares.items()})
        mean = mean_over_tasks(coded)
        assert apart is not None
        assert mean is not None
        options = ", ".join(f"{name} {str(value).lower()}" for name, value in cell.options.items())
        lines.append(
            f"| `{cell.method}` | {options} | {100 * row['storage']:.2f} % | {_with_interval(row['loss_kept'])} "
            f"| {row['worst_task']} {_with_interval(row['worst'])} | {mean[0]:.3f} "
            f"| {_stated(apart, '+.3f')} |"
        )
        ahead += [f"{cell.method} with {options}"] if interval(apart)[1] < 0 else []
    lines += ["", f"Above the curve of coded adapters by more than the paired interval: {'; '.join(ahead) or 'none'}."]
    return replaced(text, "peers", "end peers", "\n".join(lines))


@cache
def _samples(name: str) -> dict[str, tuple[Cell, dict[str, Any], Sample]]:
    """A cell's label → cell, result and sample of what a suite has measured; nothing without own adapters and base."""
    suite, found = _results(name)
    measured = {c.label: (c, found[c.id], sampled([found[c.id]])) for c in suite.cells if c.id in found}
    return measured if {"own", "base"} <= set(measured) else {}


def _mean(values: Mapping[str, Vector], tasks: Iterable[str]) -> Vector:
    return np.asarray(np.mean([values[task] for task in tasks], axis=0))


@cache
def _clear() -> dict[str, bool]:
    """Task → whether the own adapter has a higher score than the bare base beyond the paired interval."""
    every = _samples("own")
    zero = every["base"][2].scores
    found = {task: interval(score - zero[task])[0] > 0 for task, score in every["own"][2].scores.items()}
    clear = [task for task, leads in found.items() if leads]
    if clear != sorted(_results("scores")[0].measured_tasks or ()):
        sys.exit(f"suites/scores.toml should measure these tasks: {', '.join(clear)}")
    return found


@cache
def _s() -> dict[str, Vector]:
    """A label of the suite `scores` → S: the mean over its tasks of score / own score."""
    measured = _samples("scores")
    found = {label: normalised_score(x.scores, measured["own"][2].scores) for label, (_, _, x) in measured.items()}
    return {label: s for label, s in found.items() if s is not None}


def scores(text: str) -> str:
    """docs/results.md with scores of answers: S beside the ratio of mean scores, over the tasks whose own adapter has a
    higher score than the bare base beyond the paired interval.
    """
    measured, s = _samples("scores"), _s()
    if not measured:
        return replaced(text, "scores", "end scores", "Nothing has been measured yet.")
    clear = [task for task, leads in _clear().items() if leads]
    own, zero = measured["own"][2], measured["base"][2]
    merged = [s[label] for label, (cell, *_) in measured.items() if cell.how == "cluster"]
    best = max(merged, key=lambda v: float(v[0]), default=None)
    lines = [
        f"{len(clear)} of {len(_clear())} tasks: {', '.join(clear)}.",
        "",
        "| what serves them | bytes | mean score | ratio of mean scores | S | aim | S − best merge | loss kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label in sorted(measured, key=lambda label: -s[label][0]):
        cell, result, sample = measured[label]
        score, aim = _mean(sample.scores, clear), SCORE_AIMS.get(cell.options.get("percent", 0))
        cells = [
            f"`{label}`",
            f"{100 * result['bytes'] / result['own_bytes']:.3g} %",
            f"{score[0]:.1f}",
            _stated(score / _mean(own.scores, clear)),
            _stated(s[label]),
            _against(float(s[label][0]), aim) if aim else "–",
            _stated(s[label] - best, "+.3f") if aim and best is not None else "–",
            _stated(_mean(shares_kept(sample.losses, own.losses, zero.losses), clear)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return replaced(text, "scores", "end scores", "\n".join(lines))


def longer(text: str) -> str:
    """docs/results.md with quality against bytes of adapters that were trained longer, beside those of the frontier."""
    measured = _samples("longer")
    if not measured:
        return replaced(text, "longer", "end longer", "Nothing has been measured yet.")
    own, zero = (measured[name][2].losses for name in ("own", "base"))
    whole = measured["own"][1]["own_bytes"]
    served = {
        f"`{label}`": (result["bytes"] if label != "own" else whole, sample.losses)
        for label, (_, result, sample) in measured.items()
    }
    short = _samples("frontier")["own"]
    served["`own` of the frontier, rank 8"] = _own_bytes() * len(own) // len(short[2].losses), short[2].losses
    lines = [
        "| what serves the five tasks | bytes | kB per adapter | mean loss | loss kept, mean | worst task |",
        "|---|---|---|---|---|---|",
    ]
    for name, (size, losses) in sorted(served.items(), key=lambda item: float(_mean(item[1][1], own)[0])):
        kept = shares_kept({task: losses[task] for task in own}, own, zero)
        worst = min(kept, key=lambda task: float(kept[task][0]))
        cells = [name, f"{100 * size / whole:.3g} %", f"{size / len(own) / 1000:.1f}", _stated(_mean(losses, own))]
        cells += [_stated(_mean(kept, kept)), f"{worst} {_stated(kept[worst])}"]
        lines.append(f"| {' | '.join(cells)} |")
    return replaced(text, "longer", "end longer", "\n".join(lines))


def bases(text: str) -> str:
    """docs/results.md with what the same cells keep on two bases, in the order of the first."""
    beside = _beside({"Gemma-3-270M": "gemma", "SmolLM2-135M": "gemma_smollm2"})
    return replaced(text, "bases", "end bases", beside)


def seeds(text: str) -> str:
    """docs/results.md with what the same cells keep of adapters with separate and with shared initialisations."""
    suites = {"separate": "seeds", "shared": "seeds_one"}
    files = {title: HERE.parent / "suites" / "similarities" / f"{suite}.json" for title, suite in suites.items()}
    text = replaced(text, "seeds similarities", "end seeds similarities", _separation("initialisation", files))
    return replaced(text, "seeds", "end seeds", _beside(suites))


def _beside(suites: Mapping[str, str]) -> str:
    """A table of the cells that two suites, by their titles, have in common, in the order of the first."""
    first, second = (_measured(name) for name in suites.values())
    both = [key for key in first if key in second and "base" not in key]
    if not both:
        return "Nothing has been measured yet."
    kept = " | ".join(f"{title}: loss kept % | worst task" for title in suites)
    lines = [f"| method | merge | options | bytes | {kept} |", "|---|---|---|---|---|---|---|---|"]
    for key in sorted(both, key=lambda key: -first[key]["loss_kept"][0]):
        cells = [*(name or "–" for name in key), f"{100 * first[key]['storage']:.3g} %"]
        for row in (first[key], second[key]):
            worst = f"{row['worst_task']} {_with_interval(tuple(100 * x for x in row['worst']), '.1f')}"
            cells += [_with_interval(tuple(100 * x for x in row["loss_kept"]), ".1f"), worst]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _own_bytes() -> int:
    return int(next(iter(_frontier()[1].values()))["own_bytes"])


def proof(text: str) -> str:
    """README.md with its table of what serves the forty tasks."""
    best, rows = f"type merge=tsv_m {RESTORED}", _frontier_rows()
    shown: dict[str | float, tuple[str, str]] = {  # row → its name here, and its label in the suite of scores
        "own": ("each task's own adapter", "own"),
        12.5: ("the same, coded", "coded percent=12.5"),
        1: ("the same, coded", "coded percent=1"),
        best: ("five slots, one per problem type, the best merge", best),
        "kmerge++": ("five slots by K-Merge++", "kmerge++"),
        "random": ("five slots of random tasks", "random"),
        "base": ("the bare base model", "base"),
    }
    lines = [
        "| what serves the forty tasks | share of the bytes | mean loss, nats per token | gain in loss kept "
        f"| score of answers, own = 1 ({sum(_clear().values())} tasks) |",
        "|---|---|---|---|---|",
    ]
    for key, (name, label) in shown.items():
        row, score = rows[key], f"{_s()[label][0]:.2f}" if label in _s() else "–"
        kept = f"{100 * row['loss_kept'][0]:.1f} %"
        lines.append(f"| {name} | {100 * row['storage']:.3g} % | {row['loss'][0]:.3f} | {kept} | {score} |")
    orders = _measured("kmerge")["kmerge++", "linear", ""]
    mean, spread = 100 * orders["loss_kept"][0], 100 * orders["spread"]["loss_kept"]
    lines += [
        "",
        f"K-Merge++ depends on the order of arrival: the table has one order; over {orders['seeds']} the gain kept is "
        f"{mean:.1f} %, with a standard deviation of {spread:.1f}.",
    ]
    return replaced(text, "proof", "end proof", "\n".join(lines))


def predicted(text: str) -> str:
    """docs/coded.md with its table of predicted and measured qualities."""
    results = {each["cell"].get("percent", each["cell"]["method"]): each for each in _frontier()[1].values()}
    found = calibration([results[percent] for percent in AIMS], results["own"], results["base"])
    if found.points != MEASURED:
        sys.exit(f"lora/quality.py does not hold the measured points: {found.points}")
    rows = [
        "| bytes | energy kept | loss kept, mean | worst | tenth percentile "
        "| predicted for a task left out: off by, root mean square | 90 % within |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = zip(reversed(AIMS), found.energy, found.kept, found.left_out(), strict=True)
    for percent, energy, kept, off in reversed(list(columns)):
        rows.append(
            f"| {percent:g} % | {energy.mean():.3f} | {kept.mean():.3f} | {kept.min():.3f} "
            f"| {np.percentile(kept, 10):.3f} | {np.sqrt((off**2).mean()):.3f} | {np.percentile(abs(off), 90):.3f} |"
        )
    return replaced(text, "predicted", "end predicted", "\n".join(rows))


PUBLISHED: dict[str, list[tuple[str, str, str, str, str]]] = {
    "D2C": [  # row, published, method, merge and options of ours
        ("zero-shot", "14.7 / 15.2 / 6.5", "base", "", ""),
        ("separate adapters", "32.9 / 31.7 / 29.0", "own", "", ""),
        ("random", "21.5 ± 1.0 / 22.5 ± 1.3 / 15.2 ± 0.3", "random", "ties", ""),
        ("K-Means", "20.4 ± 0.1 / 21.9 ± 0.1 / 15.5 ± 0.1", "kmeans", "ties", ""),
        ("K-Means on SVD features", "22.3 ± 1.2 / 22.4 ± 0.9 / 16.1 ± 0.2", "kmeans_svd", "ties", ""),
        ("D2C", "26.0 ± 0.7 / 24.6 ± 1.1 / 17.3 ± 0.3", "d2c", "ties", ""),
        ("all in one adapter", "18.7 / – / –", "single", "ties", ""),
        ("random, linear merging", "22.1 / – / –", "random", "linear", ""),
        ("D2C, linear merging", "24.8 / – / –", "d2c", "linear", ""),
        ("blocks by type, alpha 0.1 (type helps)", "above random", "dirichlet", "ties", "alpha=0.1"),
        ("blocks by language, alpha 0.1 (no help)", "as random", "dirichlet", "ties", "alpha=0.1 over=language"),
        ("D2C with 2 examples per task", "flat in n", "d2c", "ties", "examples_per_task=2"),
        ("D2C with 20 examples per task", "flat in n", "d2c", "ties", "examples_per_task=20"),
    ],
    "K-Merge": [
        ("K-Merge, random order", "0.80", "kmerge", "linear", ""),
        ("linear, ½ and ½, random order", "0.79", "half", "linear", ""),
        ("K-Merge++, worst order", "0.80", "kmerge++", "linear", "order=worst"),
        ("K-Merge, worst order", "0.75", "kmerge", "linear", "order=worst"),
        ("linear, ½ and ½, worst order", "0.69", "half", "linear", "order=worst"),
        ("K-Merge, K = 8", "0.80 to 0.90", "kmerge", "linear", "slots=8"),
        ("K-Merge++, K = 8", "0.80 to 0.90", "kmerge++", "linear", "slots=8"),
    ],
}
"""Paper → its figures: the average score on Llama 3.2 3B / Qwen 2.5 1.5B / StableLM 2 1.6B, or S on Llama 3.2 1B."""
GUIDED = "propose=guided init=guided budget=30"
RESTORED = "restore_norm=True"


@cache
def _measured(name: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(method, merge, options) → the row of a suite's page."""
    rows = page.rows(*_results(name))
    return {(row["method"], row["merge"], row["options"]): row for row in rows}


LOSSES = ("d2c", "first_table", "frontier", "merges")
ARRIVING = ("kmerge", "kmerge++", "half", "oracle", "all")
"""Policies of arrival; `random` is also one, and elsewhere draws blocks."""


def _row(method: str, merge: str, options: str, scores: bool = False) -> dict[str, Any] | None:
    """The row of the first suite of forty tasks that has measured these cells, by losses or by scores."""
    arriving = method in ARRIVING
    suites = (*(("kmerge",) if arriving else ()), *LOSSES)
    if scores:
        suites = ("kmerge_scores",) if arriving else ("d2c_scores",)
    found = (_measured(name).get((method, merge, options)) for name in suites)
    return next((row for row in found if row), None)


def published(text: str) -> str:
    """docs/results.md with the papers' figures beside those measured here."""
    parts = []
    for paper, figures in PUBLISHED.items():
        lines = [
            f"| {paper} | published | score here | S here | loss kept % here | repetitions of scores / of losses |",
            "|---|---|---|---|---|---|",
        ]
        for name, figure, method, merge, options in figures:
            row, answered = _row(method, merge, options), _row(method, merge, options, scores=True)
            cells = ["not run"] * 3
            if answered:
                cells[0] = _with_interval(answered["score"], ".1f") + page.over(answered["spread"]["score"])
            if answered and answered["S"]:
                cells[1] = _with_interval(answered["S"])
            if row:
                kept = _with_interval(tuple(100 * x for x in row["loss_kept"]), ".1f")
                cells[2] = kept + page.over(row["spread"]["loss_kept"], 100)
            cells.append(" / ".join(str(each["seeds"]) if each else "–" for each in (answered, row)))
            lines.append(f"| {name} | {figure} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return replaced(text, "published", "end published", "\n\n".join(parts))


SCORED = ("d2c_scores", "kmerge_scores")


def score_types(text: str) -> str:
    """docs/results.md with the scores of the main tables by problem type."""
    rows: dict[str, Sample] = {}
    for name in SCORED:
        suite, found = _results(name)
        for (method, merge, options), cells in page.groups(suite, found).items():
            rows[_label(method, merge, options, cells[0])] = sampled([found[cell.id] for cell in cells])
    if not rows:
        return replaced(text, "score types", "end score types", "nothing has been measured yet")
    types = sorted({task.rpartition("-")[0] for sample in rows.values() for task in sample.scores})
    lines = [f"| method | merge | {' | '.join(types)} | all |", "|---" * (len(types) + 3) + "|"]
    for label, sample in sorted(rows.items(), key=lambda row: -float(_mean_score(row[1])[0])):
        values = [_stated(_mean_score(sample, kind + "-"), ".1f") for kind in types]
        lines.append(f"| {label} | {' | '.join(values)} | {_stated(_mean_score(sample), '.1f')} |")
    return replaced(text, "score types", "end score types", "\n".join(lines))


def _label(method: str, merge: str, options: str, cell: Cell) -> str:
    """The first two cells of a table's row: what assigns the tasks, and the merge."""
    slot = " slot" if method == "random" and cell.how == "arrive" else ""
    words = filter(None, [method + slot, "guided" if options == GUIDED else options])
    return f"{' '.join(words)} | {merge or '–'}"


def purity(text: str) -> str:
    """docs/results.md with the share of tasks whose slot has their type of problem most often, in five slots."""
    rows: dict[str, tuple[list[float], list[int], float]] = {}
    for name in ("d2c", "kmerge"):
        suite, found = _results(name)
        for group, cells in page.groups(suite, found).items():
            slots = [found[cell.id]["provenance"].get("blocks") for cell in cells]
            if not all(slots) or cells[0].options.get("slots", 5) != 5 or "after" in cells[0].options:
                continue
            kinds = [[[task.rpartition("-")[0] for task in slot] for slot in each] for each in slots]
            pure = [sum(max(map(slot.count, slot)) for slot in each) / sum(map(len, each)) for each in kinds]
            largest = [max(map(len, each)) for each in kinds]
            rows[_label(*group, cells[0])] = pure, largest, _measured(name)[group]["loss_kept"][0]
    heads = ["method", "merge", "most common type", "each repetition", "tasks in the largest slot", "loss kept %"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label, (pure, largest, kept) in sorted(rows.items(), key=lambda row: -sum(row[1][0]) / len(row[1][0])):
        each = ", ".join(f"{value:.2f}" for value in pure) if len(pure) > 1 else "–"
        sizes = f"{min(largest)} to {max(largest)}" if min(largest) < max(largest) else f"{largest[0]}"
        lines.append(f"| {label} | {np.mean(pure):.2f} | {each} | {sizes} | {100 * kept:.1f} |")
    return replaced(text, "purity", "end purity", "\n".join(lines))


def _mean_score(sample: Sample, prefix: str = "") -> Vector:
    """The mean score over the tasks of a type, on all examples and on every resample."""
    found = mean_over_tasks({task: values for task, values in sample.scores.items() if task.startswith(prefix)})
    assert found is not None
    return found


def guide(text: str) -> str:
    """docs/results.md with the decision guide, whose figures are those of the tables below it."""

    def kept(method: str, merge: str, options: str = "", suite: str | None = None) -> str:
        row = _measured(suite).get((method, merge, options)) if suite else _row(method, merge, options)
        return _with_interval(tuple(100 * x for x in row["loss_kept"]), ".1f") + " %" if row else "not run"

    def worst(method: str, merge: str = "linear", options: str = "") -> str:
        row = _row(method, merge, options)
        return f"{100 * row['worst'][0]:.1f} % ({row['worst_task']})" if row else "not run"

    def calls(method: str, merge: str, options: str = "") -> str:
        row = _row(method, merge, options)
        return f"{row['evaluations']:.0f}" if row else "not run"

    rows = [
        (
            "a number of bytes",
            "coded adapters, one per task: `init --bytes`, `pack`",
            f"1 % of the bytes {kept('coded', '', 'percent=1')}; "
            f"best merge of the types at 12.5 % {kept('type', 'tsv_m', RESTORED)}",
        ),
        (
            "K resident adapters, tasks arrive one by one",
            "K-Merge++ with `linear`: `init --slots K`",
            f"{kept('kmerge++', 'linear')}, random blocks {kept('random', 'linear')}; K-Merge with "
            f"`ties` {kept('kmerge', 'ties')}; the worst order {kept('kmerge++', 'linear', 'order=worst')}; "
            f"with the q0.75 of `lorashelf threshold` {kept('kmerge++', 'linear', 'threshold=0.0105', suite='next')}",
        ),
        (
            "the same, for about two tasks per slot",
            "K-Merge with `linear`: `init --slots K --policy kmerge`",
            f"nine tasks in five slots {kept('kmerge', 'linear', suite='types')}, "
            f"K-Merge++ {kept('kmerge++', 'linear', suite='types')}",
        ),
        (
            "the same, of adapters [that share an initialisation](#adapters-that-share-an-initialisation)",
            "`svd` in place of `linear`: `init --slots K --merge svd`",
            f"ten tasks in five slots, K-Merge++ {kept('kmerge++', 'svd', suite='seeds_one')}, "
            f"with `linear` {kept('kmerge++', 'linear', suite='seeds_one')}",
        ),
        (
            "K resident adapters, all at hand, no examples",
            "`cluster --method agglomerative` with `linear`",
            f"{kept('agglomerative', 'linear')}; K-Means {kept('kmeans', 'linear')}, "
            f"on SVD features {kept('kmeans_svd', 'linear')}",
        ),
        (
            "K resident adapters, all at hand, 10 examples per task",
            "`cluster --method d2c --init guided --propose guided --budget 30` with `linear`, minutes of one core",
            f"{kept('d2c', 'linear', GUIDED)} after {calls('d2c', 'linear', GUIDED)} losses, the worst task "
            f"{worst('d2c', options=GUIDED)}; plain D2C {kept('d2c', 'linear')} after {calls('d2c', 'linear')}, "
            f"with `ties` {kept('d2c', 'ties')}, the worst task {worst('d2c')}",
        ),
        (
            "known problem types, at most K",
            "a slot per type, merged by `pico`, or by `tsv_m` with `--restore-norm`",
            f"`tsv_m` {kept('type', 'tsv_m', RESTORED)}, `pico` {kept('type', 'pico')}, with `linear` "
            f"{kept('type', 'linear')}, with `ties` {kept('type', 'ties')}, but the worst task "
            f"{worst('type', 'tsv_m', RESTORED)} and {worst('type', 'pico')}; on "
            "[Gemma-3-270M](#a-second-base-gemma-3-270m) neither leads `linear`",
        ),
        (
            "one resident adapter",
            "no merge: code the adapters instead",
            f"one merge of all {kept('single', 'linear')}",
        ),
    ]
    lines = ["| what is given | what to use | evidence: loss kept |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return replaced(text, "guide", "end guide", "\n".join(lines))


def similarities(text: str) -> str:
    """docs/results.md with its table of how well each similarity separates types of problems and languages: from the
    documents of `lorashelf compare DIR/* --metric METRIC --json`.
    """
    metrics = ("cosine", "l2", "l1", "linf")
    files = {metric: HERE.parent / "suites" / "similarities" / f"{metric}.json" for metric in metrics}
    return replaced(text, "similarities", "end similarities", _separation("metric", files))


def _separation(title: str, files: Mapping[str, Path]) -> str:
    """A table of medians of similarities, and of how often pairs of one type or language are above pairs of neither."""
    heads = [title, "all pairs", "same type", "same language", "neither"]
    heads += ["type over neither", "language over neither", "nearest of the same type"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, path in files.items():
        document = json.loads(path.read_text())
        matrix = np.array(document["matrix"])
        kind, language = np.array([name.split("-") for name in document["names"]]).T
        one, other = np.triu_indices(len(matrix), 1)
        values = matrix[one, other]
        type_too, language_too = kind[one] == kind[other], language[one] == language[other]
        alike, spoken, neither = (values[mask] for mask in (type_too, language_too, ~type_too & ~language_too))
        nearest = np.where(np.eye(len(matrix), dtype=bool), -np.inf, matrix).argmax(axis=1)
        cells = [f"{np.median(each):.4f}" for each in (values, alike, spoken, neither)]
        cells += [f"{_above(each, neither):.2f}" for each in (alike, spoken)]
        lines.append(f"| {name} | {' | '.join(cells)} | {np.sum(kind == kind[nearest])} of {len(matrix)} |")
    return "\n".join(lines)


def _above(xs: Vector, ys: Vector) -> float:
    """The probability that one of the xs is above one of the ys; ties count half."""
    return float(np.mean(np.sign(xs[:, None] - ys) + 1) / 2)


PICTURES = {
    "frontier": ("frontier", "storage"),
    "kmerge-slots": ("kmerge", "slots"),
    "kmerge-after": ("kmerge", "after"),
    "d2c-slots": ("d2c", "slots"),
    "d2c-iterations": ("d2c", "iterations"),
}
"""File → the suite and the axis of a picture of what is kept."""
ALONG = {"slots": "the number of slots", "after": "the number of arrivals", "iterations": "the proposals of the search"}


def _drawable(name: str) -> bool:
    """Whether the cells of a picture are measured at five places at least."""
    name, x = PICTURES[name]
    suite, found = _results(name)
    places = {cell.options.get(x) for cell in suite.cells if cell.id in found} - {None}
    return x == "storage" or len(places) > 4


def shown(text: str) -> str:
    """docs/results.md with the pictures of the curves that are measured."""
    for name, (suite, x) in PICTURES.items():
        if x == "storage":
            continue
        alt = f"Loss kept against {ALONG[x]}, one line per method with 95 % intervals; hollow marks: the worst task. "
        figures = "Some of the figures" if x == "after" else "The figures"  # see STATED_ARRIVALS
        lines = [
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">',
            f'  <img alt="{alt}{figures} are in the table of {suite}.toml." src="{name}.svg">',
            "</picture>",
        ]
        text = replaced(text, f"picture {name}", "end picture", "\n".join(lines if _drawable(name) else []))
    return text


def pictures() -> dict[Path, str]:
    """File → the picture, for a light and a dark page."""
    return {
        HERE / f"{name}{'-dark' * dark}.svg": drawn(*_results(suite), "svg", x, dark=dark).decode()
        for name, (suite, x) in PICTURES.items()
        if _drawable(name)
        for dark in (False, True)
    }
