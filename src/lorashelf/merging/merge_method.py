"""The registry of merge methods, and a method's declarations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..lora.arrays import Array32, Float32
from ..registry import Registry
from .parameters import Parameter, Value, checked, parameters_of

Tensor = Float32[Array32, "_rows _columns"]
"""A, B or ΔW of one module; those of several adapters differ in rank."""
Weights = Float32[Array32, "n"]
Draw = Callable[[int], np.random.Generator]
"""Adapter i → the generator of its mask."""
Rule = Callable[..., Any]  # a Tensor; "exact", "joint": Factors; "subspace": Factors, ‖·‖² dropped and kept
Space = Literal["factors", "exact", "delta", "joint", "subspace"]


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A registered method: the rule, and declarations of the laws that it obeys."""

    name: str
    rule: Rule
    space: Space
    cites: str
    weights: Literal["mean", "unary"]
    """Default weights: 1/n each, or 1 each."""
    rank: Literal["max", "sum"]
    """The rank of the result: the largest among the inputs, or their sum."""
    weighting: Literal["root", "plain"]
    """In factor space: the rule's weights are √|w s| (PEFT), or √s multiplies the tensors first and the weights are w.
    """
    mean_power: float | None
    """For a rule that sums: merging n with weight 1/n is n**-mean_power · Σ of the √s-scaled tensors, on A and on B,
    and can be inverted.
    """
    duplicate: bool
    """Whether n copies of one adapter with the default weights merge into that adapter."""
    gauge: bool
    """Whether the result depends on ΔW only."""
    random: bool
    """Whether the result depends on the seed."""
    ordered: bool
    """Whether the result depends on the order of the adapters."""
    parameters: Mapping[str, Parameter]
    """The rule's keyword-only parameters, by name."""

    @property
    def sums_shared_init(self) -> bool:
        """Whether adapters with the same A are added up, not averaged: √n A times Σ B / √n is Σ ΔW."""
        return self.mean_power == 0.5

    def checked(self, params: Mapping[str, Value]) -> dict[str, Value]:
        """Return the parameters with defaults filled in. Raises UsageError naming every unknown or unusable one."""
        return checked(self.name, self.parameters, params, "see docs/methods.md for the parameters of each method")


METHODS: Registry[MergeMethod] = Registry("merge method")


def merge_method(
    name: str,
    *,
    space: Space,
    cites: str,
    weights: Literal["mean", "unary"] = "mean",
    rank: Literal["max", "sum"] = "max",
    weighting: Literal["root", "plain"] = "root",
    mean_power: float | None = None,
    duplicate: bool = False,
    gauge: bool = False,
    random: bool = False,
    ordered: bool = False,
) -> Callable[[Rule], Rule]:
    """Register a rule as merge method `name`; the declarations are those of MergeMethod and checked by the contract
    tests. Raises TypeError for parameters that `parameters_of` refuses, ValueError for a name already taken.
    """

    def register(rule: Rule) -> Rule:
        METHODS.add(
            name,
            MergeMethod(
                name=name,
                rule=rule,
                space=space,
                cites=cites,
                weights=weights,
                rank=rank,
                weighting=weighting,
                mean_power=mean_power,
                duplicate=duplicate,
                gauge=gauge,
                random=random,
                ordered=ordered,
                parameters=parameters_of(rule),
            ),
        )
        return rule

    return register
