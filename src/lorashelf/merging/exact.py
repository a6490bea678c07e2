"""Rules in the factors, exact in ΔW: the weighted sum, ranks added (`cat`) or cut back to the largest (`svd`)."""

from __future__ import annotations

from collections.abc import Sequence

from ..lora.adapter import Factors
from ..lora.algebra import concatenated
from .factor import PEFT
from .methods import merge_method


@merge_method("cat", space="exact", cites=PEFT, rank="sum", duplicate=True, gauge=True)
@merge_method("svd", space="exact", cites=f"{PEFT}; Eckart-Young", rank="max", duplicate=True, gauge=True)
def weighted_sum(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ wᵢ ΔWᵢ: a (Σr, din), b (dout, Σr). `svd` then takes the best approximation of the largest rank among the
    inputs.
    """
    return concatenated(factors, weights)
