"""How adapters are merged and the result is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .merge_method import METHODS

Weighting = Literal["mean", "half"]
"""The weight of the arriving adapter in a fold: that of each adapter averaged before, or ½."""
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """A merge method with its parameters, the rank, dtype and encoding of the stored result, and the seed."""

    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    """Cap on the stored rank; never pads."""
    dtype: str | None = None
    """None: the adapter's own, for several the widest."""
    seed: int = 0
    encoding: str = "peft"
    """How the result is stored: the name of a codec."""
    quality: float = 0.99
    """Predicted share of an adapter's gain in loss that a lossy codec keeps."""
    restore_norm: bool = False
    """Scale every merge of several adapters to their mean norm ‖ΔW‖."""

    @property
    def later(self) -> MergeSpec:
        """The spec of later folds into a merge: the same, but with `linear` instead of a method with default weight 1,
        whose fold would weight the arriving adapter like all earlier ones together and trim those again each time.
        """
        averages = METHODS[self.method].weights == "mean"
        return self if averages else replace(self, method="linear", parameters={})

    def document(self) -> dict[str, Any]:
        """Return the document for a manifest and shelf.toml, where the method is called `merge`; `peft` is implied."""
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
