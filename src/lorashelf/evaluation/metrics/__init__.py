"""Metrics of predictions (extra `metrics`): a registry, bootstrap intervals, guarded normalisation.

f0.5              F0.5 of edits: ERRANT's in English, of characters in Chinese and Japanese, else of tokens
weighted_rouge    R1/6 + R2/3 + R3/2 of ROUGE F-measures
rouge_l           the ROUGE-L F-measure
f1                token F1 of answers, as SQuAD normalises them

A task without a metric has a loss only. A metric's package is not imported before `metric` needs it.
"""

from . import edits, rouge, token_f1
from .bootstrap import Score, scored
from .kept import loss_kept, normalised
from .metric import FORMULAS, TASK_METRICS, Metric, measure, metric

__all__ = [
    "FORMULAS",
    "TASK_METRICS",
    "Metric",
    "Score",
    "edits",
    "loss_kept",
    "measure",
    "metric",
    "normalised",
    "rouge",
    "scored",
    "token_f1",
]
