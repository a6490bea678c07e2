"""Merging N adapters into one: a registry of methods, one driver.

A method is a function on one module, registered with its space:

- `factors`: rule(tensors, weights, draw, **params) on the A's and on the B's separately (as in PEFT: has cross terms,
  depends on the gauge)
- `exact`: the weighted sum Σ w ΔW in factors; `rank` sets whether ranks add or are cut back to the largest
- `joint`: rule(factors, weights, **params) on a module of all adapters at once, in a basis of theirs, then cut to the
  largest rank
- `subspace`: rule(factors, weights, rank, **params), likewise, in a subspace of the rank of the result; returns the
  factors, and ‖·‖² that it dropped and kept
- `delta`: rule(tensors, weights, draw, **params) on the dense ΔW's, one module at a time, then the best rank-r factors

The keyword-only parameters of the function are the method's parameters, with their defaults, types and ranges.
"""

from . import exact, joint, rules, subspace
from .driver import merge, merge_measured
from .inverse import Noise, Rest, noise_of, unmerge
from .merge_method import METHODS, MergeMethod, merge_method
from .parameters import Within
from .spec import MergeSpec

__all__ = [
    "METHODS",
    "MergeMethod",
    "MergeSpec",
    "Noise",
    "Rest",
    "Within",
    "exact",
    "joint",
    "merge",
    "merge_measured",
    "merge_method",
    "noise_of",
    "rules",
    "subspace",
    "unmerge",
]
