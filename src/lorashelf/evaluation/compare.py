r"""An evaluation and its comparison: loss, score, and the share of the tasks' own adapters that is kept.

Per task, over the examples i of a split, y_i the answer with its end of turn and x_i the prompt and the input:

    loss      = Σ_i −log p(y_i | x_i) / Σ_i |y_i|           nats per token, the prompt masked (D2C, arXiv 2601.17441)
    score     = the task's metric of the greedy answers, 0 to 100, with a 95 % bootstrap interval (see `metrics`)

and over tasks, "own" being each task's own adapter and "zero" the bare base:

    average   = mean of score
    S         = mean of score / own score, where the own score is ≥ 1.0                     (K-Merge, arXiv 2510.13537)
    loss kept = mean of (zero loss − loss) / (zero loss − own loss), where own gains ≥ 0.02 nats
    storage   = bytes of the slots / bytes of all adapters, at equal dtype
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..models.protocol import Loss, mean_loss
from ..tasks.folders import ExampleSet, Task
from ..version import VERSION
from .metrics import Score, loss_kept, normalised


@dataclass(frozen=True, slots=True)
class Measured:
    """One task with its adapter (a digest, None for the bare base): each example's loss and, if scored, answer."""

    task: Task
    adapter: str | None
    examples: ExampleSet
    dropped: int
    """The number of examples of the split that were left out because they are longer than the context."""
    losses: tuple[Loss, ...]
    answers: tuple[str, ...] | None = None
    score: Score | None = None

    @property
    def loss(self) -> float:
        """Σ NLL / Σ tokens, in nats per token."""
        return mean_loss(self.losses)

    def document(self) -> dict[str, Any]:
        """Return the task's entry in the JSON document; without a score its fields are null."""
        score = self.score
        return {
            "loss": self.loss,
            "score": score.value if score else None,
            "low": score.low if score else None,
            "high": score.high if score else None,
            "metric": score.label if score else None,
            "n": len(self.losses),
            "tokens": sum(loss.tokens for loss in self.losses),
            "dropped": self.dropped,
            "adapter": self.adapter,
            "examples": self.examples.digest,
            "max_new_tokens": self.task.max_new_tokens,
        }

    def records(self) -> list[dict[str, Any]]:
        """Return each example with its prediction and loss, for people to read."""
        answers: Sequence[str | None] = self.answers or [None] * len(self.losses)
        return [
            {
                "input": example.input,
                "prediction": answer,
                "output": example.output,
                "references": list(example.references),
                "nll": loss.nll,
                "tokens": loss.tokens,
            }
            for example, answer, loss in zip(self.examples.examples, answers, self.losses, strict=True)
        ]


@dataclass(frozen=True)
class Evaluation:
    """Tasks measured with one base and prompt; `compared` adds what is kept of the tasks' own adapters."""

    tasks: Mapping[str, Measured]
    settings: Mapping[str, Any]
    """base, prompt, backend (their ids), split, limit, seed, loss_only."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Task → why it was not measured."""
    warnings: tuple[str, ...] = ()
    storage: float | None = None
    """Bytes of the adapters in use over those of all adapters, at equal dtype."""
    kept: Mapping[str, Any] | None = None
    """S and loss kept, over all tasks and per task, and the tasks excluded from each."""

    @property
    def average(self) -> float | None:
        """The mean score over the tasks that have one."""
        return _mean([m.score.value for m in self.tasks.values() if m.score])

    @property
    def average_loss(self) -> float | None:
        """The mean loss over the tasks, in nats per token."""
        return _mean([m.loss for m in self.tasks.values()])

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `eval`."""
        kept = self.kept or {"tasks": {}}
        tasks = {name: m.document() | kept["tasks"].get(name, {}) for name, m in self.tasks.items()}
        return {
            "tasks": tasks,
            "average": self.average,
            "average_loss": self.average_loss,
            "normalised": {name: kept[name] for name in ("S", "loss_kept", "left_out")} if self.kept else None,
            "storage": self.storage,
            **self.settings,
            "left_out": dict(self.left_out),
            "warnings": list(self.warnings),
            "version": VERSION,
        }

    def compared(self, own: Mapping[str, Any] | None = None, zero_shot: Mapping[str, Any] | None = None) -> Evaluation:
        """Add S and loss kept, against the documents of the tasks' own adapters and of the bare base.

        A warning reports a differing base, prompt or split. Tasks with differing examples are excluded, and from S
        those with a differing metric or max_new_tokens. S needs `own`; loss kept needs both.
        """
        notes: list[str] = []
        mine = self.document()
        owns = _comparable(mine, own, "own", notes)
        zeros = _comparable(mine, zero_shot, "zero-shot", notes)
        if own is None:
            notes += ["S and loss kept need the tasks' own adapters (--own)"] if zero_shot is not None else []
            return replace(self, warnings=(*self.warnings, *notes))
        scores = {name: m.score.value for name, m in self.tasks.items() if m.score}
        own_scores = _like_scored(mine, owns, notes)
        losses = {name: m.loss for name, m in self.tasks.items()}
        own_losses, zero_losses = ({name: d["loss"] for name, d in found.items()} for found in (owns, zeros))
        share, unscored = normalised(scores, own_scores)
        gain, unkept = loss_kept(losses, own_losses, zero_losses) if zero_shot is not None else (None, [])
        tasks = {
            name: {
                "own_loss": own_losses.get(name),
                "own_score": own_scores.get(name),
                "zero_shot_loss": zero_losses.get(name),
                "S": normalised({name: scores[name]}, own_scores)[0] if name in scores else None,
                "loss_kept": loss_kept({name: losses[name]}, own_losses, zero_losses)[0],
            }
            for name in self.tasks
        }
        left_out = {"S": unscored, "loss_kept": unkept}
        kept = {"S": share, "loss_kept": gain, "left_out": left_out, "tasks": tasks}
        return replace(self, kept=kept, warnings=(*self.warnings, *notes))


def _comparable(
    mine: Mapping[str, Any], other: Mapping[str, Any] | None, name: str, notes: list[str]
) -> dict[str, Mapping[str, Any]]:
    """Return the tasks of another document that were measured on the same examples; add differences to `notes`."""
    if other is None:
        return {}
    for key in ("base", "prompt", "split"):
        if mine[key] != other[key]:
            notes.append(f"the {name} evaluation has a different {key}: {other[key]}, here {mine[key]}")
    if mine["backend"] != other["backend"] and all(mine[key] == other[key] for key in ("base", "prompt")):
        notes.append(f"the {name} evaluation ran as {other['backend']}, here {mine['backend']}")
    shared = [task for task in mine["tasks"] if task in other["tasks"]]
    absent = [task for task in mine["tasks"] if task not in other["tasks"]]
    differing = [t for t in shared if mine["tasks"][t]["examples"] != other["tasks"][t]["examples"]]
    if absent:
        notes.append(f"the {name} evaluation lacks {', '.join(absent)}: left out of S and loss kept")
    if differing:
        notes.append(f"the {name} evaluation has other examples of {', '.join(differing)}: left out of S and loss kept")
    return {task: other["tasks"][task] for task in shared if task not in differing}


def _like_scored(mine: Mapping[str, Any], owns: Mapping[str, Mapping[str, Any]], notes: list[str]) -> dict[str, float]:
    """Return the own scores that were measured with the same metric and length as ours."""
    both = [t for t, d in owns.items() if d["score"] is not None and mine["tasks"][t]["score"] is not None]
    unlike = [t for t in both if any(owns[t][k] != mine["tasks"][t][k] for k in ("metric", "max_new_tokens"))]
    if unlike:
        notes.append(f"the own evaluation scored {', '.join(unlike)} by another metric or length: left out of S")
    return {t: float(owns[t]["score"]) for t in both if t not in unlike}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
