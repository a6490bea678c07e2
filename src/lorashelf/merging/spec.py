"""How adapters are merged, and what of the result is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .methods import METHODS

Weighting = Literal["mean", "half"]
"""What a newcomer weighs in a fold: as much as everything averaged before it each, or ½."""
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """A merge method with its parameters, the rank and dtype of what is stored, the seed of random methods."""

    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    """Cap of the rank stored; never pads."""
    dtype: str | None = None
    """None: as the adapter, of several the widest."""
    seed: int = 0
    encoding: str = "peft"
    """How what is merged is stored: the name of a codec."""
    quality: float = 0.99
    """Predicted share of what an adapter does that a codec with loss keeps."""
    restore_norm: bool = False
    """Scale every merge of several adapters to their mean norm ‖ΔW‖."""

    @property
    def later(self) -> MergeSpec:
        """The spec of folds into what this one merged: itself, with `linear` in place of a method whose default weight
        is 1. Such a fold gives the newcomer as much weight as all before it and trims them anew each time.
        """
        averages = METHODS[self.method].weights == "mean"
        return self if averages else replace(self, method="linear", parameters={})

    def document(self) -> dict[str, Any]:
        """As in a manifest and in shelf.toml, where the method is called `merge`; `peft` goes without saying."""
        stored = {} if self.encoding == "peft" else {"encoding": self.encoding, "quality": self.quality}
        return {
            "merge": self.method,
            "parameters": dict(self.parameters),
            "rank": self.rank,
            "dtype": self.dtype,
            "seed": self.seed,
            "restore_norm": self.restore_norm,
            **stored,
        }
