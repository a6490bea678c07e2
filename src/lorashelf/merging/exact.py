"""Rules on factors that are exact in ΔW: the weighted sum, ranks added (`cat`) or cut back to the largest (`svd`)."""

from __future__ import annotations

from collections.abc import Sequence

from ..lora.adapter import Factors
from ..lora.algebra import concatenated
from .merge_method import merge_method
from .rules import PEFT


@merge_method("cat", space="exact", cites=PEFT, rank="sum", duplicate=True, gauge=True)
@merge_method("svd", space="exact", cites=f"{PEFT}; Eckart-Young", rank="max", duplicate=True, gauge=True)
def weighted_sum(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return Σ wᵢ ΔWᵢ: a (Σr, din), b (dout, Σr). `svd` then takes the best one of the inputs' largest rank."""
    return concatenated(factors, weights)
